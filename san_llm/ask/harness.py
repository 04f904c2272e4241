"""What lm-evaluation-harness itself measures: of the eight for comparison, and its own tasks.

Each of the eight is given to ``lm_eval`` as a ``multiple_choice`` task of its own: the prompt as it
is, the choices directly behind it, nothing shuffled, no examples. It asks for no network.

Its own tasks are asked as it asks them, in the frame of the training: a chat template by its own
``apply_chat_template``, a style of instructions through the same door.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from san_llm.ask.answers import end_tokens, without_habits
from san_llm.ask.likelihood import ChoiceQuestion, ChoiceScore
from san_llm.errors import SanError, first_line
from san_llm.progress import say, silenced
from san_llm.protocol.prompts import Frame, evaluation_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


TASK = "san_llm"


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
    with silenced("lm_eval"), _alone():
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


Samples = dict[str, dict[int, Mapping[str, Any]]]


def ask_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    task: Any,
    rows: int,
    style: Frame,
    batch_size: int,
) -> Samples:
    """Return rows of one of lm_eval's own tasks, as it has judged them: by filter and number.

    Args:
        model: A causal LM, in eval mode.
        tokenizer: The model's tokenizer.
        task: The task, as lm_eval has made it.
        rows: How many of its first rows.
        style: What stands around what lm_eval asks.
        batch_size: Texts at once.

    Raises:
        SanError: when lm_eval cannot ask it.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    name = task.task_name
    ends = end_tokens(model, tokenizer, chat=style == "chat")
    try:
        with silenced("lm_eval"), _alone(), without_habits(model, ends):
            lm: Any = HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                softmax_dtype="float32",
            )
            if style not in ("chat", "none"):
                lm.apply_chat_template = partial(_instructed, style)
            evaluated: Any = simple_evaluate(
                model=lm,
                tasks=[task],
                limit=rows,
                task_manager=TaskManager(include_defaults=False),
                bootstrap_iters=0,
                apply_chat_template=style != "none",
                fewshot_as_multiturn=style == "chat",
            )
    except Exception as error:  # of a task's own templates and functions
        raise SanError(f"{name}: lm_eval cannot ask it: {first_line(error)}") from error
    found: Samples = {}
    for sample in evaluated["samples"][name]:
        found.setdefault(sample["filter"], {})[sample["doc_id"]] = sample
    _tell_cut(name, lm, next(iter(found.values())).values())
    return found


def _instructed(
    style: Frame, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
) -> str:
    """Return what lm_eval would say in turns as an instruction, and what its answer begins with."""
    begun = "" if add_generation_prompt else chat_history[-1]["content"]
    asked = chat_history if add_generation_prompt else chat_history[:-1]
    return evaluation_prompt(style, "\n\n".join(turn["content"] for turn in asked)) + begun


def _tell_cut(name: str, lm: Any, samples: Iterable[Mapping[str, Any]]) -> None:
    """Say of how many rows lm_eval has cut the beginning away, to fit the model's context."""
    most, cut = lm.max_length, 0
    for sample in samples:
        context, told = sample["arguments"][0][:2]
        room = lm.max_gen_toks if isinstance(told, dict) else 0
        new = told.get("max_gen_toks", room) if isinstance(told, dict) else 0
        if len(context.encode()) + new > most:
            cut += len(lm.tok_encode(context)) + new > most
    if cut:
        say(
            f"warning: {name}: {cut:,} rows are longer than the model's context of {most:,}, and "
            "were asked without their beginning, as lm_eval does it"
        )


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
