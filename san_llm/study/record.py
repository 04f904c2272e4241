"""What a study came to, as ``study.json`` has it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from san_llm.errors import InputError, first_mistake
from san_llm.files import read_json, write_json
from san_llm.study.statistics import Apart, Spread

STUDY = "study.json"
HELD_OUT = "held-out loss"  # the measure that is no task: rates are chosen by it


@dataclass(frozen=True)
class Measure:
    """What is compared.

    Attributes:
        name: What tables call it: a task's name, ``held-out loss`` or ``forgetting``.
        unit: ``share`` from 0 to 1, shown in percent; or ``nats`` a token.
        lower_is_better: Whether less is better.
        rows: How many rows it is taken over; None where rows are not kept.
        base: The base model's value; None where it is not known.
        guessing: What guessing would give; None where that is not known.
    """

    name: str
    unit: str
    lower_is_better: bool
    rows: int | None = None
    base: float | None = None
    guessing: float | None = None


@dataclass(frozen=True)
class VariantResult:
    """What a variant came to.

    Attributes:
        variant: Its name.
        trained: Trained numbers; None before its first run has ended.
        rate: Its learning rate; None before it is chosen, or where every run failed.
        curve: ``(rate, held-out loss a token)`` of the sweep; a loss of None: the run failed.
        seeds: The seeds whose runs are finished and measured.
        runs: Their folders, in that order.
        spreads: Each measure over these seeds, by its name.
        apart: How it differs from the baseline over the seeds that both have, by measure; of the
            baseline: none.
        seconds: Training time, over the seeds whose runs were not stopped.
        memory: The most bytes that one of its runs held.
        failed: Why runs failed, by the run's name.
    """

    variant: str
    trained: int | None
    rate: float | None
    curve: tuple[tuple[float, float | None], ...]
    seeds: tuple[int, ...] = ()
    runs: tuple[str, ...] = ()
    spreads: dict[str, Spread] = field(default_factory=dict)
    apart: dict[str, Apart] = field(default_factory=dict)
    seconds: Spread | None = None
    memory: int | None = None
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyResult:
    """What a study came to.

    Attributes:
        name: The study's name.
        made: When, as ISO 8601.
        versions: The versions of the packages.
        study: The study's file, resolved.
        recipe: The baseline's recipe, resolved.
        baseline: The variant that the others are compared with.
        seeds: The seeds asked for.
        complete: Whether every run and evaluation of the file is there.
        smallest_p: The smallest p that the exact test over so many seeds can reach.
        measures: What is compared.
        variants: Each variant, in the file's order.
    """

    name: str
    made: str
    versions: dict[str, str]
    study: dict[str, object]
    recipe: dict[str, object]
    baseline: str
    seeds: tuple[int, ...]
    complete: bool
    smallest_p: float
    measures: tuple[Measure, ...]
    variants: tuple[VariantResult, ...]

    def of(self, variant: str) -> VariantResult:
        """Return what a variant came to."""
        return next(one for one in self.variants if one.variant == variant)


def write_study(folder: Path, result: StudyResult) -> None:
    """Write what a study came to."""
    write_json(folder / STUDY, asdict(result))


def read_study_result(folder: Path) -> StudyResult:
    """Return what a study came to, read from its folder.

    Raises:
        InputError: when there is none, or it is damaged.
    """
    path = folder / STUDY
    if not path.is_file():
        raise InputError(f"{folder}: no {STUDY} in it; `san-llm study FILE.yaml` makes one")
    try:
        return TypeAdapter(StudyResult).validate_python(read_json(path))
    except ValidationError as error:
        raise InputError(f"{path}: {first_mistake(error)}") from None
