"""Write rows of two tasks from the descriptions of Debian's packages.

*Headline*: the long description in, its one-line summary out. *Section*: the description and
sixteen names in, the name of the package's section out; guessing is right in 6 of 100. Real English
text with labels that people gave it, of which a model of 135M learns much from a few hundred rows.

A package is in one file only, with one of the two tasks; so is whatever is made of the same source,
and whatever shares much of its text. An order by hash decides, so that the same lists give the same
bytes, and other counts of training rows leave the test as it is. On Debian, Ubuntu and their kin:

    sudo apt-get -o Acquire::Languages=en update
    .venv/bin/python scripts/make_package_rows.py rows
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import hashlib
import lzma
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from san_llm.errors import InputError
from san_llm.files import whole_folder, write_json

SECTIONS = (
    *("libs", "libdevel", "python", "perl", "haskell", "rust", "golang", "javascript"),
    *("java", "science", "games", "sound", "graphics", "fonts", "net", "admin"),
)
SHORTEST, LONGEST = 120, 520  # characters of a description
RUN, SHARED = 5, 0.5  # texts that share half of their runs of so many words are one
TASKS = ("headline", "section")
HEADLINE = "Write the one-line summary of the software package that this text describes."
SECTION = (
    "Name the section of the archive in which the software package that this text describes is "
    f"found.\n\nAnswer format: {'/'.join(SECTIONS)}"
)
OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
UPDATE = "sudo apt-get -o Acquire::Languages=en update"


class Package(NamedTuple):
    """What is said of a package, white space collapsed."""

    name: str
    source: str
    section: str
    summary: str
    body: str


class Lists(NamedTuple):
    """An archive's lists, as they are unpacked, and what they are called."""

    packages: bytes
    descriptions: bytes
    release: str


# --- what the lists say ---


def stanzas(text: str) -> Iterator[dict[str, str]]:
    """Give a list's records; a field's further lines keep the space that they begin with."""
    for block in re.split(r"\n(?:[ \t]*\n)+", text.strip("\n")):
        yield {key: value for key, _, value in (line.partition(":") for line in _unfolded(block))}


def _unfolded(block: str) -> list[str]:
    return re.split(r"\n(?![ \t])", block)


def read_packages(packages: str, descriptions: str) -> list[Package]:
    """Return the packages of the sections with a description of the right length, by name."""
    said = {}
    for record in stanzas(descriptions):
        key = record["Package"].strip(), record["Description-md5"].strip()
        summary, _, body = record["Description-en"].partition("\n")
        paragraphs = re.sub(r"(?m)^ \.$", "", body)  # a full stop stands for an empty line
        said[key] = _collapsed(summary), _collapsed(paragraphs)
    found = []
    for record in stanzas(packages):
        name = record["Package"].strip()
        section = record.get("Section", "").strip().rpartition("/")[2]
        key = name, record.get("Description-md5", "").strip()
        if section not in SECTIONS or key not in said:
            continue
        source = record.get("Source", name).split()[0]  # a version may follow
        summary, body = said[key]
        if SHORTEST <= len(body) <= LONGEST and summary:
            found.append(Package(name, source, section, summary, body))
    return sorted(found)


def _collapsed(text: str) -> str:
    return " ".join(text.split())


# --- which packages, and where ---


def choose(packages: Iterable[Package], seed: int, most: int) -> list[Package]:
    """Return at most so many packages of each section, in the seed's order, none like another."""
    order = sorted(packages, key=lambda package: _digest("take", seed, package.name))
    sources: set[str] = set()
    summaries: set[str] = set()
    sections: Counter[str] = Counter()
    sizes: list[int] = []  # how many runs each text has that was taken
    holders: dict[str, list[int]] = {}  # a run of words, and the texts that have it
    chosen = []
    for package in order:
        summary, runs = package.summary.casefold(), _runs(package.body)
        if (
            sections[package.section] >= most
            or package.source in sources
            or summary in summaries
            or _like_another(runs, sizes, holders)
        ):
            continue
        sections[package.section] += 1
        sources.add(package.source)
        summaries.add(summary)
        for run in runs:
            holders.setdefault(run, []).append(len(sizes))
        sizes.append(len(runs))
        chosen.append(package)
    # Anew: the large sections were full before the small ones came to their last.
    return sorted(chosen, key=lambda package: _digest("deal", seed, package.name))


