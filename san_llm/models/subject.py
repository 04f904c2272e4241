"""What an evaluation or a merge is about: an adapter over its base, or a model alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from san_llm.errors import InputError, check_one_of
from san_llm.files import read_json
from san_llm.models.adapter import named_base
from san_llm.protocol.prompts import PromptStyle, prompt_style
from san_llm.recipe.schema import DTYPES, Base, Recipe
from san_llm.runs.folder import adapter_of, last_run, recipe_of, run_of

MERGE_MANIFEST = "merge_manifest.json"  # in a merged model's folder


@dataclass(frozen=True)
class Subject:
    """A model and what is known of its making.

    Attributes:
        base: The base model.
        adapter: The adapter's folder, or None for the base alone.
        run: The run that the adapter or base was found through, or None.
        recipe: That run's recipe.
    """

    base: Base
    adapter: Path | None
    run: Path | None
    recipe: Recipe | None

    @property
    def prompt(self) -> PromptStyle | None:
        """The prompt style it was trained in, as its run or its merge says, or None."""
        if self.recipe is not None:
            return self.recipe.data.prompt
        merged = Path(self.base.model) / MERGE_MANIFEST
        if self.adapter is not None or not merged.is_file():
            return None
        told = read_json(merged).get("prompt")
        return None if told is None else prompt_style(str(told))

    def __str__(self) -> str:
        """Return ``base`` or ``base + adapter``."""
        return f"{self.base.model} + {self.adapter}" if self.adapter else self.base.model


def find_subject(
    model: str | None = None,
    adapter: Path | None = None,
    base_only: bool = False,
    dtype: str | None = None,
) -> Subject:
    """Return what the options name; by default the last run's adapter over its base.

    Args:
        model: A base, or a model of its own when no adapter is named.
        adapter: An adapter's folder, or its run's.
        base_only: Leave the adapter of the last run out.
        dtype: Instead of the base's.

    Raises:
        InputError: when the options contradict each other or name nothing.
    """
    if dtype is not None:
        check_one_of("--dtype", dtype, DTYPES)
        subject = find_subject(model, adapter, base_only)
        return replace(subject, base=subject.base.model_copy(update={"dtype": dtype}))
    if base_only and adapter is not None:
        raise InputError("--base-only and --adapter exclude each other")
    if adapter is None and model is not None:
        return Subject(Base(model=model, dtype="float32"), None, None, None)
    if adapter is None:
        run = last_run()
        recipe = recipe_of(run)
        return Subject(recipe.base, None if base_only else adapter_of(run), run, recipe)
    if (adapter / "recipe.yaml").is_file():  # a run's folder instead of its adapter's
        adapter = adapter_of(adapter)
    owner = run_of(adapter)
    recipe_or_none = recipe_of(owner) if owner else None
    if recipe_or_none is not None and model is None:
        base = recipe_or_none.base
    else:
        base = Base(model=model or named_base(adapter), dtype="float32")
    return Subject(base, adapter, owner, recipe_or_none)
