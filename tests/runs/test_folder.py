"""Files that are whole or absent, run folders, and the link to the last one."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import subprocess
import time
from datetime import datetime
from pathlib import Path

import pytest
from tiny import write_recipe

from san_llm import files
from san_llm.errors import InputError
from san_llm.recipe.read import load_recipe, to_yaml
from san_llm.recipe.schema import Recipe
from san_llm.runs import folder as run_folder
from san_llm.runs.record import manifest


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def recipe(here: Path) -> Recipe:
    return load_recipe(write_recipe(here / "r.yaml", here / "base", here / "rows.json"))


def test_text_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_text(path, "old é\n")
    assert path.read_bytes() == "old é\n".encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    with pytest.raises(UnicodeEncodeError):
        files.write_text(path, "new, and then half a character: \ud800")
    assert path.read_text(encoding="utf-8") == "old é\n"
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    assert names(tmp_path) == ["a.json"]
    files.write_json(path, {"a": "é"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "é"}


def test_text_cannot_replace_a_folder_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        files.write_text(tmp_path / "taken", "text")
    assert names(tmp_path) == ["taken"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_folder_that_fails_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fill() -> None:
        with files.whole_folder(tmp_path / "new" / "deep", overwrite=False) as folder:
            (folder / "half").write_text("half")
            raise error

    with pytest.raises(error):
        fill()
    assert names(tmp_path) == []


def test_a_folder_gets_its_name_when_all_of_it_is_on_the_disk(
    tmp_path: Path, told_disk: list[tuple[str, str]]
) -> None:
    target = tmp_path / "new" / "deep" / "target"
    with files.whole_folder(target, overwrite=False) as folder:
        (folder / "sub").mkdir()
        for name in ("one", "sub/two"):
            (folder / name).write_text(name)
        assert told_disk == []
    first = {("flush", str(folder / name)) for name in ("", "one", "sub", "sub/two")}
    assert set(told_disk[:-2]) == first
    assert told_disk[-2:] == [("rename", str(target)), ("flush", str(target.parent))]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_replacement_that_fails_leaves_the_old_folder(
    tmp_path: Path, error: type[BaseException]
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("old")

    def fill() -> None:
        with files.whole_folder(target, overwrite=True) as folder:
            (folder / "half").write_text("half")
            raise error

    with pytest.raises(error):
        fill()
    assert names(tmp_path) == ["target"]
    assert names(target) == ["old"]


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("old")

    rename = Path.rename

    def refuse(path: Path, to: Path) -> Path:
        if Path(to) == target and not path.name.endswith(".old"):
            raise OSError("no")
        return rename(path, to)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with (
            pytest.raises(OSError, match="no"),
            files.whole_folder(target, overwrite=True) as folder,
        ):
            (folder / "new").write_text("new")
    assert names(tmp_path) == ["target"]
    assert names(target) == ["old"]


def test_a_folder_is_replaced_whole_and_readable_by_others(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("old")
    with files.whole_folder(target, overwrite=True) as folder:
        assert names(target) == ["old"]  # until the end
        (folder / "sub").mkdir()
        (folder / "sub" / "new").write_text("new")
    assert names(tmp_path) == ["target"]
    assert names(target) == ["sub"]
    modes = [stat.S_IMODE(p.stat().st_mode) for p in (target, target / "sub" / "new")]
    assert modes == [0o755, 0o644]


def test_files_in_the_way_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    with (
        pytest.raises(InputError, match="full: has files in it; add --overwrite"),
        files.whole_folder(tmp_path / "full", overwrite=False),
    ):
        pytest.fail("the block must not be entered")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="file: a file stands there"):
            files.refuse_files(tmp_path / "file", overwrite)
    files.refuse_files(tmp_path / "empty", overwrite=False)
    files.refuse_files(tmp_path / "absent", overwrite=False)
    assert names(tmp_path) == ["empty", "file", "full"]


def test_a_new_run_holds_the_recipe_that_was_resolved(recipe: Recipe) -> None:
    run = run_folder.new_run(recipe, None, overwrite=False)
    assert run.parent == Path("runs")
    assert names(run) == ["recipe.yaml"]
    assert run_folder.recipe_of(run) == recipe


def test_two_runs_of_the_same_second_get_two_folders(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(datetime):
        """A clock that stands."""

        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return datetime(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(run_folder, "datetime", Stopped)
    runs = [run_folder.new_run(recipe, None, overwrite=False) for _ in range(3)]
    assert [run.name for run in runs] == [
        "r-20260102-030405",
        "r-20260102-030405-2",
        "r-20260102-030405-3",
    ]


def test_runs_that_start_at_once_get_folders_of_their_own(recipe: Recipe) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: run_folder.new_run(recipe, None, False), range(16)))
    assert len(set(runs)) == 16


def test_only_a_run_of_ours_is_emptied(recipe: Recipe, here: Path) -> None:
    run = run_folder.new_run(recipe, here / "out", overwrite=False)
    (run / "log.jsonl").write_text("{}")
    with pytest.raises(InputError, match="has files in it"):
        run_folder.new_run(recipe, run, overwrite=False)
    assert names(run) == ["log.jsonl", "recipe.yaml"]
    assert names(run_folder.new_run(recipe, run, overwrite=True)) == ["recipe.yaml"]
    home = here / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="not a run of ours"):
        run_folder.new_run(recipe, home, overwrite=True)
    assert (home / "thesis.tex").read_text() == "years of work"


def test_a_folder_with_a_recipe_of_the_users_is_not_emptied(recipe: Recipe, here: Path) -> None:
    # A project's folder may well have a file named recipe.yaml.
    project = here / "project"
    (project / "src").mkdir(parents=True)
    (project / "src" / "thesis.tex").write_text("years of work")
    (project / "recipe.yaml").write_text(to_yaml(recipe))
    with pytest.raises(InputError, match="not a run of ours"):
        run_folder.new_run(recipe, project, overwrite=True)
    assert (project / "src" / "thesis.tex").read_text() == "years of work"


def test_latest_names_the_last_run_wherever_it_lies(recipe: Recipe, here: Path) -> None:
    with pytest.raises(InputError, match="no run yet in this directory"):
        run_folder.last_run()
    inside = run_folder.new_run(recipe, None, overwrite=False)
    run_folder.point_latest(inside)
    assert os.readlink("runs/latest") == inside.name  # a moved runs folder keeps its link
    assert run_folder.last_run() == inside
    outside = run_folder.new_run(recipe, here / "elsewhere", overwrite=False)
    run_folder.point_latest(outside)
    assert run_folder.last_run() == Path("elsewhere")
    assert [name for name in names(Path("runs")) if name.startswith(".")] == []


def test_a_latest_that_names_nothing_any_more_is_no_run(recipe: Recipe) -> None:
    run = run_folder.new_run(recipe, None, overwrite=False)
    run_folder.point_latest(run)
    (run / "recipe.yaml").unlink()
    run.rmdir()
    with pytest.raises(InputError, match="no run yet"):
        run_folder.last_run()


def test_where_latest_names_nothing_the_newest_finished_run_is_taken(recipe: Recipe) -> None:
    runs = [run_folder.new_run(recipe, Path("runs") / name, overwrite=False) for name in "abc"]
    for age, run in ((20, runs[1]), (10, runs[0])):
        (run / "adapter").mkdir()
        (run / "adapter" / "adapter_config.json").write_text("{}")
        os.utime(run / "adapter", (time.time() - age, time.time() - age))
    assert run_folder.last_run() == runs[0]  # "c" is not finished
    run_folder.point_latest(runs[2])
    assert run_folder.last_run() == runs[2]
    shutil.rmtree(runs[2])
    assert run_folder.last_run() == runs[0]


def test_an_unfinished_run_has_no_adapter_and_says_how_to_get_one(recipe: Recipe) -> None:
    run = run_folder.new_run(recipe, None, overwrite=False)
    with pytest.raises(InputError, match=f"`san-llm train {run} --resume` goes on"):
        run_folder.adapter_of(run)
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_config.json").write_text("{}")
    assert run_folder.adapter_of(run) == run / "adapter"
    assert run_folder.run_of(run / "adapter") == run
    assert run_folder.run_of(Path("elsewhere")) is None


def test_the_manifest_says_which_commit_ran_and_whether_it_was_changed(here: Path) -> None:
    assert manifest()["git"] is None

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "first")
    state = {"commit": git("rev-parse", "HEAD"), "dirty": False}
    assert manifest(seed=3)["git"] == state
    assert manifest(seed=3)["seed"] == 3
    (here / "new").write_text("new")
    assert manifest()["git"] == {**state, "dirty": True}


def test_what_a_dead_process_left_is_cleared_away_and_a_live_ones_is_not(tmp_path: Path) -> None:
    target = tmp_path / "a[b]"
    other = tmp_path / ".a[b].settings"  # not ours
    dead = tmp_path / ".a[b].san-llm-deadbeef"
    for folder in (other, dead):
        folder.mkdir()
        (folder / "half").write_text("half")
    with files.whole_folder(target, overwrite=False) as first:
        assert names(tmp_path) == sorted([first.name, other.name])
        with files.whole_folder(target, overwrite=False) as second:
            assert first.is_dir()
            (second / "new").write_text("new")
        assert first.is_dir()
        shutil.rmtree(target)
    assert names(tmp_path) == [other.name, target.name]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EBADF])
def test_where_folders_cannot_be_locked_one_is_written_whole_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    of_another = tmp_path / ".out.san-llm-abcdefgh"
    of_another.mkdir()
    with files.whole_folder(tmp_path / "out", overwrite=False) as folder:
        (folder / "a").write_text("whole")
    assert (tmp_path / "out" / "a").read_text() == "whole"
    assert sorted(tmp_path.iterdir()) == [of_another, tmp_path / "out"]  # its owner may live


def test_a_folder_that_a_dead_process_moved_aside_comes_back(tmp_path: Path) -> None:
    aside, half = tmp_path / ".t.san-llm-deadbeef.old", tmp_path / ".t.san-llm-deadbeef"
    for folder in (aside, half):
        folder.mkdir()
        (folder / folder.suffix).write_text("mine")
    with (
        pytest.raises(InputError, match="t: has files in it"),
        files.whole_folder(tmp_path / "t", overwrite=False),
    ):
        pytest.fail("the block must not be entered")
    assert names(tmp_path) == ["t"]
    assert names(tmp_path / "t") == [".old"]
    aside.mkdir()  # killed after the new folder had its name
    with files.whole_folder(tmp_path / "t", overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert names(tmp_path) == ["t"]
    assert names(tmp_path / "t") == ["new"]
