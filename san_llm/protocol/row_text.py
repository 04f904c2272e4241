"""One raw row of each public data set, written as LLM-Adapters (Hu et al. 2023) wrote it.

The text is byte for byte that of the published files, their quirks included; ``docs/data.md`` names
them. Raw fields are joined as they are, and nothing is stripped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from san_llm.errors import InputError, did_you_mean

Raw = Mapping[str, Any]

# What stands before the question of each task.
LEADS = {
    "boolq": "Please answer the following question with true or false, question: ",
    "piqa": "Please choose the correct solution to the question: ",
    "social_i_qa": "Please choose the correct answer to the question: ",
    "hellaswag": "Please choose the correct ending to complete the given sentence: ",
    "winogrande": "Please choose the correct answer to fill in the blank to complete the given "
    "sentence: ",
    "ARC-Easy": "Please choose the correct answer to the question: ",
    "ARC-Challenge": "Please choose the correct answer to the question: ",
    "openbookqa": "Please choose the correct answer to the question: ",
}


def render(task: str, raw: Raw, where: str) -> dict[str, str]:
    """Return a raw row as an LLM-Adapters row: instruction, input (always empty), output, answer.

    Args:
        task: Which of the eight it is of.
        raw: Its fields, as the public JSONL or the hub's parquet files name them.
        where: File and row, for messages.

    Raises:
        InputError: naming the row and the field that is missing or cannot be.
    """
    question, answer = _FORMS[task](raw, where)
    return {
        "instruction": LEADS[task] + question,
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


def _boolq(raw: Raw, where: str) -> tuple[str, str]:
    question = _text(raw, "question", where)
    label = _label(raw, ("answer", "label"), where)
    answers = {"true": "true", "1": "true", "false": "false", "0": "false"}
    answer = answers.get(str(label).lower())
    if answer is None:
        raise InputError(f"{where}: found {label!r} for an answer, expected true or false")
    # The raw questions have no question mark, the published ones do.
    mark = "" if question.endswith("?") else "?"
    return f"{question}{mark}\n\nAnswer format: true/false", answer


def _piqa(raw: Raw, where: str) -> tuple[str, str]:
    first, second = (_text(raw, key, where) for key in ("sol1", "sol2"))
    question = f"{_text(raw, 'goal', where)}\n\nSolution1: {first}\n\nSolution2: {second}"
    answer = _numbered("solution", _label(raw, ("label",), where), ("0", "1"), where)
    return f"{question}\n\n{_format('solution', 2)}", answer


def _social_i_qa(raw: Raw, where: str) -> tuple[str, str]:
    choices = [_text(raw, key, where) for key in ("answerA", "answerB", "answerC")]
    label = _label(raw, ("label", "correct"), where)
    known = ("A", "B", "C") if label in ("A", "B", "C") else ("1", "2", "3")
    answer = _numbered("answer", label, known, where)
    question = f"{_text(raw, 'context', where)} {_text(raw, 'question', where)}"
    return f"{question}\n\n{_listed('Answer', choices)}\n\n{_format('answer', 3)}", answer


def _hellaswag(raw: Raw, where: str) -> tuple[str, str]:
    endings = _get(raw, "endings", where)
    if not isinstance(endings, list) or len(endings) != 4 or not _all_text(endings):
        raise InputError(f"{where}: 'endings' is not a list of 4 texts")
    answer = _numbered("ending", _label(raw, ("label",), where), ("0", "1", "2", "3"), where)
    question = f"{_text(raw, 'activity_label', where)}: {_text(raw, 'ctx', where)}"
    return f"{question}\n\n{_listed('Ending', endings)}\n\n{_format('ending', 4)}", answer


def _winogrande(raw: Raw, where: str) -> tuple[str, str]:
    choices = [_text(raw, key, where) for key in ("option1", "option2")]
    answer = _numbered("option", _label(raw, ("answer", "label"), where), ("1", "2"), where)
    # The only task whose answer format stands on the line of its choices.
    listed = f"{_listed('Option', choices)} {_format('option', 2)}"
    return f"{_text(raw, 'sentence', where)}\n\n{listed}", answer


def _science(raw: Raw, where: str) -> tuple[str, str]:
    """ARC and OpenBookQA: as many choices as there are, labelled by letters or numbers."""
    holder = raw.get("question")
    if isinstance(holder, Mapping):  # JSONL; in parquet the fields stand side by side
        question, choices = _text(holder, "stem", where), _get(holder, "choices", where)
    else:
        key = "question_stem" if "question_stem" in raw else "question"
        question, choices = _text(raw, key, where), _get(raw, "choices", where)
    if isinstance(choices, Mapping):
        texts, labels = _get(choices, "text", where), _get(choices, "label", where)
    elif isinstance(choices, list) and all(isinstance(choice, Mapping) for choice in choices):
        texts = [_text(choice, "text", where) for choice in choices]
        labels = [_text(choice, "label", where) for choice in choices]
    else:
        texts = labels = None
    known = isinstance(texts, list) and isinstance(labels, list) and len(texts) == len(labels)
    if not known or not 3 <= len(texts) <= 5 or not _all_text([*texts, *labels]):
        raise InputError(f"{where}: 'choices' are not 3 to 5 texts with a label each")
    answer = _numbered("answer", _label(raw, ("answerKey",), where), labels, where)
    listed = f"{_listed('Answer', texts)}\n\n{_format('answer', len(texts))}"
    return f"{question}\n\n{listed}", answer


_FORMS: dict[str, Callable[[Raw, str], tuple[str, str]]] = {
    "boolq": _boolq,
    "piqa": _piqa,
    "social_i_qa": _social_i_qa,
    "hellaswag": _hellaswag,
    "winogrande": _winogrande,
    "ARC-Easy": _science,
    "ARC-Challenge": _science,
    "openbookqa": _science,
}


def _listed(word: str, texts: Sequence[str]) -> str:
    return " ".join(f"{word}{number}: {text}" for number, text in enumerate(texts, start=1))


def _format(word: str, count: int) -> str:
    return "Answer format: " + "/".join(f"{word}{number}" for number in range(1, count + 1))


def _numbered(word: str, label: Any, known: Sequence[str], where: str) -> str:
    if isinstance(label, bool) or str(label) not in known:
        raise InputError(f"{where}: found the label {label!r}, expected one of {', '.join(known)}")
    return f"{word}{known.index(str(label)) + 1}"


def _label(raw: Raw, keys: Sequence[str], where: str) -> Any:
    """Return a row's label; unlabelled rows have none, an empty one or -1."""
    for key in keys:
        label = raw.get(key)
        label = label.strip() if isinstance(label, str) else label  # the hub has "1\n"
        if label not in (None, "", -1, "-1"):
            return label
    raise InputError(
        f"{where}: no label under {' or '.join(map(repr, keys))}, as in test splits whose answers "
        "are not public"
    )


def _get(raw: Raw, key: str, where: str) -> Any:
    if key not in raw:
        raise InputError(
            f"{where}: key {key!r} is missing; found "
            f"{', '.join(map(repr, raw)) or 'no keys'}{did_you_mean(key, raw)}"
        )
    return raw[key]


def _text(raw: Raw, key: str, where: str) -> str:
    value = _get(raw, key, where)
    if not isinstance(value, str):
        raise InputError(f"{where}: {key!r} is not a text")
    return value


def _all_text(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str) for value in values)
