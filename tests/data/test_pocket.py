"""The pocket commonsense set: what its files hold, and that the script makes exactly them."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
POCKET = ROOT / "san_llm" / "data" / "pocket"
LEAD = "Please choose the correct answer to the question: "
FOUR_ANSWERS = (
    rf"{LEAD}(?P<stem>[^\n]+)\n\nAnswer1: .+ Answer2: .+ Answer3: .+ Answer4: .+\n\n"
    r"Answer format: answer1/answer2/answer3/answer4"
)
# Task: how many choices it has, what they are called, and the form of an instruction.
TASKS = {
    "boolq": (
        2,
        "",
        r"Please answer the following question with true or false, question: (?P<stem>[^\n]+\?)"
        r"\n\nAnswer format: true/false",
    ),
    "piqa": (
        2,
        "Solution",
        r"Please choose the correct solution to the question: (?P<stem>[^\n]+[.?])\n\n"
        r"Solution1: [^\n]+\n\nSolution2: [^\n]+\n\nAnswer format: solution1/solution2",
    ),
    "social_i_qa": (
        3,
        "Answer",
        rf"{LEAD}(?P<stem>[^\n]+\?)\n\nAnswer1: .+ Answer2: .+ Answer3: .+\n\n"
        r"Answer format: answer1/answer2/answer3",
    ),
    "hellaswag": (
        4,
        "Ending",
        r"Please choose the correct ending to complete the given sentence: "
        r"(?P<stem>[A-Z][a-z ]+: An? [^\n]+)\n\n"
        r"Ending1: .+ Ending2: .+ Ending3: .+ Ending4: .+\n\n"
        r"Answer format: ending1/ending2/ending3/ending4",
    ),
    "winogrande": (
        2,
        "Option",
        r"Please choose the correct answer to fill in the blank to complete the given sentence: "
        r"(?P<stem>[^\n]+ _ [^\n]+\.)\n\nOption1: \w+ Option2: \w+ Answer format: option1/option2",
    ),
    "ARC-Easy": (4, "Answer", FOUR_ANSWERS),
    "ARC-Challenge": (4, "Answer", FOUR_ANSWERS),
    "openbookqa": (4, "Answer", FOUR_ANSWERS),
}
Row = dict[str, str]
Made = dict[str, dict[str, list[tuple[Row, Any]]]]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    before = list(sys.path)
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module("make_pocket")
    finally:
        sys.path[:] = before


@pytest.fixture(scope="module")
def made(script: ModuleType) -> Made:
    rows: Made = script.make_rows()
    return rows


@pytest.fixture(scope="module")
def training(made: Made) -> list[tuple[str, Row]]:
    """The rows of the training file, each with its task, which its text alone does not tell."""
    tasks = {row["instruction"]: task for task, rows in made["train"].items() for row, _ in rows}
    rows = json.loads((POCKET / "train.json").read_text())
    return [(tasks[row["instruction"]], row) for row in rows]


@pytest.fixture(scope="module")
def by_task(training: list[tuple[str, Row]]) -> dict[str, list[Row]]:
    """The rows of each split and task, under names such as ``train piqa``."""
    rows: dict[str, list[Row]] = {}
    for task in TASKS:
        rows[f"test {task}"] = json.loads((POCKET / task / "test.json").read_text())
        rows[f"train {task}"] = [row for name, row in training if name == task]
    return rows


def _choices(task: str, row: Row) -> list[str]:
    word = TASKS[task][1]
    body = row["instruction"].rpartition("Answer format")[0]
    return [part.strip() for part in re.split(rf"{word}\d: ", body)[1:]]


def _right(task: str, row: Row) -> str:
    return _choices(task, row)[int(row["answer"][-1]) - 1]


def test_files_are_what_the_script_makes(script: ModuleType) -> None:
    assert script.main(["--check"]) == 0


def test_check_names_a_file_that_was_changed_by_hand(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(script, "OUT", tmp_path)
    assert script.main([]) == 0
    assert script.main(["--check"]) == 0
    changed = tmp_path / "piqa" / "test.json"
    changed.write_text(changed.read_text().replace("solution1", "solution2", 1))
    capsys.readouterr()
    assert script.main(["--check"]) == 1
    error = capsys.readouterr().err
    assert "piqa/test.json" in error
    assert "train.json" not in error


def test_the_rows_do_not_depend_on_the_hash_seed(script: ModuleType) -> None:
    code = (
        "import hashlib, make_pocket as m; "
        "print(hashlib.sha256(repr(sorted(m.make_files().items())).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=SCRIPTS,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_no_test_fact_appears_in_a_training_row(made: Made) -> None:
    used = {
        side: {fact for rows in tasks.values() for _, draft in rows for fact in draft.facts}
        for side, tasks in made.items()
    }
    assert len(used["train"]) > 500
    assert len(used["test"]) > 150
    assert not used["train"] & used["test"]


def test_a_fact_on_both_sides_is_refused(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = script.split()["train"]
    monkeypatch.setattr(script, "split", lambda: {"train": train, "test": train})
    with pytest.raises(ValueError, match="facts on both sides"):
        script.make_rows()


# The second is there, but in a section for the test rows.
@pytest.mark.parametrize("name", ["misspelt", "squeak"])
def test_a_unit_kept_together_with_another_must_exist(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    train = script.DATA["stay"]["train"]
    monkeypatch.setitem(train, "goal", [*train["goal"], name])
    with pytest.raises(ValueError, match=f"no such units: goal/{name}"):
        script.split()


def test_no_fact_has_the_name_of_another(script: ModuleType) -> None:
    files = [file for side in script.split().values() for file in side.values()]
    ids = [fact.id for file in files for facts in file.values() for fact in facts]
    assert len(ids) > 1000
    assert [name for name, count in Counter(ids).items() if count > 1] == []


def _mappings(node: yaml.Node) -> Iterator[yaml.MappingNode]:
    if isinstance(node, yaml.MappingNode):
        yield node
    for value in node.value if isinstance(node, yaml.CollectionNode) else []:
        for child in value if isinstance(value, tuple) else (value,):
            yield from _mappings(child)


@pytest.mark.parametrize("path", sorted((SCRIPTS / "pocket").iterdir()), ids=lambda path: path.stem)
def test_no_key_is_given_twice(path: Path) -> None:
    # YAML would keep the last of them, and a row would be gone.
    for mapping in _mappings(yaml.compose(path.read_text("utf-8"))):
        counts = Counter(key.value for key, _ in mapping.value)
        assert [key for key, count in counts.items() if count > 1] == []


def test_each_task_has_sixty_test_rows_and_enough_training_rows(
    by_task: dict[str, list[Row]], training: list[tuple[str, Row]]
) -> None:
    assert 1600 <= len(training) <= 2400
    for task in TASKS:
        assert len(by_task[f"test {task}"]) == 60
        assert len(by_task[f"train {task}"]) >= 150


def test_the_tasks_are_mixed_in_the_training_file(training: list[tuple[str, Row]]) -> None:
    tasks = [task for task, _ in training]
    assert all(len(set(tasks[start : start + 100])) == len(TASKS) for start in (0, 700, 1500))


def test_every_row_has_the_form_of_its_task(by_task: dict[str, list[Row]]) -> None:
    for name, rows in by_task.items():
        count, word, form = TASKS[name.split()[1]]
        labels = [f"{word.lower()}{number + 1}" for number in range(count)]
        answers = set(labels if word else ("true", "false"))
        for row in rows:
            assert list(row) == ["instruction", "input", "output", "answer"]
            assert re.fullmatch(form, row["instruction"]), row["instruction"]
            assert row["input"] == ""
            assert row["answer"] in answers
            assert row["output"] == f"the correct answer is {row['answer']}"


def test_every_choice_is_offered_once(by_task: dict[str, list[Row]]) -> None:
    for name, rows in by_task.items():
        task = name.split()[1]
        for row in rows if TASKS[task][1] else []:
            choices = _choices(task, row)
            assert len(choices) == TASKS[task][0]
            assert len({choice.lower() for choice in choices}) == len(choices), choices
            assert all(choices)


def test_right_answers_are_even_over_the_places(by_task: dict[str, list[Row]]) -> None:
    for name, rows in by_task.items():
        counts = Counter(row["answer"] for row in rows)
        assert len(counts) == TASKS[name.split()[1]][0]
        assert max(counts.values()) - min(counts.values()) <= 1, (name, counts)


def test_no_instruction_occurs_twice(by_task: dict[str, list[Row]]) -> None:
    counts = Counter(row["instruction"] for rows in by_task.values() for row in rows)
    assert [text for text, count in counts.items() if count > 1] == []


def test_no_question_has_two_right_answers_among_the_same_choices(
    by_task: dict[str, list[Row]],
) -> None:
    for name, rows in by_task.items():
        task = name.split()[1]
        answers: dict[tuple[str, frozenset[str]], str] = {}
        for row in rows:
            match = re.fullmatch(TASKS[task][2], row["instruction"])
            assert match is not None
            listed = _choices(task, row) if TASKS[task][1] else []
            right = _right(task, row) if listed else row["answer"]
            key = (match["stem"], frozenset(listed))
            assert answers.setdefault(key, right) == right, match["stem"]


def test_the_length_of_a_choice_does_not_give_it_away(by_task: dict[str, list[Row]]) -> None:
    for name, rows in by_task.items():
        task = name.split()[1]
        count, word, _ = TASKS[task]
        if not word:
            continue
        for extreme in (max, min):
            hits = 0.0
            for row in rows:
                lengths = [len(choice) for choice in _choices(task, row)]
                best = extreme(lengths)
                if len(_right(task, row)) == best:
                    hits += 1 / lengths.count(best)
            # Twice the spread of a fair coin with as many throws and sides as there are rows.
            spread = 2 * (1 / count * (1 - 1 / count) / len(rows)) ** 0.5
            assert abs(hits / len(rows) - 1 / count) <= spread, (name, extreme, hits / len(rows))


def test_a_choice_that_is_often_right_is_also_wrong_elsewhere(
    by_task: dict[str, list[Row]],
) -> None:
    for task in (name for name, (_, word, _) in TASKS.items() if word):
        right: Counter[str] = Counter()
        offered: Counter[str] = Counter()
        for row in by_task[f"train {task}"]:
            right[_right(task, row)] += 1
            offered.update(_choices(task, row))
        always = [text for text, count in right.items() if count > 2 and count == offered[text]]
        assert always == []


def test_files_are_small_ascii_with_one_row_a_line() -> None:
    files = sorted(POCKET.rglob("*.json"))
    assert len(files) == 1 + len(TASKS)
    assert sum(path.stat().st_size for path in files) < 1_500_000
    for path in files:
        text = path.read_bytes().decode("ascii")
        lines = text.splitlines()
        assert lines[0] == "["
        assert lines[-1] == "]"
        assert [json.loads(line.rstrip(",")) for line in lines[1:-1]] == json.loads(text)


def test_rows_are_short_and_hold_no_unfilled_names(by_task: dict[str, list[Row]]) -> None:
    for rows in by_task.values():
        lengths = [len(row["instruction"].split()) for row in rows]
        assert sum(lengths) / len(lengths) < 60
        assert max(lengths) < 80
        assert not [row for row in rows if re.search(r"[{}$|~\\]|  ", row["instruction"])]


def test_articles_fit_the_words_after_them(by_task: dict[str, list[Row]]) -> None:
    for rows in by_task.values():
        for row in rows:
            text = row["instruction"]
            assert not re.search(r"\b[Aa] (?!used|useful|uni|one|European)[aeiou]", text), text
            assert not re.search(r"\b[Aa]n (?!hour|honest|X-ray)[^aeiouAEIOU]", text), text


@pytest.mark.parametrize(
    ("item", "phrase", "question"),
    [
        ("milk", "is a liquid at room temperature", "is milk a liquid at room temperature?"),
        ("a cork", "would float", "would a cork float?"),
        ("a fox", "has a backbone", "does a fox have a backbone?"),
        ("wool", "comes from an animal", "does wool come from an animal?"),
        ("a slug", "has no backbone", ""),
        ("a wall", "cannot be seen through", ""),
    ],
)
def test_what_is_said_of_an_item_becomes_a_question(
    script: ModuleType, item: str, phrase: str, question: str
) -> None:
    assert script.yes_no(item, phrase) == question
