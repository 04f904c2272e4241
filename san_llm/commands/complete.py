"""What the shell offers for a word that has been begun; paths it completes itself."""

from __future__ import annotations


def recipe_names(incomplete: str) -> list[str]:
    """Return the shipped recipes that begin so."""
    from san_llm.recipe import shipped_recipes

    return [name for name in shipped_recipes() if name.startswith(incomplete)]


def run_folders(incomplete: str) -> list[str]:
    """Return the runs that begin so, ``runs/latest`` among them."""
    from san_llm.record import RUNS

    runs = sorted(str(path.parent) for path in RUNS.glob("*/recipe.yaml"))
    return [run for run in runs if run.startswith(incomplete)]


def recipes_and_runs(incomplete: str) -> list[str]:
    """Return both."""
    return recipe_names(incomplete) + run_folders(incomplete)


def recipe_keys(incomplete: str) -> list[str]:
    """Return the keys of a recipe that begin so, to be overridden: ``data.train=``."""
    from san_llm.recipe import section_keys

    keys = [f"{section}.{key}=" for section, keys in section_keys().items() for key in keys]
    return [key for key in keys if key.startswith(incomplete)]
