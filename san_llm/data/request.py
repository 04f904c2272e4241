"""Which rows are looked into: a recipe's, or those of one file, as a small recipe reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from san_llm.data.split import refuse_no_rows
from san_llm.recipe.read import load_recipe
from san_llm.recipe.schema import Recipe
from san_llm.recipe.shipped import find_recipe

SMALL = "smollm2_demo"


def rows_recipe(name: str, overrides: Sequence[str]) -> Recipe:
    """Return the recipe whose rows are meant, each file of which begins with a row.

    Args:
        name: A recipe, or a ``.json`` or ``.jsonl`` file, which is read as ``SMALL`` would.
        overrides: ``key=value`` arguments.

    Raises:
        InputError: when there is no such recipe or file.
    """
    changes = list(overrides)
    is_file = Path(name).suffix.lower() not in ("", ".yaml", ".yml")
    if is_file:
        changes.insert(0, f"data.train={json.dumps(name)}")
    recipe = load_recipe(find_recipe(SMALL if is_file else name), changes)
    refuse_no_rows(recipe.data)
    return recipe
