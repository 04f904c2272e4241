"""Rows from package descriptions: which packages are taken, and that none is in two files."""

from __future__ import annotations

import hashlib
import json
import lzma
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_package_rows.py"
FILES = ("train", "validation", "test_headline", "test_section")
BIRDS = (
    "Knows the song of every bird that breeds north of the river, tells two of them apart by ear "
    "and draws where they were heard in the course of a year."
)
# Name, source, section, summary, body in the lists' own form.
PACKAGES = (
    ("birds", "", "sound", "songs of birds", BIRDS),
    ("birds-again", "fork", "games", "another one", f"{BIRDS} With colours now, and a manual."),
    (
        *("chess", "", "games", "board game for two"),
        "Plays chess at the strength of a beginner, explains  its moves and\n .\n  loses now and "
        "then; a clock counts the time of both sides, and a book of openings comes along.",
    ),
    ("chess-data", "chess (2.1)", "games", "board game, data", "Holds the pieces of it. " * 6),
    (
        *("atlas", "maps (3:1.0-2+b1)", "science", "maps of rivers"),
        "Shows which way the water of a valley runs, how much of it there is in spring, and what "
        "the gauges along its way have said since they were built.",
    ),
    (
        *("letters", "", "fonts", "Maps of rivers"),  # but for a letter it is the atlas's
        "Has the letters of nine alphabets in three weights, drawn for signs beside roads that "
        "are read at speed, by night and in rain, from far away.",
    ),
    ("short", "", "net", "nothing much", "Says little."),
    ("long", "", "net", "too much", " ".join(f"word{number}" for number in range(90))),
    (
        "elsewhere",
        "",
        "editors",
        "edits text",
        "Edits a text in ways that no text was edited. " * 4,
    ),
    (
        *("post", "", "contrib/net", "carries mail"),
        "Takes letters to the machine where their reader has his box, tries again for five days "
        "when nobody answers there, and then brings them back to whom they came from.",
    ),
)


def md5(name: str) -> str:
    return hashlib.md5(name.encode()).hexdigest()


@pytest.fixture
def lists(tmp_path) -> list[Path]:
    """Write the ten packages as an archive's two lists, one of them packed."""
    packages = "\n".join(
        f"Package: {name}\n" + (f"Source: {source}\n" if source else "") + "Depends: one,\n two\n"
        f"Section: {section}\nDescription-md5: {md5(name)}\n"
        for name, source, section, _, _ in PACKAGES
    )
    said = "\n".join(
        f"Package: {name}\nDescription-md5: {md5(name)}\nDescription-en: {summary}\n {body}\n"
        for name, _, _, summary, body in PACKAGES
    )
    paths = [tmp_path / "Packages", tmp_path / "Translation-en.xz"]
    paths[0].write_text(packages)
    with lzma.open(paths[1], "wt") as file:
        file.write(said)
    return paths


@pytest.fixture
def make(lists, monkeypatch, tmp_path):
    """Run the script over the lists; return what it wrote, or its one line of refusal."""

    def run(*options: object, folder: str = "rows") -> dict[str, list[dict[str, str]]]:
        words = [SCRIPT, tmp_path / folder, "--lists", *lists, *options]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return {
            name: json.loads((tmp_path / folder / f"{name}.json").read_text()) for name in FILES
        }

    return run


ALL = ("--train", 2, "--validation", 0, "--test", 2)


def test_one_package_of_a_source_and_none_like_another_is_in_one_file(make):
    rows = [row for part in make(*ALL).values() for row in part]
    bodies = {row["input"] for row in rows}
    assert len(bodies) == len(rows) == 4
    # Of two with one text, of two from one source, of two with one summary: one each, and the post.
    for words in (("every bird",), ("chess", "pieces"), ("valley", "alphabets"), ("letters to",)):
        assert sum(any(word in body for word in words) for body in bodies) == 1, words


def test_a_row_asks_for_the_summary_or_the_section_of_its_text(make):
    made = make(*ALL)
    (headline,), (section,) = made["test_headline"], made["test_section"]
    said = {" ".join(body.replace("\n .\n", " ").split()): rest for *rest, body in PACKAGES}
    assert headline["output"] == said[headline["input"]][3]
    assert section["output"] == said[section["input"]][2].removeprefix("contrib/")
    assert headline["instruction"].startswith("Write the one-line summary")
    assert section["output"] in section["instruction"].rpartition("Answer format: ")[2].split("/")
    assert len({row["instruction"] for row in made["train"]}) == 2


def test_the_seed_alone_decides_and_more_training_rows_leave_the_test_as_it_is(make, tmp_path):
    first = make(*ALL)
    assert make(*ALL, folder="again") == first
    fewer = make("--train", 1, "--validation", 0, "--test", 2, folder="fewer")
    assert {**fewer, "train": []} == {**first, "train": []}
    assert any(make(*ALL, "--seed", seed, folder=f"seed{seed}") != first for seed in (2, 3, 4))


def test_the_note_has_the_lists_sha256_and_the_counts(make, lists, tmp_path):
    make(*ALL, "--most", 2)
    note = json.loads((tmp_path / "rows" / "rows.json").read_text())
    with lzma.open(lists[1]) as file:
        unpacked = file.read()
    assert note["sha256"] == {
        "Packages": hashlib.sha256(lists[0].read_bytes()).hexdigest(),
        "Translation-en": hashlib.sha256(unpacked).hexdigest(),
    }
    assert note["rows"]["train"] == {"headline": 1, "section": 1}
    assert (note["seed"], note["most_of_a_section"]) == (1, 2)


def test_too_few_packages_and_a_lost_list_are_told_in_one_line(make, lists, tmp_path):
    with pytest.raises(SystemExit, match="4 packages for 5 rows; raise --most, or ask for fewer"):
        make("--train", 3, "--validation", 0, "--test", 2)
    assert not (tmp_path / "rows").exists()
    lists[0].unlink()
    with pytest.raises(SystemExit, match="Packages: cannot be read: No such file"):
        make(*ALL)