def _digest(use: str, seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{use} {seed} {name}".encode()).digest()


def _runs(text: str) -> set[str]:
    words = re.findall(r"\w+", text.casefold())
    return {" ".join(words[at : at + RUN]) for at in range(max(1, len(words) - RUN + 1))}


def _like_another(runs: set[str], sizes: list[int], holders: dict[str, list[int]]) -> bool:
    """Return whether a text shares much with one that was taken, by the shorter of the two."""
    shared = Counter(other for run in runs for other in holders.get(run, ()))
    return any(count >= SHARED * min(len(runs), sizes[other]) for other, count in shared.items())


def row(package: Package, task: str) -> dict[str, str]:
    """Return a package as a row of a task."""
    instruction, output = {
        "headline": (HEADLINE, package.summary),
        "section": (SECTION, package.section),
    }[task]
    return {"instruction": instruction, "input": package.body, "output": output}


def deal(chosen: list[Package], counts: dict[str, int]) -> dict[str, list[tuple[Package, str]]]:
    """Return each file's packages with their tasks, which take turns.

    Args:
        chosen: The packages, in order; the test's come first.
        counts: How many rows ``test``, ``validation`` and ``train`` have; the test is two files.

    Raises:
        InputError: when there are too few packages.
    """
    if len(chosen) < sum(counts.values()):
        raise InputError(
            f"{len(chosen):,} packages for {sum(counts.values()):,} rows; raise --most, or ask for "
            "fewer rows"
        )
    files, start = {}, 0
    for side in ("test", "validation", "train"):
        part = [
            (package, TASKS[number % 2])
            for number, package in enumerate(chosen[start : start + counts[side]])
        ]
        start += counts[side]
        if side == "test":
            for task in TASKS:
                files[f"test_{task}"] = [pair for pair in part if pair[1] == task]
        else:
            files[side] = part
    return files


# --- where the lists are ---


def apt_lists() -> Lists:
    """Return the lists of the release that this machine is of, as apt keeps them.

    Raises:
        InputError: when there is no apt, or it has no descriptions.
    """
    if not shutil.which("apt-get"):
        raise InputError("no apt-get here; name two downloaded lists by --lists")
    fields = "$(CREATED_BY) $(COMPONENT) $(CODENAME) $(ORIGIN) $(VERSION) $(FILENAME)"
    codename = re.search(r"(?m)^VERSION_CODENAME=(\S+)", Path("/etc/os-release").read_text("utf-8"))
    wanted = codename.group(1) if codename else ""
    kept = {}
    command = ["apt-get", "-o", "Acquire::Languages=en", "indextargets", "--format", fields]
    for line in _output(command).decode().splitlines():
        kind, component, release, origin, version, file = line.split(" ", 5)
        if component == "main" and release == wanted and kind in ("Packages", "Translations"):
            kept[kind] = file, f"{origin} {version} {release} main"
    if len(kept) < 2:
        raise InputError(f"apt has no English descriptions of {wanted or 'a release'}: {UPDATE}")
    helper = "/usr/lib/apt/apt-helper"
    packages, descriptions = (
        _output([helper, "cat-file", kept[kind][0]]) for kind in ("Packages", "Translations")
    )
    return Lists(packages, descriptions, kept["Packages"][1])


def _output(command: list[str]) -> bytes:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout


def named_lists(packages: Path, descriptions: Path) -> Lists:
    """Return the lists in two files, packed or not."""
    contents = []
    for path in (packages, descriptions):
        try:
            with OPENERS.get(path.suffix, open)(path, "rb") as file:
                contents.append(file.read())
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    return Lists(*contents, f"{packages.name}, {descriptions.name}")


# --- the files ---


def note(lists: Lists, arguments: argparse.Namespace, files: dict[str, Any]) -> dict[str, Any]:
    """Return what a result keeps beside itself: the lists' sha256, and what was made of them."""
    return {
        "release": lists.release,
        "sha256": {
            "Packages": hashlib.sha256(lists.packages).hexdigest(),
            "Translation-en": hashlib.sha256(lists.descriptions).hexdigest(),
        },
        "seed": arguments.seed,
        "most_of_a_section": arguments.most,
        "rows": {name: dict(Counter(task for _, task in part)) for name, part in files.items()},
        "sections": {
            name: dict(sorted(Counter(package.section for package, _ in part).items()))
            for name, part in files.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--most", type=int, default=250, help="packages of a section (250)")
    for side, count in (("train", 1600), ("validation", 200), ("test", 1500)):
        parser.add_argument(f"--{side}", type=int, default=count, help=f"rows ({count:,})")
    parser.add_argument(
        "--lists",
        type=Path,
        nargs=2,
        metavar=("PACKAGES", "TRANSLATION"),
        help="an archive's Packages and Translation-en, packed or not, in place of apt's",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the folder's files")
    arguments = parser.parse_args()
    lists = named_lists(*arguments.lists) if arguments.lists else apt_lists()
    packages = read_packages(lists.packages.decode(), lists.descriptions.decode())
    chosen = choose(packages, arguments.seed, arguments.most)
    counts = {side: getattr(arguments, side) for side in ("train", "validation", "test")}
    files = deal(chosen, counts)
    with whole_folder(arguments.output, arguments.overwrite) as folder:
        for name, part in files.items():
            write_json(folder / f"{name}.json", [row(package, task) for package, task in part])
        write_json(folder / "rows.json", note(lists, arguments, files))
    print(f"{lists.release}: {len(packages):,} packages, {len(chosen):,} of them unlike each other")
    for name, part in files.items():
        print(f"{arguments.output / name}.json: {len(part):,} rows")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"make_package_rows: {error}")
