"""What is written down is read as it was written, and written again to the same bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from san_llm.errors import InputError
from san_llm.runs import record

MADE = Path(__file__).parents[1] / "made_before" / "runs" / "whole"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return shutil.copytree(MADE, tmp_path / "run")


def test_what_is_read_is_written_again_to_the_same_bytes(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*.json")}
    record.write_run_manifest(run, record.read_run_manifest(run))
    merge = record.read_merge_manifest(run / "merged")
    assert merge is not None
    record.write_merge_manifest(run / "merged", merge)
    folders = record.evaluations_of(run)
    assert len(folders) == 4
    for folder in folders:
        record.write_results(folder, record.read_results(folder))
    assert {path: path.read_bytes() for path in run.rglob("*.json")} == before


def test_what_a_manifest_has_besides_is_kept(run: Path) -> None:
    path = run / record.MANIFEST
    values = json.loads(path.read_text()) | {"host": "mine"}
    values["sha256"]["code"] = "abc"
    path.write_text(json.dumps(values))
    assert record.read_run_manifest(run).written == values
    path.unlink()
    assert record.read_run_manifest(run).written == {}


def test_metrics_of_before_memory_was_recorded_are_read(run: Path) -> None:
    path = run / record.METRICS
    values = json.loads(path.read_text())
    for later in ("resumed_at", "peak_memory"):
        del values[later]
    path.write_text(json.dumps(values))
    metrics = record.read_metrics(run)
    assert metrics is not None
    assert (metrics.steps, metrics.resumed_at, metrics.peak_memory) == (9, 0, None)
    path.unlink()
    assert record.read_metrics(run) is None


def test_two_questions_are_the_same_by_protocol_prompt_and_the_content_of_the_rows(
    run: Path,
) -> None:
    folders = {folder.name: folder for folder in record.evaluations_of(run)}
    asked = {
        name: record.read_evaluation_manifest(folder).question for name, folder in folders.items()
    }
    assert asked["loglik-base"] == asked["loglik-adapter"] != asked["generate-adapter"]
    assert asked["loglik-base"].rows == asked["generate-base"].rows
    path = folders["loglik-base"] / record.MANIFEST
    values = json.loads(path.read_text())
    data = values["identity"]["data"]
    values["identity"]["data"] = dict(reversed(data.items()))
    path.write_text(json.dumps(values))
    question = record.read_evaluation_manifest(path.parent).question
    assert question == asked["loglik-base"], "the order of the tasks is not of the question"
    data["piqa"]["sha256"] = "other"
    path.write_text(json.dumps(values))
    assert record.read_evaluation_manifest(path.parent).question != question


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "generate-base: not a finished evaluation: no results.json in it"),
        ("{", "results.json: not valid JSON"),
        ("[]", "results.json: expected a JSON object"),
        ('{"protocol": "generate"}', "results.json: prompt: Field required"),
        (
            '{"protocol": "generate", "prompt": "chat", "tasks": {}}',
            "results.json: tasks: Input should be a valid list",
        ),
    ],
)
def test_what_are_no_results_is_said_in_one_line(run: Path, text: str | None, message: str) -> None:
    path = run / "eval" / "generate-base" / record.RESULTS
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError) as raised:
        record.read_results(path.parent)
    assert str(raised.value).endswith(message)
