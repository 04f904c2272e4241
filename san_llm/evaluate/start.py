"""Where an evaluation begins: in this process, or in several that a launcher starts."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from san_llm.errors import InputError
from san_llm.evaluate.request import EvalRequest, check_request
from san_llm.launch.command import Ended, accelerate_command, run_launched
from san_llm.launch.devices import check_alone, let_memory_grow, tell_devices
from san_llm.launch.processes import is_first, world_size
from san_llm.models.cards import add_scores
from san_llm.models.subject import Subject
from san_llm.progress import say

if TYPE_CHECKING:
    from san_llm.evaluate.table import EvalResult


def start(request: EvalRequest) -> Ended[EvalResult]:
    """Evaluate, in this process or in several that are launched for it; return how it ended.

    Raises:
        InputError: when something that was asked for cannot be right.
        SanError: when the evaluation fails.
    """
    check_alone("eval")
    let_memory_grow()
    task = check_request(request)
    launched = "WORLD_SIZE" in os.environ
    try:
        if (request.processes or 1) > 1 and not launched:
            command = accelerate_command(sys.argv[1:], request.processes, None)
            return Ended(1 if run_launched([*command, "--output", str(task.output)]) else 0)
        from san_llm.evaluate.run import evaluate

        if not launched:
            tell_devices("eval")
        result = evaluate(task)
    except KeyboardInterrupt:
        if is_first() and not (launched and world_size() > 1):
            say("the same command goes on with the rows that are not answered yet")
        raise
    if result is not None:
        _into_card(task.subject, result)
    return Ended(0, result)


def _into_card(subject: Subject, result: EvalResult) -> None:
    if subject.trained is None or subject.recipe is None:
        return
    try:
        add_scores(subject.trained, subject.recipe.name, result.results)
    except InputError as error:  # a card of somebody's own; the evaluation stands
        say(f"scores are not put into the card: {error}")
