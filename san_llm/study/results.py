"""What a study came to: each variant's measures over seeds, and how far it is from the baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from san_llm.recipe.task_file import FORGETTING
from san_llm.runs.record import manifest
from san_llm.study.evaluations import Asked, find_evaluation, measures_of, row_values
from san_llm.study.found import Trial
from san_llm.study.grid import Curve, Grid
from san_llm.study.record import HELD_OUT, Measure, StudyResult, VariantResult
from san_llm.study.statistics import Apart, apart, smallest_p, spread

if TYPE_CHECKING:
    import numpy as np

    Rows = Mapping[str, np.ndarray]  # a measure's numbers by row


@dataclass(frozen=True)
class Measured:
    """A run that is finished and evaluated.

    Attributes:
        trial: The run.
        values: Each measure's value.
        rows: Its numbers by row, of the measures that keep them.
    """

    trial: Trial
    values: dict[str, float]
    rows: Rows


def results_of(grid: Grid, asked: Asked) -> StudyResult:
    """Return what a study came to, as far as its runs and evaluations are there."""
    study = grid.study
    base = _base_rows(grid, asked)
    measured = {name: _measured(grid, name, asked) for name in study.variants}
    measures = [Measure(HELD_OUT, "nats", lower_is_better=True)]
    measures += [_with_base(measure, base) for measure in measures_of(asked)]
    measures = [
        m
        for m in measures
        if any(m.name in one.values for v in measured.values() for one in v.values())
    ]
    against = measured[study.baseline]
    differences = {m.name: _apart(m.name, measured, study.baseline) for m in measures}
    about = manifest()
    recipe = grid.cell(study.baseline, None, study.sweep_seed).recipe
    return StudyResult(
        name=study.name,
        made=about["made"],
        versions=about["versions"],
        study=study.model_dump(mode="json"),
        recipe=recipe.model_dump(mode="json"),
        baseline=study.baseline,
        seeds=study.seeds,
        complete=all(
            len(of) + len(_failed_seeds(grid, name)) == len(study.seeds)
            for name, of in measured.items()
        ),
        smallest_p=smallest_p(max(1, len(against))),
        measures=tuple(measures),
        variants=tuple(
            _result(
                grid, name, of, {m: told[name] for m, told in differences.items() if name in told}
            )
            for name, of in measured.items()
        ),
    )


def _base_rows(grid: Grid, asked: Asked) -> Rows:
    for run in grid.measured_runs():
        folder = find_evaluation(run, asked, of_base=True)
        if folder is not None:
            return row_values(folder)
    return {}


def _measured(grid: Grid, variant: str, asked: Asked) -> dict[int, Measured]:
    """Return a variant's finished and evaluated runs by seed."""
    found = {}
    for cell in grid.seeds(variant):
        trial = grid.trial(cell)
        if trial is None or trial.state != "finished":
            continue
        rows: Rows = {}
        if asked.names:
            folder = find_evaluation(trial.place, asked)
            if folder is None:
                continue
            rows = row_values(folder)
        values = {name: float(numbers.mean()) for name, numbers in rows.items()}
        found[cell.seed] = Measured(trial, {HELD_OUT: trial.loss} | values, rows)
    return found


def _with_base(measure: Measure, base: Rows) -> Measure:
    """Return a measure with the base's value; forgetting is counted from there."""
    if measure.name == FORGETTING:
        return replace(measure, base=0.0)
    return (
        replace(measure, base=float(base[measure.name].mean())) if measure.name in base else measure
    )


def _apart(
    measure: str, measured: Mapping[str, Mapping[int, Measured]], baseline: str
) -> dict[str, Apart]:
    """Return how each variant differs from the baseline, over the seeds that both have."""
    import numpy as np

    against = measured[baseline]
    names, pairs = [], []
    for name, of in measured.items():
        seeds = [seed for seed in of if seed in against]
        if name == baseline or not seeds or measure not in of[seeds[0]].values:
            continue
        by_seed = [of[seed].values[measure] - against[seed].values[measure] for seed in seeds]
        by_row = None
        if measure in of[seeds[0]].rows:
            apart_by_row = [of[s].rows[measure] - against[s].rows[measure] for s in seeds]
            by_row = np.mean(apart_by_row, axis=0)
        names.append(name)
        pairs.append((by_seed, by_row))
    return dict(zip(names, apart(pairs), strict=True))


def _failed_seeds(grid: Grid, variant: str) -> list[Trial]:
    trials = (grid.trial(cell) for cell in grid.seeds(variant))
    return [trial for trial in trials if trial and trial.state == "failed"]


def _result(
    grid: Grid, variant: str, of: Mapping[int, Measured], differences: dict[str, Apart]
) -> VariantResult:
    curve: Curve = grid.curve(variant)
    ended = grid.of(variant)
    metrics = [trial.metrics for trial in ended if trial.metrics is not None]
    times = [one.trial.seconds for one in of.values() if one.trial.seconds is not None]
    peaks = [told.peak_memory for told in metrics if told.peak_memory]
    names = next((list(one.values) for one in of.values()), [])
    return VariantResult(
        variant=variant,
        trained=metrics[0].trained_numbers if metrics else None,
        rate=curve.best,
        curve=tuple(
            (rate, loss if math.isfinite(loss) else None)
            for rate, loss in sorted(curve.losses.items())
        ),
        seeds=tuple(of),
        runs=tuple(str(one.trial.place) for one in of.values()),
        spreads={name: spread([one.values[name] for one in of.values()]) for name in names},
        apart=differences,
        seconds=spread(times) if times else None,
        memory=max(peaks, default=None),
        failed={trial.place.stem: trial.reason or "" for trial in ended if trial.state == "failed"},
    )
