"""What a study will take: runs, hours, gigabytes, told before anything is run."""

from __future__ import annotations

from dataclasses import dataclass

from san_llm.errors import InputError
from san_llm.models.tuners import PARTLY_MERGED
from san_llm.plan.request import find_device
from san_llm.plan.run import make_plan
from san_llm.recipe.schema import PeftMethod, check_learnable
from san_llm.study.grid import Grid

STATES = 4  # a number that is trained is kept four times in a checkpoint: AdamW's two, and a best


@dataclass(frozen=True)
class VariantPlan:
    """What a variant will take.

    Attributes:
        variant: Its name.
        trained: Trained numbers.
        runs: How many runs it can come to.
        done: How many are there.
        seconds: What a run takes, by those that are there; None before the first.
        memory: Bytes that a run needs at its peak, as ``san-llm plan`` tells.
        disk: Bytes that a run leaves.
        note: What else is to be known of its method.
    """

    variant: str
    trained: int
    runs: int
    done: int
    seconds: float | None
    memory: int
    disk: int
    note: str | None = None


@dataclass(frozen=True)
class StudyPlan:
    """What a study will take.

    Attributes:
        variants: Each variant, in the file's order.
        at_once: How many runs go on at once.
    """

    variants: tuple[VariantPlan, ...]
    at_once: int

    @property
    def runs(self) -> int:
        """How many runs it can come to."""
        return sum(one.runs for one in self.variants)

    @property
    def done(self) -> int:
        """How many of them are there."""
        return sum(one.done for one in self.variants)

    @property
    def hours(self) -> float | None:
        """What the runs that are left take, so many at once; None before the first has ended.

        A variant of which none has ended is taken to need as long as the slowest that has.
        """
        known = [one.seconds for one in self.variants if one.seconds is not None]
        if not known:
            return None
        left = sum(
            (one.runs - one.done) * (max(known) if one.seconds is None else one.seconds)
            for one in self.variants
        )
        return left / 3600 / self.at_once

    @property
    def memory(self) -> int:
        """Bytes that the largest runs need at once."""
        return max(one.memory for one in self.variants) * self.at_once

    @property
    def disk(self) -> int:
        """Bytes that all runs leave."""
        return sum(one.disk * one.runs for one in self.variants)


def plan_study(grid: Grid, at_once: int) -> StudyPlan:
    """Return what a study will take, from config files and finished runs; no weight is read.

    Raises:
        InputError: when a variant cannot be trained, naming it.
    """
    return StudyPlan(tuple(_plan(grid, name) for name in grid.study.variants), at_once)


def _plan(grid: Grid, variant: str) -> VariantPlan:
    recipe = grid.cell(variant, None, grid.study.sweep_seed).recipe
    try:
        check_learnable(recipe)
        told = make_plan(recipe, set(), find_device(None))
    except InputError as error:
        raise InputError(f"variants.{variant}: {error}") from None
    ended = grid.of(variant)
    times = [trial.seconds for trial in ended if trial.seconds is not None]
    method = recipe.method
    checkpoints = recipe.training.keep_checkpoints + 1
    return VariantPlan(
        variant=variant,
        trained=sum(told.trained.values()),
        runs=grid.runs_at_most(variant),
        done=len(ended),
        seconds=sum(times) / len(times) if times else None,
        memory=next(iter(told.memory.values())).total,
        disk=told.adapter_bytes * (1 + STATES * checkpoints),
        note=PARTLY_MERGED.get(method.peft_type) if isinstance(method, PeftMethod) else None,
    )
