"""The ``san-llm recipes`` commands: options -> one function -> one printed result."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from san_llm.commands.options import Json, Overwrite, recipe_names, results, stdout
from san_llm.errors import InputError

recipes_app = typer.Typer(
    help="List, show and copy the recipes that come with san-llm; check your own.",
    epilog="""Examples:

    san-llm recipes list

    san-llm recipes show llama7b_commonsense

    san-llm recipes copy llama7b_commonsense mine.yaml

    san-llm recipes check mine.yaml""",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(help="A shipped recipe.", autocompletion=recipe_names)]


@recipes_app.command("list", epilog="Example:\n\n    san-llm recipes list")
def list_recipes(as_json: Json = False) -> None:
    """List the shipped recipes, with the hardware that each is meant for."""
    from san_llm.recipe.read import load_recipe
    from san_llm.recipe.shipped import hardware, shipped_recipes

    found = {name: (load_recipe(path), hardware(path)) for name, path in shipped_recipes().items()}
    if as_json:
        print(json.dumps({name: {"hardware": about} for name, (_, about) in found.items()}))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("recipe", "hardware"):
        table.add_column(column, overflow="fold")
    for name, (recipe, about) in found.items():
        in_4_bits = f", in {recipe.base.quantization}" if recipe.base.quantization else ""
        table.add_row(f"[bold]{name}[/]", f"{recipe.base.model}{in_4_bits}: {about}")
    Console(highlight=False).print(table)


@recipes_app.command("show", epilog="Example:\n\n    san-llm recipes show smollm2_demo")
def show(name: Name) -> None:
    """Print a shipped recipe."""
    from san_llm.recipe.shipped import find_recipe

    text = find_recipe(name).read_text(encoding="utf-8")
    if stdout.is_terminal:
        stdout.print(Syntax(text.rstrip(), "yaml", background_color="default"))
    else:
        print(text, end="")


@recipes_app.command(
    "copy", epilog="Example:\n\n    san-llm recipes copy llama7b_commonsense mine.yaml"
)
def copy(
    name: Name,
    target: Annotated[Path | None, typer.Argument(help="Default: NAME.yaml here.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Copy a shipped recipe, to be changed."""
    from san_llm.files import write_text
    from san_llm.recipe.shipped import find_recipe

    source = find_recipe(name)
    target = target or Path(source.name)
    if target.is_dir():
        target = target / source.name
    if target.exists() and not overwrite:
        raise InputError(f"{target}: exists; add --overwrite to replace it")
    if not target.parent.is_dir():
        raise InputError(f"{target.parent}: no such folder")
    write_text(target, _with_schema_of_here(source.read_text(encoding="utf-8")))
    results(str(target))


@recipes_app.command(
    epilog="""Examples:

    san-llm recipes check mine.yaml

    san-llm recipes check recipes/*.yaml --json"""
)
def check(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...", help="Recipe files, or names.", autocompletion=recipe_names
        ),
    ],
    as_json: Json = False,
) -> None:
    """Say what is wrong with recipes, with file, line and key; exit code 2 if anything is."""
    from san_llm.recipe.read import load_recipe
    from san_llm.recipe.shipped import find_recipe

    wrong: dict[str, list[str]] = {}
    for file in files:
        try:
            load_recipe(find_recipe(file))
            wrong[file] = []
        except InputError as error:
            wrong[file] = str(error).splitlines()
    if as_json:
        print(
            json.dumps({file: {"ok": not lines, "errors": lines} for file, lines in wrong.items()})
        )
    else:
        for file, lines in wrong.items():
            if not lines:
                results(f"{file}: ok")
    told = [line for lines in wrong.values() for line in lines]
    if told:
        raise InputError("\n".join(told))


@recipes_app.command(
    epilog="""Examples:

    san-llm recipes schema

    san-llm recipes schema > recipe.schema.json"""
)
def schema() -> None:
    """Print the JSON Schema of a recipe, by which editors complete and check one."""
    from san_llm.recipe.shipped import recipe_schema

    print(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))


def _with_schema_of_here(text: str) -> str:
    """Return a shipped recipe whose editor's line names the schema where it is, not beside it."""
    from san_llm.recipe.shipped import SCHEMA, SHIPPED

    address = (SHIPPED / SCHEMA).resolve().as_uri()
    return re.sub(rf"(?<=\$schema=){re.escape(SCHEMA)}$", address, text, flags=re.MULTILINE)
