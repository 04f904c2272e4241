"""The ``san-llm recipes`` commands: options -> one function -> one printed result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from san_llm.commands.options import Json, Overwrite, recipe_names, results, shipped_names, stdout
from san_llm.errors import InputError
from san_llm.progress import say

recipes_app = typer.Typer(
    help="List, show and copy shipped recipes and Accelerate configs; check your own recipes.",
    epilog="""Examples:

    san-llm recipes list

    san-llm recipes show llama7b_commonsense

    san-llm recipes copy llama7b_commonsense mine.yaml

    san-llm recipes check mine.yaml""",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Name = Annotated[
    str,
    typer.Argument(
        help="A shipped recipe, or a config: accelerate/fsdp2.", autocompletion=shipped_names
    ),
]


@recipes_app.command("list", epilog="Example:\n\n    san-llm recipes list")
def list_recipes(as_json: Json = False) -> None:
    """List shipped recipes, with the hardware each is for, and Accelerate configs."""
    from san_llm.recipe.read import load_recipe
    from san_llm.recipe.shipped import about, hardware, shipped_configs, shipped_recipes

    recipes = {
        name: (load_recipe(file), hardware(file)) for name, file in shipped_recipes().items()
    }
    configs = {f"accelerate/{name}": about(file) for name, file in shipped_configs().items()}
    if as_json:
        listed = {name: {"hardware": hardware} for name, (_, hardware) in recipes.items()}
        print(json.dumps(listed | {name: {"about": text} for name, text in configs.items()}))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("recipe", "hardware"):
        table.add_column(column, overflow="fold")
    for name, (recipe, machine) in recipes.items():
        in_4_bits = f", in {recipe.base.quantization}" if recipe.base.quantization else ""
        table.add_row(f"[bold]{name}[/]", f"{recipe.base.model}{in_4_bits}: {machine}")
    table.add_section()
    for name, text in configs.items():
        table.add_row(f"[bold]{name}[/]", text)
    Console(highlight=False).print(table)


@recipes_app.command("show", epilog="Example:\n\n    san-llm recipes show smollm2_demo")
def show(name: Name) -> None:
    """Print a shipped recipe or Accelerate config."""
    from san_llm.recipe.shipped import find_shipped

    text = find_shipped(name).read_text(encoding="utf-8")
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
    """Copy a shipped recipe or Accelerate config, to be changed."""
    from san_llm.recipe.shipped import copy_shipped

    results(str(copy_shipped(name, target, overwrite)))


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
    """Say what is wrong with recipes, with file, line and key; exit code 2 if anything is.

    What is probably not meant, such as a learning rate ten times the usual, is a warning.
    """
    from san_llm.data.split import count_rows
    from san_llm.recipe.doubts import doubts
    from san_llm.recipe.read import load_recipe
    from san_llm.recipe.schema import PeftMethod, check_learnable
    from san_llm.recipe.shipped import find_recipe

    wrong: dict[str, list[str]] = {}
    doubtful: dict[str, list[str]] = {}
    for file in files:
        wrong[file] = doubtful[file] = []
        try:
            recipe = load_recipe(find_recipe(file))
            check_learnable(recipe)
            if isinstance(recipe.method, PeftMethod):
                from san_llm.models.tuners import tuner_config

                tuner_config(recipe.method)
        except InputError as error:
            wrong[file] = str(error).splitlines()
            continue
        try:
            rows, _ = count_rows(recipe.data, recipe.training.seed)
            doubtful[file] = doubts(recipe, rows)
        except InputError as error:
            wrong[file] = [f"{file}: {error}"]
    if as_json:
        found = {
            file: {"ok": not lines, "errors": lines, "warnings": doubtful[file]}
            for file, lines in wrong.items()
        }
        print(json.dumps(found))
    else:
        for file, lines in wrong.items():
            for doubt in doubtful[file]:
                say(f"{file}: warning: {doubt}")
            if not lines:
                count = len(doubtful[file])
                told = f", {count} warning{'s' if count > 1 else ''}" if count else ""
                results(f"{file}: ok{told}")
    errors = [line for lines in wrong.values() for line in lines]
    if errors:
        raise InputError("\n".join(errors))


@recipes_app.command(
    epilog="""Examples:

    san-llm recipes schema

    san-llm recipes schema > recipe.schema.json"""
)
def schema() -> None:
    """Print the JSON Schema of a recipe, by which editors complete and check one."""
    from san_llm.recipe.shipped import recipe_schema

    print(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))
