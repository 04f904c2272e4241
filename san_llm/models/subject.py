"""What an evaluation or a merge is about: an adapter over its base, or a model alone."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from san_llm.errors import InputError, check_one_of
from san_llm.launch.devices import gpus
from san_llm.models.adapter import named_base
from san_llm.models.locate import find_base
from san_llm.progress import say
from san_llm.protocol.prompts import PromptStyle, prompt_style
from san_llm.recipe.schema import DTYPES, Base, Recipe, check_date
from san_llm.runs.folder import (
    MODEL,
    adapter_of,
    is_its_model,
    last_run,
    product_of,
    recipe_of,
    run_of,
)
from san_llm.runs.record import ADAPTER_CONFIG, read_merge_manifest


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
    def whole(self) -> Path | None:
        """The folder of the model that its run trained whole, if that is what is meant."""
        if self.run is None or not is_its_model(self.base.model, self.run):
            return None
        return Path(self.base.model)

    @property
    def trained(self) -> Path | None:
        """The folder of what training has made: the adapter, or the whole model; None without."""
        return self.adapter or self.whole

    @property
    def prompt(self) -> PromptStyle | None:
        """The prompt style it was trained in, as its run or its merge says, or None."""
        if self.recipe is not None:
            return self.recipe.data.prompt
        merge = read_merge_manifest(Path(self.base.model)) if self.adapter is None else None
        return None if merge is None or merge.prompt is None else prompt_style(merge.prompt)

    @property
    def bases_template(self) -> bool:
        """Whether chats are written as the base writes them: it learned another frame than chats.

        Which its adapter has for a chat template, so that others ask it rightly; here the prompt
        style says that frame, and ``chat`` is the base's, as for the base that it is compared with.
        """
        return self.adapter is not None and self.prompt not in (None, "chat")

    @property
    def date(self) -> str | None:
        """The date that its chat template wrote in training, as its run or its merge says."""
        if self.recipe is not None:
            return self.recipe.data.date
        merge = read_merge_manifest(Path(self.base.model)) if self.adapter is None else None
        return None if merge is None else merge.date

    def __str__(self) -> str:
        """Return ``base`` or ``base + adapter``."""
        return f"{self.base.model} + {self.adapter}" if self.adapter else self.base.model


def find_subject(
    model: str | None = None,
    adapter: Path | None = None,
    base_only: bool = False,
    dtype: str | None = None,
    run: Path | None = None,
) -> Subject:
    """Return what the options name; by default the last run's adapter over its base.

    Args:
        model: A base, or a model of its own when no adapter is named.
        adapter: An adapter's folder, or its run's.
        base_only: Leave the adapter of the run out.
        dtype: Instead of the base's.
        run: A run's folder, or an adapter's.

    Raises:
        InputError: when the options contradict each other or name nothing.
    """
    if dtype is not None:
        check_one_of("--dtype", dtype, DTYPES)
        subject = find_subject(model, adapter, base_only, None, run)
        return replace(subject, base=subject.base.model_copy(update={"dtype": dtype}))
    if base_only and adapter is not None:
        raise InputError("--base-only and --adapter exclude each other")
    if run is not None and adapter is not None:
        raise InputError(f"{run} and --adapter {adapter}: both name an adapter; give one of them")
    if run is None and adapter is None and model is not None:
        return Subject(_base_alone(model), None, None, None)
    if run is None and adapter is None:
        run = told_last_run()
    if run is not None and not (run / "recipe.yaml").is_file():
        _refuse_model(run)
        run, adapter = None, run
    if adapter is not None and (adapter / "recipe.yaml").is_file():
        run = adapter
    if run is not None and model is None:
        recipe = recipe_of(run)
        product = None if base_only else product_of(run)
        if product is not None and product.name == MODEL:
            base = recipe.base.model_copy(update={"model": str(product), "revision": None})
            return Subject(base, None, run, recipe)
        return Subject(recipe.base, product, run, recipe)
    adapter = adapter_of(run) if run is not None else adapter
    assert adapter is not None
    owner = run_of(adapter)
    owners_recipe = recipe_of(owner) if owner else None
    if owners_recipe is not None and model is None:
        base = owners_recipe.base
    else:
        base = _base_alone(model or named_base(adapter))
    return Subject(base, None if base_only else adapter, owner, owners_recipe)


def _base_alone(model: str) -> Base:
    """Return a base of which no recipe says how it is computed with.

    A CPU computes best in fp32. On a GPU that would be twice the memory for numbers that the
    checkpoint does not have, so there its own dtype is taken.
    """
    base = Base(model=model, dtype="float32")
    if not gpus():
        return base
    config = find_base(base).config
    own = config.get("dtype") or config.get("torch_dtype")
    return base.model_copy(update={"dtype": own}) if own in DTYPES else base


def checked_date(date: str) -> str:
    """Return what ``--date`` says.

    Raises:
        InputError: when it is no date.
    """
    try:
        return check_date(date)
    except InputError as error:
        raise InputError(f"--date: {error}") from None


def told_last_run() -> Path:
    """Return the last run, and say which one that is; launched processes have been told.

    Raises:
        InputError: when there is none yet.
    """
    run = last_run()
    if "WORLD_SIZE" not in os.environ:
        say(f"run: {run}")
    return run


def _refuse_model(folder: Path) -> None:
    if (folder / "config.json").is_file() and not (folder / ADAPTER_CONFIG).is_file():
        raise InputError(f"{folder}: a model, neither a run nor an adapter: name it with --model")
