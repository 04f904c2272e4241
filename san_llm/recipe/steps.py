"""How many steps a recipe comes to, and in how many of them the rate rises."""

from __future__ import annotations

from math import ceil

from san_llm.recipe.schema import Training


def steps_of(training: Training, rows: int) -> int:
    """Return the optimizer steps of a run, as Trainer counts them.

    Args:
        training: How it is learned.
        rows: Rows that are trained on.
    """
    return training.max_steps or ceil(training.epochs * ceil(rows / training.batch_size))


def warmup_of(training: Training, steps: int) -> int:
    """Return in how many of a run's steps the rate rises from 0."""
    if training.warmup_steps is not None:
        return training.warmup_steps
    return ceil((training.warmup_share or 0) * steps)
