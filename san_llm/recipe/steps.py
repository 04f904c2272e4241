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


USUAL_DECAY = 0.2  # share of the steps


def rates_of(training: Training, steps: int) -> tuple[str, dict[str, float]]:
    """Return how transformers calls a run's schedule, and what it wants to know of it.

    Args:
        training: How it is learned.
        steps: Those of the run.
    """
    floor = training.rate_floor or 0.0
    if training.schedule == "warmup_stable_decay":
        share = USUAL_DECAY if training.decay_share is None else training.decay_share
        falling = min(ceil(share * steps), steps - warmup_of(training, steps))
        return training.schedule, {"num_decay_steps": max(falling, 0), "min_lr_ratio": floor}
    if training.schedule == "cosine" and floor:
        return "cosine_with_min_lr", {"min_lr_rate": floor}
    return training.schedule, {}
