"""``san-llm plan``: what a run would be, before it costs anything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from san_llm.commands.options import Json, Overrides, recipe_names
from san_llm.progress import quiet_libraries, say
from san_llm.shown import plain

if TYPE_CHECKING:
    from san_llm.plan.planned import Plan
    from san_llm.plan.run import Planned


plan_app = typer.Typer(rich_markup_mode=None)
size = partial(decimal, precision=2)


@plan_app.command(
    epilog="""Examples:

    san-llm plan llama7b_commonsense --memory 24GB

    san-llm plan mine.yaml training.micro_batch_size=4 --data

    san-llm plan llama13b_commonsense --device cuda --devices 8 --sharded --json"""
)
def plan(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A recipe file, or the name of a shipped one.", autocompletion=recipe_names
        ),
    ],
    overrides: Overrides = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="What a device has, such as 24GB: the exit code is 1 where the run does not fit.",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="cpu|cuda", help="Where it would run. Default: this machine's."),
    ] = None,
    devices: Annotated[
        int, typer.Option(min=1, max=2**20, help="How many, with a process for each.")
    ] = 1,
    sharded: Annotated[
        bool, typer.Option("--sharded", help="They share the base among them (FSDP2).")
    ] = False,
    data: Annotated[
        bool,
        typer.Option(
            "--data", help="Tokenize the rows, for their real lengths and what the cutoff takes."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Tell what a run would train, its steps and its memory, from config files alone."""
    quiet_libraries()
    from san_llm.plan.planned import as_values
    from san_llm.plan.request import PlanRequest
    from san_llm.plan.run import plan as start

    request = PlanRequest(recipe, overrides or (), memory, device, devices, sharded, data)
    planned = start(request)
    run_plan, inspected = planned.plan, planned.inspected
    if as_json:
        rows = None if inspected is None else asdict(inspected)
        print(json.dumps({**as_values(run_plan, planned.limit), "data": rows}))
    else:
        stdout = Console(highlight=False)
        for section in _report(run_plan):
            stdout.print(section)
            stdout.print()
        if inspected is not None:
            from san_llm.data.inspect import report

            for section in islice(report(inspected, colour=stdout.is_terminal), 2):
                stdout.print(section)
                stdout.print()
        stdout.print(_verdict(planned))
    for doubt in run_plan.doubts:
        say(f"warning: {doubt}")
    if not planned.fits:
        raise typer.Exit(1)


def _report(run_plan: Plan) -> Iterator[Text | Table | object]:
    from san_llm.plan.planned import marked_recipe

    text = Text()
    for line, default in marked_recipe(run_plan):
        shown = "\n".join(map(plain, line.split("\n")))
        text.append(shown, style="dim" if default else "")
        text.append("  # default\n" if default else "\n", style="dim")
    text.rstrip()
    yield text
    if run_plan.graph is not None:
        yield run_plan.graph
    yield _facts(run_plan)
    yield _memory(run_plan)


def _facts(run_plan: Plan) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    training = run_plan.recipe.training
    total = sum(run_plan.trained.values())
    table.add_row("base", Text(plain(f"{run_plan.recipe.base.model} ({run_plan.config_from})")))
    table.add_row(
        "trained numbers",
        f"{total:,}: " + ", ".join(f"{name} {count:,}" for name, count in run_plan.trained.items()),
    )
    if run_plan.form is not None:
        table.add_row("form", run_plan.form)
    product = "model" if run_plan.recipe.method.name == "full" else "adapter"
    table.add_row(product, f"{size(run_plan.adapter_bytes)}, in fp32")
    if run_plan.missing is not None:
        rows = f"not known: {plain(run_plan.missing)} is not here"
    else:
        rows = f"{run_plan.rows:,}"
    table.add_row("rows", Text(rows))
    each = f"batches of {training.batch_size}, {run_plan.micro_batch} at once on a device"
    if run_plan.steps is None:
        steps = f"{training.epochs:g} epochs of {each}"
    elif run_plan.epochs is None:
        steps = f"{run_plan.steps:,} of {each}"
    else:
        steps = f"{run_plan.steps:,} ({run_plan.epochs:.3g} epochs) of {each}"
    table.add_row("steps", steps)
    tokens = f"{run_plan.batch.tokens:,} tokens at once"
    if not run_plan.looked:
        tokens += ", if all rows are as long as the cutoff; --data looks at them"
    table.add_row("largest batch", tokens)
    if run_plan.devices > 1:
        table.add_row("traffic", f"each device sends and receives {size(run_plan.traffic)} a step")
    return table


def _memory(run_plan: Plan) -> Table:
    where = "memory" if run_plan.devices == 1 else "memory of each device"
    table = Table(box=None, pad_edge=False)
    table.add_column(f"{where}, GB")
    for name in run_plan.memory:
        table.add_column(name, justify="right")
    kinds = list(run_plan.memory.values())
    for name, values in (
        ("weights", [need.weights for need in kinds]),
        ("adapter", [need.adapter for need in kinds]),
        ("gradients", [need.gradients for need in kinds]),
        ("optimizer", [need.optimizer for need in kinds]),
        ("activations", [need.activations for need in kinds]),
        ("logits", [need.logits for need in kinds]),
        ("other work", [need.work for need in kinds]),
        ("malloc's holes", [need.holes for need in kinds]),
        ("cache", [need.cache for need in kinds]),
        ("runtime", [need.runtime for need in kinds]),
    ):
        table.add_row(name, *(f"{value / 1e9:.2f}" for value in values))
    table.add_section()
    table.add_row("[bold]all[/]", *(f"[bold]{need.total / 1e9:.2f}[/]" for need in kinds))
    return table


def _verdict(planned: Planned) -> str:
    run_plan, limit = planned.plan, planned.limit
    name, first = next(iter(run_plan.memory.items()))
    needs = (
        f"{name} needs {size(first.total)} on {'a GPU' if run_plan.device == 'cuda' else 'a CPU'}"
    )
    if run_plan.device == "cuda":
        needs += ", computed and not measured: leave some room"
    if limit is None:
        return needs
    if planned.fits:
        return f"[green]fits[/] into {size(limit)}: {needs}"
    return f"[bold red]does not fit[/] into {size(limit)}: {needs}"
