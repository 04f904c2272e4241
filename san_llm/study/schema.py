"""A study as its file says it: a recipe, its variants, the rates to choose from, the seeds.

Reading one imports no torch. What is wrong in a variant is told as it would be of a recipe.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from san_llm.errors import did_you_mean
from san_llm.recipe.read import load_recipe
from san_llm.recipe.schema import Recipe, Section
from san_llm.recipe.shipped import find_recipe

_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Protocol = Literal["generate", "loglik"]
Rate = Annotated[float, Field(gt=0, lt=1)]


class Changes(Section):
    """Keys of a recipe with other values, by section."""

    base: dict[str, Any] = Field(default={}, description="keys of the recipe's base, changed")
    method: dict[str, Any] = Field(default={}, description="likewise of its method")
    data: dict[str, Any] = Field(default={}, description="likewise of its data")
    training: dict[str, Any] = Field(default={}, description="likewise of its training")

    @property
    def overrides(self) -> list[str]:
        """The changes as ``key=value`` arguments of a recipe."""
        sections = {name: getattr(self, name) for name in ("base", "method", "data", "training")}
        return [
            f"{section}.{key}={json.dumps(value)}"
            for section, keys in sections.items()
            for key, value in keys.items()
        ]


class Variant(Changes):
    """What is trained in place of the recipe's method; other sections may be changed, too."""

    rates: tuple[Rate, ...] | None = Field(
        default=None,
        description="learning rates to choose from, by the held-out loss at the sweep's seed; "
        "without them the recipe's own is taken",
    )

    @field_validator("rates")
    @classmethod
    def _some(cls, rates: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if rates is not None and len(set(rates)) < 2:
            raise ValueError(
                "one rate is no choice: give two or more, or training.learning_rate alone"
            )
        if rates is not None and len(set(rates)) < len(rates):
            raise ValueError(f"a rate is there twice: {', '.join(map(str, rates))}")
        return None if rates is None else tuple(sorted(rates))


class Sweep(Section):
    """How a variant's learning rate is chosen: on the held-out rows, never on a task's."""

    seed: int | None = Field(
        default=None, ge=0, lt=2**32, description="of the runs to choose by; default: the first"
    )
    widen: int = Field(
        default=1,
        ge=0,
        le=10,
        description="rates added beyond the outermost while that is the best, a step further each",
    )
    refine: float | None = Field(
        default=1.7,
        gt=1,
        le=10,
        description="then one this factor below the best and one above; null adds none",
    )


class Study(Section):
    """All of a study. ``name`` is the file's stem unless the file says otherwise."""

    name: _Name
    recipe: str = Field(min_length=1, description="a recipe file, or the name of a shipped one")
    common: Changes = Field(
        default_factory=lambda: Changes(),
        description="keys of the recipe, changed for all variants",
    )
    variants: dict[_Name, Variant] = Field(
        min_length=2, description="what is compared, by the names that tables show"
    )
    baseline: str = Field(description="the variant that all others are compared with")
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field(
        min_length=2,
        description="each variant is trained with each, at its best rate; a seed decides the order "
        "of rows and low-rank starts, alike for all variants",
    )
    sweep: Sweep = Sweep()
    protocol: Protocol = Field(
        default="generate", description="how the eight tasks are asked: generate or loglik"
    )

    @field_validator("seeds")
    @classmethod
    def _once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"a seed is there twice: {', '.join(map(str, seeds))}")
        return seeds

    @model_validator(mode="after")
    def _has_its_baseline(self) -> Study:
        if self.baseline not in self.variants:
            names = list(self.variants)
            raise ValueError(
                f"baseline: {self.baseline!r} is none of the variants {', '.join(names)}"
                f"{did_you_mean(self.baseline, names)}"
            )
        return self

    @property
    def sweep_seed(self) -> int:
        """The seed of the runs by which rates are chosen."""
        return self.seeds[0] if self.sweep.seed is None else self.sweep.seed


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        variant: The variant's name.
        rate: The learning rate.
        seed: The seed.
        recipe: What is trained.
    """

    variant: str
    rate: float
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        """The run's folder, where none is there yet."""
        return f"{self.variant}-{self.rate:g}-seed{self.seed}"


def recipe_of(study: Study, variant: str, rate: float | None = None, seed: int = 0) -> Recipe:
    """Return what a variant trains.

    Args:
        study: The study.
        variant: The variant's name.
        rate: The learning rate; None: the recipe's own.
        seed: The seed.

    Raises:
        InputError: naming what is wrong in it.
    """
    file = find_recipe(study.recipe)
    changes = (study.common, study.variants[variant])
    overrides = [line for change in changes for line in change.overrides]
    overrides.append(f"training.seed={seed}")
    if rate is not None:
        overrides.append(f"training.learning_rate={rate!r}")
    return load_recipe(file, overrides)


def cell(study: Study, variant: str, rate: float | None, seed: int) -> Cell:
    """Return a run of a study; a rate of None is the recipe's own."""
    recipe = recipe_of(study, variant, rate, seed)
    named = recipe.model_copy(update={"name": study.name})
    return Cell(variant, recipe.training.learning_rate, seed, named)
