"""The runs of a study: which there can be, which are due now, and what each variant came to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from san_llm.study.found import Inputs, Trial, find_trial, is_of
from san_llm.study.rates import best_rate, next_rates
from san_llm.study.schema import Cell, Study, cell


@dataclass(frozen=True)
class Curve:
    """The held-out losses of a variant's rates, at the seed of the sweep.

    Attributes:
        losses: The loss a token by rate, of those tried; infinite where a run failed.
        missing: The rates that are still to be tried; none where the choice is made.
        own: The recipe's rate, where there are none to choose from.
    """

    losses: dict[float, float]
    missing: tuple[float, ...] = ()
    own: float | None = None

    @property
    def best(self) -> float | None:
        """The chosen rate; None while one is missing, or where every run failed."""
        if self.own is not None:
            return self.own
        if self.missing or not self.losses:
            return None
        best = best_rate(self.losses)
        return best if math.isfinite(self.losses[best]) else None


class Grid:
    """A study's runs, as they stand."""

    def __init__(self, study: Study, trials: Sequence[Trial], inputs: Inputs) -> None:
        self.study, self.trials, self._inputs = study, trials, inputs
        self.cell = cache(lambda variant, rate, seed: cell(study, variant, rate, seed))
        self.curve = cache(self._curve)

    def trial(self, one: Cell) -> Trial | None:
        """Return the run of a cell, if it is there."""
        return find_trial(one, self.trials, self._inputs)

    def is_of(self, trial: Trial, one: Cell) -> bool:
        """Return whether a run is that of a cell."""
        return is_of(trial, one, self._inputs)

    def _curve(self, variant: str) -> Curve:
        """Return what is known of a variant's rates."""
        study = self.study
        given = study.variants[variant].rates
        if given is None:
            return Curve({}, own=self.cell(variant, None, study.sweep_seed).rate)
        losses = {}
        for rate in sorted({trial.recipe.training.learning_rate for trial in self.trials}):
            trial = self.trial(self.cell(variant, rate, study.sweep_seed))
            if trial is not None and trial.state in ("finished", "failed"):
                losses[rate] = trial.loss
        return Curve(losses, tuple(next_rates(given, study.sweep, losses)))

    def seeds(self, variant: str) -> list[Cell]:
        """Return the runs of a variant at its rate, one a seed; none before it is chosen."""
        best = self.curve(variant).best
        return [] if best is None else [self.cell(variant, best, s) for s in self.study.seeds]

    def due(self) -> list[Cell]:
        """Return the runs that can be begun or gone on with now, in the order of their worth.

        All variants' rates first, the first of each before the second of any; then seed by seed.
        """
        ranked: list[tuple[int, Cell]] = []
        for variant in self.study.variants:
            curve = self.curve(variant)
            sweep = [self.cell(variant, rate, self.study.sweep_seed) for rate in curve.missing]
            ranked += enumerate(sweep)
            ranked += enumerate(self.seeds(variant), start=1000)
        ranked.sort(key=lambda pair: pair[0])
        cells = [one for _, one in ranked]
        return [one for one in cells if self._is_open(self.trial(one))]

    @staticmethod
    def _is_open(trial: Trial | None) -> bool:
        return trial is None or trial.state == "begun"

    def of(self, variant: str) -> list[Trial]:
        """Return a variant's runs that have ended, at whatever rate and seed of the study."""
        ended = []
        for trial in self.trials:
            training = trial.recipe.training
            one = self.cell(variant, training.learning_rate, training.seed)
            if trial.state in ("finished", "failed") and self.is_of(trial, one):
                ended.append(trial)
        return ended

    def measured_runs(self) -> list[Path]:
        """Return the folders of the runs that variants are compared by, those that are finished."""
        cells = [one for variant in self.study.variants for one in self.seeds(variant)]
        trials = (self.trial(one) for one in cells)
        return [trial.place for trial in trials if trial and trial.state == "finished"]

    def runs_at_most(self, variant: str) -> int:
        """Return how many runs a variant can come to."""
        study, rates = self.study, self.study.variants[variant].rates
        if rates is None:
            return len(study.seeds)
        sweep = len(rates) + study.sweep.widen + (0 if study.sweep.refine is None else 2)
        return sweep + len(set(study.seeds) - {study.sweep_seed})
