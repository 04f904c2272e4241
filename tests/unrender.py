"""Raw fields recovered from rendered rows, and the public files that would hold them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from san_llm.protocol.row_text import LEADS

Row = dict[str, str]
# Real rows, where they are at hand: data/commonsense/<task>/ here or beside the checkout.
ROOT = Path(__file__).resolve().parents[1]
REAL = next(iter(sorted(ROOT.parent.glob("*/data/commonsense"))), ROOT / "data" / "commonsense")


def raw_of(task: str, row: Row) -> dict[str, Any]:
    """Return the raw row that a rendered row was made of, as the public JSONL has it."""
    text = row["instruction"].removeprefix(LEADS[task])
    number = row["answer"][-1]
    if task == "boolq":
        question = text.removesuffix("?\n\nAnswer format: true/false")
        return {"question": question, "answer": row["answer"] == "true", "passage": "..."}
    if task == "winogrande":
        sentence, choices = text.rsplit("\n\nOption1: ", 1)
        one, two = choices.removesuffix(" Answer format: option1/option2").split(" Option2: ")
        return {"sentence": sentence, "option1": one, "option2": two, "answer": number}
    body = text.rpartition("\n\nAnswer format: ")[0]
    if task == "piqa":
        goal, rest = body.split("\n\nSolution1: ")
        one, two = rest.split("\n\nSolution2: ")
        return {"goal": goal, "sol1": one, "sol2": two, "label": int(number) - 1}
    word = "Ending" if task == "hellaswag" else "Answer"
    question, rest = body.rsplit(f"\n\n{word}1: ", 1)
    choices = re.split(rf" {word}\d: ", rest)
    if task == "hellaswag":
        label, context = question.split(": ", 1)
        return {
            "activity_label": label,
            "ctx": context,
            "endings": choices,
            "label": int(number) - 1,
        }
    if task == "social_i_qa":
        context, asked = question.rsplit(". ", 1) if ". " in question else ("", question)
        fields = {f"answer{letter}": text for letter, text in zip("ABC", choices, strict=True)}
        return {"context": f"{context}.", "question": asked, **fields, "label": number}
    labels = "ABCDE" if len(question) % 2 else "12345"  # both occur
    return {
        "id": "x",
        "question": {
            "stem": question,
            "choices": [
                {"text": text, "label": label} for text, label in zip(choices, labels, strict=False)
            ],
        },
        "answerKey": labels[int(number) - 1],
    }


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
