"""All bad inputs: the table in ``expected.yaml``, and what ``building`` makes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from bad_inputs.building import BUILT, Case, patch

HERE = Path(__file__).parent
GOOD = HERE / "good.yaml"


def all_cases() -> list[Case]:
    """Return every case; names are unique."""
    return [*_written(yaml.safe_load((HERE / "expected.yaml").read_text("utf-8"))), *BUILT]


def _written(table: dict[str, Any]) -> Iterator[Case]:
    for name, says in table["recipes"].items():
        yield _case(f"recipe {name}", f"train {name}", says, partial(_copy, "recipes", name))
    for name, says in table["rows"].items():
        command = f"train good.yaml data.train={name}"
        yield _case(f"rows {name}", command, says, partial(_copy, "rows", name))
    for command, says in table["commands"].items():
        yield _case(command, command, says, None)
    for file, commands in table["patches"].items():
        for command, cases in commands.items():
            for changes, says in cases:
                damage = partial(_patch, file, changes)
                yield _case(f"{command} {changes}", command, says, damage)


def _case(name: str, command: str, says: Any, damage: Any) -> Case:
    code, text = says if isinstance(says, list) else (2, says)
    return Case(name, command, text, code, damage)


def _copy(kind: str, name: str, here: Path) -> None:
    shutil.copyfile(HERE / kind / name, here / name)


def _patch(file: str, changes: dict[str, Any], here: Path) -> None:
    patch(here / file, changes)
