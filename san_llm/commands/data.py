"""The ``san-llm data`` commands: options -> one function -> one printed result."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from san_llm.commands.options import Json, Overrides, results, stdout
from san_llm.errors import InputError, did_you_mean

data_app = typer.Typer(
    help="Build the protocol's data from the public data sets, and look into training data.",
    epilog="""Examples:

    san-llm data build commonsense --from raw

    san-llm data inspect smollm2_demo""",
    no_args_is_help=True,
    rich_markup_mode=None,
)

SETS = ("commonsense",)


@data_app.command(
    epilog="""Examples:

    san-llm data build commonsense --from hub

    san-llm data build commonsense --from downloads --output data/commonsense"""
)
def build(
    name: Annotated[str, typer.Argument(metavar="commonsense", help="The set to build.")],
    source: Annotated[
        str,
        typer.Option("--from", metavar="hub|DIR", help="The hub, or a folder with the raw sets."),
    ],
    output: Annotated[Path, typer.Option(help="The folder to write.")] = Path("data/commonsense"),
    as_json: Json = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what was built there before.")
    ] = False,
) -> None:
    """Write the eight commonsense tasks and their training mix as LLM-Adapters published them."""
    if name not in SETS:
        raise InputError(
            f"{name!r} is not a set that can be built; known: {', '.join(SETS)}"
            f"{did_you_mean(name, SETS)}"
        )
    from san_llm.data.build import MIX, build_commonsense
    from san_llm.progress import say
    from san_llm.protocol.tasks import TASKS

    built = build_commonsense(source, output, overwrite)
    if built.differs:
        say("not the full published set:")
    for line in built.differs:
        say(f"  {line}")
    if as_json:
        print(json.dumps(asdict(built)))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("task", "train", "published", "test", "published"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task in TASKS.values():
        have = [
            f"{rows[task.name]:,}" if task.name in rows else "-"
            for rows in (built.train, built.test)
        ]
        table.add_row(task.name, have[0], f"{task.train_rows:,}", have[1], f"{task.test_rows:,}")
    published = sum(task.train_rows for task in TASKS.values())
    table.add_row(f"[bold]{MIX}[/]", f"{built.mix:,}", f"{published:,}", "", "")
    stdout.print(table)
    results(built.output)


@data_app.command(
    epilog="""Examples:

    san-llm data inspect llama7b_commonsense

    san-llm data inspect mine.yaml data.cutoff=512

    san-llm data inspect rows.jsonl base.model=models/llama3 data.prompt=chat"""
)
def inspect(
    what: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|FILE",
            help="A recipe, or a .json or .jsonl file, which is read as the recipe smollm2_demo "
            "would.",
        ),
    ],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Show what a model will see of training rows: lengths, cuts, doubles, answers, overlap."""
    from san_llm.data.request import rows_recipe

    recipe = rows_recipe(what, overrides or ())  # what is wrong is told before torch is loaded
    from san_llm.data.inspect import inspect_recipe, report

    inspection = inspect_recipe(recipe)
    if as_json:
        print(json.dumps(asdict(inspection)))
        return
    for table in report(inspection, colour=stdout.is_terminal):
        stdout.print(table)
        stdout.print()
