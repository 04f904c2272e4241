"""Checkpoints: whole or absent, the last that can be trusted, and which of them are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from san_llm.train.checkpoint import (
    SEAL,
    checkpoint_of,
    damage,
    last_checkpoint,
    remove_old,
    whole_checkpoint,
)


def write(folder: Path, step: int, best: int | None = None, text: str | Path = "weights") -> Path:
    with whole_checkpoint(folder, step, best, first=True, together=lambda: None) as temporary:
        (temporary / "half").touch()
        text = text.read_text() if isinstance(text, Path) else text
        (temporary / "adapter.bin").write_text(text)
        (temporary / "deep").mkdir()
        (temporary / "deep" / "optimizer.bin").write_text("moments")
    return checkpoint_of(folder, step)


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.iterdir())


def test_a_checkpoint_is_whole_or_absent(tmp_path: Path) -> None:
    first = write(tmp_path, 1)
    assert damage(first) is None
    (tmp_path / "in_the_way").mkdir()
    with pytest.raises(IsADirectoryError):
        write(tmp_path, 2, text=tmp_path / "in_the_way")
    (tmp_path / "in_the_way").rmdir()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    (tmp_path / ".checkpoint-9").mkdir()  # what kill -9 leaves
    write(tmp_path, 2)
    assert steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("again", [False, True])
def test_it_gets_its_name_when_all_of_it_is_on_the_disk(
    tmp_path: Path, told_disk: list[tuple[str, str]], again: bool
) -> None:
    if again:
        checkpoint_of(tmp_path, 3).mkdir()  # a damaged one
    write(tmp_path, 3)
    hidden = tmp_path / ".checkpoint-3"
    named = told_disk.index(("rename", str(checkpoint_of(tmp_path, 3))))
    flushed = {path for what, path in told_disk[:named] if what == "flush"}
    written = ("half", "adapter.bin", "deep/optimizer.bin", SEAL)
    assert flushed == {str(hidden), *(str(hidden / name) for name in written)}
    # The list of all others is written when they are, under its name when it is whole.
    assert ("rename", str(hidden / SEAL)) in told_disk[:named]
    assert told_disk[named + 1 :] == [("flush", str(tmp_path))]


def test_only_the_first_process_makes_and_names_it(tmp_path: Path) -> None:
    met = []
    (tmp_path / ".checkpoint-3").mkdir()  # made by the first
    with whole_checkpoint(
        tmp_path, 3, None, first=False, together=lambda: met.append(1)
    ) as temporary:
        (temporary / "shard-1").write_text("mine")
    assert len(met) == 2
    assert [path.name for path in tmp_path.iterdir()] == [".checkpoint-3"]


def test_the_last_is_chosen_by_number_and_must_be_whole(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "absent") is None
    write(tmp_path, 9)
    expected = write(tmp_path, 10)  # by number, not by letters
    (tmp_path / "checkpoint-11").mkdir()  # not sealed
    (tmp_path / "checkpoint-x").mkdir()  # not ours
    warned: list[str] = []
    assert last_checkpoint(tmp_path, warned.append) == expected
    assert warned == [
        f"{tmp_path}: checkpoint-11 was not written to its end; not gone on from checkpoint-11"
    ]


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["adapter.bin", "deep/optimizer.bin", SEAL]),
    place=st.integers(0, 10**6),
    how=st.sampled_from(["flip", "truncate", "lose", "empty"]),
)
def test_any_damage_is_found_and_the_one_before_is_used(
    tmp_path_factory: pytest.TempPathFactory, name: str, place: int, how: str
) -> None:
    folder = tmp_path_factory.mktemp("checkpoints")
    before, last = write(folder, 1), write(folder, 2)
    path = last / name
    content = bytearray(path.read_bytes())
    if how == "lose":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncate":
        path.write_bytes(content[: place % len(content)])
    else:
        content[place % len(content)] ^= 1
        path.write_bytes(content)
    warned: list[str] = []
    found = last_checkpoint(folder, warned.append)
    if name == SEAL and found == last:
        return  # a space of the list itself, say: it still says the same
    assert found == before
    assert len(warned) == 1
    assert "checkpoint-2" in warned[0]


def test_one_whose_best_is_damaged_is_not_gone_on_from(tmp_path: Path) -> None:
    for step, best in ((1, 1), (2, 2), (3, 2)):
        write(tmp_path, step, best)
    (checkpoint_of(tmp_path, 2) / "adapter.bin").write_text("WEIGHTS")
    warned: list[str] = []
    assert last_checkpoint(tmp_path, warned.append) == checkpoint_of(tmp_path, 1)
    assert (
        "checkpoint-2/adapter.bin has changed since it was written, which checkpoint-3"
        in (warned[0])
    )
    assert len(warned) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("WEIGHTS", "checkpoint-1/adapter.bin has changed since it was written"),
        ("weight", "checkpoint-1/adapter.bin has 6 bytes, not those written"),
    ],
)
def test_damage_is_told_as_what_it_is(tmp_path: Path, text: str, said: str) -> None:
    last = write(tmp_path, 1)
    (last / "adapter.bin").write_text(text)
    assert damage(last) == said


def test_a_link_in_the_place_of_a_file_is_damage(tmp_path: Path) -> None:
    last = write(tmp_path / "checkpoints", 1)
    (tmp_path / "elsewhere").write_text("weights")
    (last / "adapter.bin").unlink()
    (last / "adapter.bin").symlink_to(tmp_path / "elsewhere")
    assert damage(last) == "checkpoint-1/adapter.bin is missing"


def test_a_damaged_one_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    last = write(tmp_path, 2)
    (last / "adapter.bin").write_text("")
    write(tmp_path, 2, text="again")
    assert damage(last) is None
    assert (last / "adapter.bin").read_text() == "again"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_the_last_ones_are_kept_with_the_best_that_each_knows_of(tmp_path: Path) -> None:
    for step, best in ((1, 1), (2, 1), (3, 3), (4, 3), (5, 5)):
        write(tmp_path, step, best)
    remove_old(tmp_path, keep=2)
    assert steps(tmp_path) == [3, 4, 5]  # 4 would need 3
    remove_old(tmp_path, keep=1)
    assert steps(tmp_path) == [5]
