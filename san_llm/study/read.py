"""A study read from its file, and all that can be wrong in it told before anything runs."""

from __future__ import annotations

from pathlib import Path

from san_llm.errors import InputError, nearest_file
from san_llm.recipe.mistakes import Source
from san_llm.recipe.read import checked, parse_yaml, text_of
from san_llm.study.schema import Study, recipe_of


def load_study(path: Path) -> Study:
    """Return a study, read and checked; so is the recipe of each variant.

    Raises:
        InputError: with one line for each mistake: where, what was found, what would be right.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file{nearest_file(path)}")
    source = Source(str(path), model=Study, kind="a study")
    raw = parse_yaml(text_of(path, source.kind), source)
    if not isinstance(raw, dict):
        keys = ", ".join(name for name in Study.model_fields if name != "name")
        raise InputError(f"{path}: expected a mapping with the keys {keys}")
    study = checked(Study, raw, source)
    for variant in study.variants:
        _check_variant(study, variant, source)
    return study


def _check_variant(study: Study, variant: str, source: Source) -> None:
    where = source.of(("variants", variant))
    try:
        recipe = recipe_of(study, variant)
    except InputError as error:
        lines = str(error).split("\n")
        raise InputError(
            "\n".join(f"{where}: variants.{variant}: {line}" for line in lines)
        ) from None
    if not recipe.data.held_out_files:
        raise InputError(
            f"{where}: variants.{variant}: data.held_out: a seed would take other rows out "
            f"({recipe.data.held_out}), and rates are chosen by them; expected a file"
        )
