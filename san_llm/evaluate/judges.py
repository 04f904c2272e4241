"""How a generated text of a task of one's own is judged: what is read in it, and its score.

As with the published tasks, only the text up to a next "### Response:" counts. The rules are those
in use elsewhere; each function names its source.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from decimal import Decimal
from functools import cache
from importlib.util import find_spec
from typing import Any

from san_llm.errors import InputError
from san_llm.recipe.task_file import TaskFile

_NUMBER = re.compile(r"(?:(?<!\w)-\s?)?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")


def read_answer(says: TaskFile, text: str) -> str | None:
    """Return what a judge reads in a text: its answer, or None where there is none."""
    if says.judge == "pattern":
        match = re.search(says.pattern or "", text)
        if match is None:
            return None
        groups = match.groups()
        return groups[0] if groups and groups[0] is not None else match.group()
    if says.judge == "number":
        number = last_number(text)
        return None if number is None else f"{number:f}"
    return text or None


def judged(says: TaskFile, text: str, answer: str) -> tuple[str | None, float]:
    """Return what is read in a generated text, and its score, from 0 to 1.

    Args:
        says: The task.
        text: What a model said.
        answer: What is right.
    """
    found = read_answer(says, text.split("### Response:")[0].strip())
    if found is None:
        return None, 0.0
    if says.judge == "number":
        return found, float(last_number(found) == last_number(answer))
    if says.judge == "exact":
        return found, float(normalized(found) == normalized(answer))
    if says.judge == "contains":
        return found, float(f" {normalized(answer)} " in f" {normalized(found)} ")
    if says.judge == "f1":
        return found, token_f1(found, answer)
    if says.judge == "rouge-l":
        return found, rouge_l(found, answer)
    return found, float(found == answer)


def refuse_unreadable(says: TaskFile, answer: str, where: str) -> None:
    """Refuse a right answer in which a judge finds nothing to compare with.

    Raises:
        InputError: naming the row.
    """
    if says.judge == "number" and last_number(answer) is None:
        raise InputError(f"{where}: its answer {answer!r} has no number in it")
    if says.judge == "rouge-l" and not re.search("[a-z0-9]", answer.lower()):
        raise InputError(
            f"{where}: judge rouge-l reads the letters a to z and digits alone, of which its "
            f"answer {answer!r} has none"
        )
    if says.judge in ("exact", "contains", "f1") and not normalized(answer):
        raise InputError(
            f"{where}: nothing of its answer {answer!r} is left without articles and punctuation, "
            f"which judge {says.judge} leaves out; judge pattern compares as it stands"
        )


def normalized(text: str) -> str:
    """Return a text in lower case, without punctuation and a, an, the, its words one space apart.

    Source: ``normalize_answer`` of SQuAD's evaluation, version 1.1 (Rajpurkar et al. 2016),
    https://github.com/huggingface/evaluate/blob/main/metrics/squad/compute_score.py
    """
    bare = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def token_f1(text: str, answer: str) -> float:
    """Return the harmonic mean of precision and recall of words, each counted as often as it is.

    Source: ``f1_score`` of SQuAD's evaluation, version 1.1; see :func:`normalized`.
    """
    words, right = normalized(text).split(), normalized(answer).split()
    shared = sum((Counter(words) & Counter(right)).values())
    return 2 * shared / (len(words) + len(right)) if shared else 0.0


def rouge_l(text: str, answer: str) -> float:
    """Return the F-measure of the longest common subsequence of words, without a stemmer.

    Source: ROUGE-L of a whole text (Lin 2004), as the package ``rouge-score`` computes it, whose
    words are of a to z and digits, https://github.com/google-research/google-research/tree/master/rouge
    """
    return float(_rouge().score(answer, text)["rougeL"].fmeasure)


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


def refuse_no_rouge(says: TaskFile) -> None:
    """Refuse a judge whose package is absent.

    Raises:
        InputError: saying how to get it.
    """
    if says.judge == "rouge-l" and find_spec("rouge_score") is None:
        raise InputError(
            f"{says.name}: judge rouge-l needs the package rouge-score: "
            "pip install 'san-llm[rouge]'"
        )


def last_number(text: str) -> Decimal | None:
    """Return the last number in a text, or None: 1,000 and $1000.00 are the same one.

    It is how GSM8K's answers are commonly read, "#### 1,000" and free texts alike: the filter
    ``flexible-extract`` of lm-evaluation-harness, without its matches that are no numbers,
    https://github.com/EleutherAI/lm-evaluation-harness/blob/main/lm_eval/tasks/gsm8k/gsm8k.yaml
    """
    found = _NUMBER.findall(text)
    return Decimal(re.sub(r"[$,\s]", "", found[-1])) if found else None
