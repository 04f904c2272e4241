"""What a run may go on with: the rows and the base of its beginning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from san_llm.errors import InputError
from san_llm.runs.record import Hashes
from san_llm.train.resume import refuse_other_data

BEGAN = {"base": {"config.json": "c", "model.safetensors": "m"}, "data": {"rows.json": "r"}}


def went_on(run: Path, base: Any = BEGAN["base"], data: Any = BEGAN["data"]) -> None:
    began: dict[str, Any] = {"recipe": "r", "seed": 1, "device": "cpu", "sha256": BEGAN}
    if not (run / "manifest.json").exists():
        (run / "manifest.json").write_text(json.dumps(began))
    refuse_other_data(run, Hashes(base=base, data=data))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base": BEGAN["base"] | {"model.safetensors": "M"}}, "the base's model.safetensors"),
        ({"base": BEGAN["base"] | {"more.json": "x"}}, "the base's more.json"),
        ({"base": {"config.json": "c"}}, "the base's model.safetensors"),
        ({"data": {"rows.json": "R"}}, "rows.json"),
        ({"data": BEGAN["data"] | {"more.json": "x"}}, "more.json"),
    ],
)
def test_another_base_or_other_rows_are_refused_by_name(tmp_path, change, said):
    with pytest.raises(InputError, match=f": {said} has changed since the run began"):
        went_on(tmp_path, **change)


def test_the_same_go_on(tmp_path):
    went_on(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", json.dumps({"sha256": {"base": {}}}), json.dumps({"sha256": {}})]
)
def test_a_manifest_that_cannot_tell_is_no_obstacle(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    went_on(tmp_path, base={"config.json": "other"})
