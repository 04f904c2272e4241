"""What scoring choices costs: lm-evaluation-harness's ``HFLM``, and san-llm.

Both score the same choices with the same tuned model in one process, in turn, and what they choose
is compared. ``answers`` are the protocol's ("the correct answer is answer1"), ``texts`` the rows'
own choices after the protocol's prompt, ``short`` the same after "Question: ... Answer:", as the
harness's own tasks ask.

``python benchmarks/loglik.py --data DIR`` (a folder in the LLM-Adapters layout; else the pocket
set)
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from pairs import columns, ratios, times
from ruled import arguments, test_rows, tuned_adapter, write_answered

from san_llm.ask.likelihood import ChoiceQuestion, score_choices
from san_llm.models.adapter import load_adapter
from san_llm.models.load import load_base
from san_llm.models.locate import find_base
from san_llm.models.tokenizer import load_tokenizer
from san_llm.protocol.prompts import evaluation_prompt
from san_llm.protocol.tasks import TASKS
from san_llm.recipe.schema import Base

KINDS = ("answers", "texts", "short")


def question_of(options: argparse.Namespace, task: str, instruction: str, kind: str) -> Any:
    """Return a row's question, or None where it offers no texts."""
    prompt = evaluation_prompt(options.prompt, instruction)
    names = [name for name in TASKS[task].answers if name in instruction.lower()]
    if kind == "answers":
        return ChoiceQuestion(prompt, tuple(f"the correct answer is {name}" for name in names))
    question_text, *rest = re.split(r"\s*\w+\d: ", instruction.split("\n\nAnswer format")[0])
    if not rest or not all(rest):
        return None
    if kind == "texts":
        return ChoiceQuestion(prompt, tuple(rest))
    return ChoiceQuestion(
        f"Question: {question_text.split('question: ')[-1].strip()}\nAnswer:",
        tuple(f" {text}" for text in rest),
    )


def measure(options: argparse.Namespace, task: str, kind: str) -> dict[str, Any] | None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    rows = test_rows(options.data, task, options.rows)
    offered = [question_of(options, task, row.instruction, kind) for row in rows]
    questions = [question for question in offered if question is not None]
    if not questions:
        return None
    adapter = tuned_adapter(
        options.model, options.data, options.tasks, options.steps, Path(options.work)
    )
    base = Base(model=options.model, dtype=options.dtype)
    tokenizer = load_tokenizer(find_base(base))
    model = load_adapter(load_base(find_base(base)), adapter)
    peer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch, device="cpu")

    def harness() -> list[list[tuple[float, bool]]]:
        requests = [
            Instance("loglikelihood", {}, (question.prompt, choice), 0)
            for question in questions
            for choice in question.choices
        ]
        scores = iter(peer.loglikelihood(requests, disable_tqdm=True))
        return [[next(scores) for _ in question.choices] for question in questions]

    def ours() -> list[list[tuple[float, bool]]]:
        scored = score_choices(model, tokenizer, questions)
        return [[(score.logprob, score.greedy) for score in scores] for scores in scored]

    timed = times({"lm_eval": harness, "san-llm": ours}, options.pairs)
    theirs, own = timed["lm_eval"].output, timed["san-llm"].output

    def chosen(scores: list[list[tuple[float, bool]]], by_length: bool) -> list[int]:
        numbers = []
        for question, choices in zip(questions, scores, strict=True):
            values = [
                logprob / (len(text) if by_length else 1)
                for text, (logprob, _) in zip(question.choices, choices, strict=True)
            ]
            numbers.append(values.index(max(values)))
        return numbers

    def same(by_length: bool) -> int:
        pairs = zip(chosen(own, by_length), chosen(theirs, by_length), strict=True)
        return sum(a == b for a, b in pairs)

    differences = [
        abs(a - b)
        for own_scores, their_scores in zip(own, theirs, strict=True)
        for (a, _), (b, _) in zip(own_scores, their_scores, strict=True)
    ]
    return {
        "task": task,
        "choices": kind,
        "rows": len(questions),
        **ratios(timed["lm_eval"], timed["san-llm"]),
        "same_acc": same(False),
        "same_acc_norm": same(True),
        "largest_difference": max(differences),
        "chosen": sorted(set(chosen(own, False))),
    }


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], peer="lm_eval")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    for task in options.tasks:
        for kind in options.kinds:
            result = measure(options, task, kind)
            if result is not None:
                results.append(result)
                print(json.dumps(result), file=sys.stderr)
    print(
        f"| task | choices | rows | {columns()} | same acc | same acc_norm | logprobs differ by |"
    )
    print("| --- | --- | --: | --: | --: | --: | --: | --: | --: | --: |")
    for result in results:
        print(
            f"| {result['task']} | {result['choices']} | {result['rows']} | {columns(result)} "
            f"| {result['same_acc']} | {result['same_acc_norm']} "
            f"| {result['largest_difference']:.0e} |"
        )
    write_answered(options, results)


if __name__ == "__main__":
    main()
