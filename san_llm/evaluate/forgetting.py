"""What training made a model forget: how much less well than its base it says a neutral text.

The text is English that no training here is about, see ``protocol/neutral.md``, in chunks of about
a thousand characters. The rise of the loss is paired: the same chunks, with training and without.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from san_llm.errors import InputError
from san_llm.evaluate.differences import Difference, loss_difference
from san_llm.evaluate.score import Judged, ratio_of_sums
from san_llm.models.locate import FoundBase, find_base
from san_llm.models.subject import Subject
from san_llm.progress import say
from san_llm.recipe.task_file import FORGETTING
from san_llm.runs.record import Forgetting, read_merge_manifest


def forgotten(rows: Sequence[Judged]) -> Forgetting | None:
    """Return the rise of the loss on the neutral text; None where no base was asked."""
    pairs = [
        (row.base_loss, row.loss, row.tokens)
        for row in rows
        if row.task == FORGETTING
        if row.base_loss is not None and row.loss is not None and row.tokens is not None
    ]
    if not pairs:
        return None
    before = [(loss, tokens) for loss, _, tokens in pairs]
    after = [(loss, tokens) for _, loss, tokens in pairs]
    change: Difference = loss_difference(FORGETTING, before, after)
    _, base, error = ratio_of_sums(before)
    return Forgetting(
        rise=change.difference,
        low=change.low,
        high=change.high,
        p=change.p,
        base_loss=base,
        base_standard_error=error,
    )


def merged_over(subject: Subject) -> FoundBase | None:
    """Return the base that a model alone was merged over; None of one that is no merge's, or gone.

    It is computed with as the model is.
    """
    if subject.adapter is not None or subject.run is not None:
        return None
    merge = read_merge_manifest(Path(subject.base.model))
    if merge is None or not merge.base:
        return None
    base = subject.base.model_copy(update={"model": merge.base, "revision": None})
    try:
        return find_base(base)
    except InputError:
        say(f"its base {merge.base} is not here: what it forgot is not told, its own loss is")
        return None
