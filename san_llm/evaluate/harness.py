"""The same choices scored by lm-evaluation-harness itself, for comparison with others' numbers.

Each task is given to ``lm_eval`` as a ``multiple_choice`` task of its own: the prompt as it is, the
choices directly behind it, nothing shuffled, no examples. It asks for no network.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from san_llm.ask.likelihood import ChoiceQuestion, ChoiceScore
from san_llm.errors import InputError, SanError, debugging

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


TASK = "san_llm"


def check_installed() -> None:
    """Refuse where the package is absent.

    Raises:
        InputError: saying how to get it.
    """
    if find_spec("lm_eval") is None:
        raise InputError(
            "--protocol lm-eval needs the package lm_eval: pip install 'san-llm[lm-eval]'"
        )


def score_with_lm_eval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[ChoiceQuestion],
    right: Sequence[int],
    batch_size: int,
) -> list[list[ChoiceScore]]:
    """Return the scores of every question's choices, as ``score_choices`` does, by ``lm_eval``.

    Args:
        model: A causal LM, in eval mode.
        tokenizer: The model's tokenizer.
        questions: The questions, each with its choices.
        right: The number of each question's right choice.
        batch_size: Texts at once.

    Raises:
        SanError: when ``lm_eval`` finds other rows right than its own log-probabilities say.
    """
    from datasets import Dataset
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = [
        {"prompt": question.prompt, "choices": list(question.choices), "right": answer}
        for question, answer in zip(questions, right, strict=True)
    ]
    config: dict[str, Any] = {
        "task": TASK,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "right",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    with _quiet(), _alone():
        evaluated: Any = simple_evaluate(
            model=HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                softmax_dtype="float32",
            ),
            tasks=[config],
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
        )
    scores: list[list[ChoiceScore]] = [[] for _ in questions]
    for sample in evaluated["samples"][TASK]:
        number = sample["doc_id"]
        scores[number] = [
            ChoiceScore(logprob, greedy, len(text))
            for (logprob, greedy), text in zip(
                sample["filtered_resps"], questions[number].choices, strict=True
            )
        ]
        for metric, value in (("acc", _logprob), ("acc_norm", _logprob_norm)):
            best = scores[number].index(max(scores[number], key=value))
            if (best == right[number]) != bool(sample[metric]):
                raise SanError(f"lm_eval's {metric} of a row is not that of its log-probabilities")
    return scores


def _logprob(score: ChoiceScore) -> float:
    return score.logprob


def _logprob_norm(score: ChoiceScore) -> float:
    return score.logprob / score.length


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Hide the other processes from ``lm_eval``: each has its own rows, and needs their scores."""
    local_rank = os.environ.pop("LOCAL_RANK", None)
    try:
        yield
    finally:
        if local_rank is not None:
            os.environ["LOCAL_RANK"] = local_rank


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the bars and notices of ``lm_eval``, and of what it starts, out of ours."""
    if debugging():
        yield
        return
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        logger.setLevel(level)
