"""The recipes that come with the package, by name, and their schema for editors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from san_llm.errors import InputError, did_you_mean, nearest_file
from san_llm.files import write_text
from san_llm.recipe.schema import Recipe

# In a wheel beside this file, in a folder of its name; in a clone at the top.
_INSTALLED = Path(__file__).with_suffix("")
SHIPPED = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[2] / "recipes"
EXAMPLES = ("study_", "task_")  # of files of other forms, which lie beside the recipes
SCHEMA = "recipe.schema.json"  # beside the shipped recipes, whose comment for editors names it


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe file, for editors; ``recipe.read`` says more."""
    schema = Recipe.model_json_schema()
    schema["required"].remove("name")  # the file's stem, where it says none
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with the package, by name."""
    files = sorted(SHIPPED.glob("*.yaml"))
    return {path.stem: path for path in files if not path.stem.startswith(EXAMPLES)}


def shipped_configs() -> dict[str, Path]:
    """Return the config files for Accelerate that come with the package, by name."""
    return {path.stem: path for path in sorted((SHIPPED / "accelerate").glob("*.yaml"))}


def config_name(text: str) -> str:
    """Return the bare name of a shipped config: of ``accelerate/fsdp2`` and ``fsdp2.yaml``, too."""
    return text.removeprefix("accelerate/").removesuffix(".yaml")


def find_shipped(name: str) -> Path:
    """Return the file of a recipe, see :func:`find_recipe`, or of a config for Accelerate.

    Raises:
        InputError: naming the nearest shipped file.
    """
    configs = shipped_configs()
    stem = config_name(name)
    if stem in configs and not Path(name).exists():
        return configs[stem]
    try:
        return find_recipe(name)
    except InputError as error:
        if near := did_you_mean(stem, configs):
            raise InputError(f"{name}: no such recipe or config{near}") from None
        raise InputError(f"{error}; for Accelerate {', '.join(configs)}") from None


def about(config: Path) -> str:
    """Return what a shipped config's first comment says it does, to the end of its sentence."""
    lines = config.read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    return comment.partition(". ")[0].removesuffix(".")


def find_recipe(text: str) -> Path:
    """Return the file of a recipe given as a path, or as the name of a shipped one.

    Raises:
        InputError: naming the nearest shipped recipe.
    """
    path = Path(text)
    if path.is_dir():
        hint = "; a run goes on with --resume" if (path / "recipe.yaml").is_file() else ""
        raise InputError(f"{text}: a directory; expected a recipe, a YAML file{hint}")
    if path.exists():
        return path
    shipped = shipped_recipes()
    # `recipes/NAME.yaml` works outside a clone, too.
    name = path.stem if path.suffix in ("", ".yaml") and path.parent.name in ("", "recipes") else ""
    if name in shipped:
        return shipped[name]
    near = nearest_file(path) if path.suffix or len(path.parts) > 1 else ""
    raise InputError(
        f"{text}: no such recipe{near or did_you_mean(path.stem, shipped)}; "
        f"shipped are {', '.join(shipped)}"
    )


def hardware(path: Path) -> str:
    """Return what a recipe's first comment says of the hardware and time that it needs."""
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    return first.removeprefix("# Hardware:").strip() if first.startswith("# Hardware:") else ""


def copy_shipped(name: str, target: Path | None, overwrite: bool) -> Path:
    """Copy a shipped file, and return where.

    Args:
        name: See :func:`find_shipped`.
        target: A file or a folder; None: here, by the file's own name.
        overwrite: Replace what is there.

    Raises:
        InputError: when there is no such file, or no place for it.
    """
    source = find_shipped(name)
    target = target or Path(source.name)
    if target.is_dir():
        target = target / source.name
    if target.exists() and not overwrite:
        raise InputError(f"{target}: exists; add --overwrite to replace it")
    if not target.parent.is_dir():
        raise InputError(f"{target.parent}: no such folder")
    write_text(target, _with_schema_of_here(source.read_text(encoding="utf-8")))
    return target


def _with_schema_of_here(text: str) -> str:
    """Return a shipped recipe whose editor's line names the schema where it is, not beside it."""
    address = (SHIPPED / SCHEMA).resolve().as_uri()
    return re.sub(rf"(?<=\$schema=){re.escape(SCHEMA)}$", address, text, flags=re.MULTILINE)
