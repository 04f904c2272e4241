"""Scores as JSON and as a table."""

import json
import math

import pytest
from rich.console import Console

from san_llm.evaluate.questions import Settings
from san_llm.evaluate.score import TaskScore
from san_llm.evaluate.table import EvalResult, table
from san_llm.shown import percent

RESULT = EvalResult(
    scores=(
        TaskScore("boolq", 3270, 2289, 12, 0.7, 0.008014),
        TaskScore("ARC-Challenge", 4, 1, 3, 0.25, 0.25),
    ),
    settings=Settings(prompt="alpaca"),
    output="runs/one/eval/first",
    about={"title": "base + adapter on pocket", "model": "base", "adapter": None, "limit": 4},
)


def drawn(result, width=100):
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(table(result))
    return capture.get()


def test_the_table_has_a_line_for_each_task_and_the_average_over_tasks():
    lines = [line.strip(" │┃").replace("│", "").split() for line in drawn(RESULT).splitlines()]
    assert lines[0] == ["base", "+", "adapter", "on", "pocket"]
    assert [word for word in lines[2] if word != "┃"] == [
        *("task", "accuracy", "%", "std", "error", "rows", "no", "answer")
    ]
    assert ["boolq", "70.0", "0.8", "3270", "12"] in lines
    assert ["ARC-Challenge", "25.0", "25.0", "4", "3"] in lines
    # (0.7 + 0.25) / 2 and sqrt(0.008014^2 + 0.25^2) / 2
    assert ["average", "47.5", "12.5", "3274", "15"] in lines


def test_json_has_fractions_and_all_that_was_asked():
    value = json.loads(json.dumps(RESULT.to_json()))
    assert value["average"]["accuracy"] == pytest.approx(0.475)
    assert value["average"]["standard_error"] == pytest.approx(math.hypot(0.008014, 0.25) / 2)
    assert value["average"]["accuracy_norm"] is None
    del value["average"]
    for task in value["tasks"]:
        assert (task.pop("accuracy_norm"), task.pop("standard_error_norm")) == (None, None)
    assert value == {
        "title": "base + adapter on pocket",
        "model": "base",
        "adapter": None,
        "limit": 4,
        "protocol": "generate",
        "prompt": "alpaca",
        "strict": False,
        "output": "runs/one/eval/first",
        "unparseable_examples": [],
        "notes": [],
        "tasks": [
            {
                "task": "boolq",
                "n": 3270,
                "correct": 2289,
                "unparseable": 12,
                "accuracy": 0.7,
                "standard_error": 0.008014,
            },
            {
                "task": "ARC-Challenge",
                "n": 4,
                "correct": 1,
                "unparseable": 3,
                "accuracy": 0.25,
                "standard_error": 0.25,
            },
        ],
    }


def test_a_missing_standard_error_is_a_dash_in_the_table_and_null_in_json():
    single = EvalResult((TaskScore("piqa", 1, 1, 0, 1.0, None),), Settings(), "out", {})
    lines = [line.strip(" │┃").replace("│", "").split() for line in drawn(single).splitlines()]
    assert ["piqa", "100.0", "-", "1", "0"] in lines
    assert ["average", "100.0", "-", "1", "0"] in lines
    assert single.to_json()["average"] == {
        "accuracy": 1.0,
        "standard_error": None,
        "accuracy_norm": None,
        "standard_error_norm": None,
    }


@pytest.mark.parametrize(
    ("fraction", "text"), [(0.0, "0.0"), (1.0, "100.0"), (1 / 3, "33.3"), (None, "-")]
)
def test_percents_have_one_decimal(fraction, text):
    assert percent(fraction) == text


def test_a_title_with_brackets_is_shown_as_it_is():
    result = EvalResult(RESULT.scores, Settings(), "out", {"title": "runs/[1]/adapter [bold]x"})
    assert "runs/[1]/adapter [bold]x" in drawn(result)


def test_a_narrow_terminal_gets_every_number_still():
    shown = drawn(RESULT, width=46)
    for number in ("70.0", "25.0", "3270", "3274", "47.5"):
        assert number in shown
