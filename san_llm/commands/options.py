"""Options and arguments that several commands have, what the shell offers for them, stdout."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from san_llm.errors import InputError
from san_llm.shown import plain


def recipe_names(incomplete: str) -> list[str]:
    """Return the shipped recipes that begin so."""
    from san_llm.recipe.shipped import shipped_recipes

    return [name for name in shipped_recipes() if name.startswith(incomplete)]


def shipped_names(incomplete: str) -> list[str]:
    """Return the shipped recipes and configs that begin so."""
    from san_llm.recipe.shipped import shipped_configs

    configs = [f"accelerate/{name}" for name in shipped_configs()]
    return recipe_names(incomplete) + [name for name in configs if name.startswith(incomplete)]


def run_folders(incomplete: str) -> list[str]:
    """Return the runs that begin so, ``runs/latest`` among them."""
    from san_llm.runs.folder import RUNS

    runs = sorted(str(path.parent) for path in RUNS.glob("*/recipe.yaml"))
    return [run for run in runs if run.startswith(incomplete)]


def recipes_and_runs(incomplete: str) -> list[str]:
    """Return the shipped recipes and the runs that begin so."""
    return recipe_names(incomplete) + run_folders(incomplete)


def recipe_keys(incomplete: str) -> list[str]:
    """Return the keys of a recipe that begin so, to be overridden: ``data.train=``."""
    from san_llm.recipe.schema import section_keys

    keys = [f"{section}.{key}=" for section, keys in section_keys().items() for key in keys]
    return [key for key in keys if key.startswith(incomplete)]


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in the way.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value]...", autocompletion=recipe_keys, help="Override any key."),
]
Run = Annotated[
    Path | None,
    typer.Argument(
        metavar="RUN",
        autocompletion=run_folders,
        help="A run's folder, or an adapter's. Default: the last run.",
    ),
]
Model = Annotated[str | None, typer.Option(help="Ask this model: a folder or hub id.")]
Adapter = Annotated[
    Path | None, typer.Option(help="Ask with this adapter. Default: the last run's.")
]
BaseOnly = Annotated[bool, typer.Option("--base-only", help="Ask the base without the adapter.")]
Compare = Annotated[
    bool, typer.Option("--compare", help="Show the answers without and with the adapter.")
]
DType = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16 or float16. Default: the run's; without one the checkpoint's own "
        "on a GPU, float32 on a CPU."
    ),
]
Date = Annotated[
    str | None,
    typer.Option(
        metavar="YYYY-MM-DD",
        help="What a chat template writes as today's date. Default: the training's.",
    ),
]
System = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="The system prompt. Default: the one that all training rows began with, if any.",
    ),
]
NewTokens = Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")]
Temperature = Annotated[
    float,
    typer.Option(min=0, max=100, help="0 takes the likeliest token; 1 samples as the model says."),
]
Seed = Annotated[
    int | None, typer.Option(min=0, max=2**32 - 1, help="Sample the same answer each time.")
]


def check_one_form(markdown: bool, latex: bool, as_json: bool) -> None:
    """Refuse to print tables in two forms.

    Raises:
        InputError: when more than one was asked for.
    """
    if markdown + latex + as_json > 1:
        raise InputError("--markdown, --latex and --json exclude each other")


stdout = Console(highlight=False, soft_wrap=True)


def results(text: str) -> None:
    """Print a result on stdout as a terminal may show it, see :func:`san_llm.progress.say`."""
    stdout.print(plain(text), markup=False)


def pairs(rows: Iterable[tuple[str, str]]) -> Table:
    """Return names and values as a table, a line each."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows:
        table.add_row(f"[bold]{name}[/]", Text(plain(value)))
    return table
