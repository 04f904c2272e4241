"""``san-llm graph``: who feeds whom in a model, by its family's table or measured."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from san_llm.commands.options import Json, Overrides, recipe_names, results
from san_llm.progress import quiet_libraries

if TYPE_CHECKING:
    from san_llm.plan.wiring import Wiring

graph_app = typer.Typer(rich_markup_mode=None)


@graph_app.command(
    epilog="""Examples:

    san-llm graph llama7b_commonsense

    san-llm graph models/smollm2-135m --measure

    san-llm graph mine.yaml method.mode=neuron --json"""
)
def graph(
    name: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|RECIPE",
            help="A model's folder or hub id; or a recipe's file or name.",
            autocompletion=recipe_names,
        ),
    ],
    overrides: Overrides = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Measure it, of a family with a table, too: exit code 1 where they differ.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Draw which module's scale goes into which module's columns; most models can be measured."""
    quiet_libraries()
    from san_llm.plan.wiring import wiring

    found = wiring(name, tuple(overrides or ()), measure)
    if as_json:
        print(json.dumps(found.as_values()))
    else:
        Console(highlight=False).print(found.graph)
        for line in _remarks(found):
            results(line)
    if found.differences:
        raise typer.Exit(1)


def _remarks(found: Wiring) -> list[str]:
    lines = [
        f"not adapted: {_shortened(names)}: {reason}" for reason, names in found.left_alone.items()
    ]
    if found.differences is not None:
        lines.append(
            f"measured: differs from the table in {len(found.differences)} places"
            if found.differences
            else "measured: as the table says"
        )
        lines += found.differences[:5]
    elif found.measured is not None:
        lines.append("measured: on two small copies, which agree")
    return lines


def _shortened(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
