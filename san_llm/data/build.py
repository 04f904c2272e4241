"""The protocol's data from the raw public data sets: eight tasks, and the training mix of all.

What is written is the layout of LLM-Adapters: ``<task>/train.json``, ``<task>/test.json`` and
``commonsense_170k.json``, the training rows of all tasks, task after task, unshuffled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from san_llm.data.raw import RawSplit, find_raw, read_raw
from san_llm.errors import InputError, SanError, first_line
from san_llm.files import refuse_files, whole_folder
from san_llm.progress import say
from san_llm.protocol.row_text import render
from san_llm.protocol.tasks import TASKS

MIX = "commonsense_170k.json"
# Each task's repository on the hub.
HUB = {
    "boolq": "google/boolq",
    "piqa": "ybisk/piqa",
    "social_i_qa": "allenai/social_i_qa",
    "hellaswag": "Rowan/hellaswag",
    "winogrande": "allenai/winogrande",
    "ARC-Easy": "allenai/ai2_arc",
    "ARC-Challenge": "allenai/ai2_arc",
    "openbookqa": "allenai/openbookqa",
}
PARQUET = "refs/convert/parquet"  # the branch where the hub keeps every data set as parquet


@dataclass(frozen=True)
class Built:
    """What was written.

    Attributes:
        output: The folder.
        train: Rows of each task's training file.
        test: Rows of each task's test file.
        mix: Rows of the training mix.
        differs: Where the rows are not as many as published, in words.
    """

    output: str
    train: dict[str, int]
    test: dict[str, int]
    mix: int
    differs: list[str]


def build_commonsense(source: str, output: Path, overwrite: bool) -> Built:
    """Write the protocol's data, whole or not at all; return what was written.

    Args:
        source: ``hub``, or a folder with the raw data sets.
        output: The folder to write.
        overwrite: Replace a folder that was built before.

    Raises:
        InputError: when the folder has other files, or a raw file is missing, doubled or wrong.
        SanError: when the hub cannot be reached.
    """
    refuse_files(output, overwrite)
    _refuse_strange(output)
    splits = _from_hub() if source == "hub" else find_raw(Path(source))
    rows: dict[str, dict[str, int]] = {"train": {}, "test": {}}
    with whole_folder(output, overwrite) as folder, (folder / MIX).open("w") as mix_file:
        mix = _Listing(mix_file)
        for raw_split in splits:
            task_folder = folder / raw_split.task.name
            task_folder.mkdir(exist_ok=True)
            with (task_folder / f"{raw_split.split}.json").open("w") as file:
                listing = _Listing(file)
                for row in _rendered(raw_split):
                    listing.add(row)
                    if raw_split.split == "train":
                        mix.add(row)
                listing.end()
            rows[raw_split.split][raw_split.task.name] = listing.rows
            say(f"{raw_split.task.name}: {listing.rows:,} {raw_split.split} rows")
        mix.end()
        if not mix.rows:
            mix_file.close()
            (folder / MIX).unlink()
    return Built(str(output), rows["train"], rows["test"], mix.rows, _differences(rows))


def _rendered(raw_split: RawSplit) -> Iterator[dict[str, str]]:
    number = 0
    for path in raw_split.files:
        for where, raw in read_raw(path):
            number += 1
            yield render(raw_split.task.name, raw, where)
    if not number:
        raise InputError(f"{raw_split.files[0]}: no rows in it")


class _Listing:
    """A JSON list that grows row by row: the text of ``json.dump(rows, file, indent=4)``."""

    def __init__(self, file: TextIO) -> None:
        self._file, self.rows = file, 0
        file.write("[")

    def add(self, row: dict[str, str]) -> None:
        lines = ",\n".join(f'        "{key}": {json.dumps(text)}' for key, text in row.items())
        self._file.write(f"{',' if self.rows else ''}\n    {{\n{lines}\n    }}")
        self.rows += 1

    def end(self) -> None:
        self._file.write("\n]")


def _differences(rows: dict[str, dict[str, int]]) -> list[str]:
    differs = []
    for name, task in TASKS.items():
        for split, published in (("train", task.train_rows), ("test", task.test_rows)):
            count = rows[split].get(name)
            if count is None:
                differs.append(f"{name}: no {split} rows")
            elif count != published:
                differs.append(f"{name}: {count:,} {split} rows, {published:,} are published")
    return differs


def _refuse_strange(output: Path) -> None:
    """Never empty a folder that was not built here."""
    if not output.is_dir():
        return
    for path in sorted(output.iterdir()):
        ours = path.name == MIX or (
            path.name in TASKS
            and path.is_dir()
            and all(inside.name in ("train.json", "test.json") for inside in path.iterdir())
        )
        if not ours:
            raise InputError(f"{output}: not a folder that was built before ({path.name} is in it)")


def _from_hub() -> list[RawSplit]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    splits = []
    for task, repository in HUB.items():
        say(f"{repository}: fetching it from the hub")
        try:
            snapshot = snapshot_download(
                repository, repo_type="dataset", revision=PARQUET, allow_patterns=["*.parquet"]
            )
        except Exception as error:  # of several HTTP libraries, by the hub client's version
            first = first_line(error)
            if isinstance(error, LocalEntryNotFoundError):
                first = "the hub cannot be reached"
            raise SanError(
                f"{repository}: could not be fetched: {first}; --from DIR takes the raw files of a "
                "folder"
            ) from error
        splits += find_raw(Path(snapshot), task)
    return splits
