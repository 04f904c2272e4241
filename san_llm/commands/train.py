"""``san-llm train``: an adapter, trained as a recipe says, or gone on with."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from san_llm.commands.options import Json, Overrides, Overwrite, pairs, recipes_and_runs, stdout
from san_llm.progress import quiet_libraries, say
from san_llm.runs.record import TrainResult

train_app = typer.Typer(rich_markup_mode=None)


@train_app.command(
    epilog="""Examples:

    san-llm train recipes/smollm2_demo.yaml

    san-llm train smollm2_demo training.epochs=2 method.mode=neuron

    san-llm train llama7b_commonsense --processes 8

    san-llm train --resume"""
)
def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            autocompletion=recipes_and_runs,
            help="A recipe file or the name of a shipped one; with --resume a run's folder "
            "(default: the last run).",
        ),
    ] = None,
    overrides: Overrides = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine, one for each GPU.")
    ] = None,
    accelerate: Annotated[
        Path | None,
        typer.Option(
            metavar="CONFIG.yaml",
            help="Launch as this file of Accelerate's says, or a shipped one: ddp, fsdp2, ...",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The run's folder. Default: runs/NAME-DATE-TIME.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of a run.")
    ] = False,
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Train as a recipe says; the run's folder holds all that it leaves behind."""
    quiet_libraries()
    from san_llm.train.start import TrainRequest, start

    ended = start(
        TrainRequest(
            recipe=recipe,
            overrides=overrides or (),
            processes=processes,
            accelerate=accelerate,
            output=output,
            resume=resume,
            overwrite=overwrite,
            as_json=as_json,
        )
    )
    result = ended.result
    if result is not None and as_json:
        print(json.dumps(asdict(result)))
    elif result is not None and result.finished:
        stdout.print(_table(result))
        say(f"next: {_next(result)}")
    if result is not None and not result.finished:
        say(
            f"stopped after step {result.steps} of {result.max_steps}; "
            f"`san-llm train {result.run} --resume` goes on"
        )
    raise typer.Exit(ended.code)


def _next(result: TrainResult) -> str:
    from san_llm.look.held_out import next_steps
    from san_llm.runs.folder import recipe_of

    held_out = result.held_out_loss is not None
    steps = next_steps(recipe_of(Path(result.run)), result.row_kind, held_out)
    return ", ".join(f"`{step}`" for step in steps)


def _product(run: str) -> tuple[str, str]:
    from san_llm.runs.folder import product_of

    product = product_of(Path(run))
    return product.name, str(product)


def _table(result: TrainResult) -> Table:
    loss, early = result.held_out_loss, result.steps < result.max_steps
    steps = f"{result.steps:,}{f' of {result.max_steps:,}' if early else ''}"
    return pairs(
        [
            ("trained numbers", f"{result.trained_numbers:,}"),
            (
                "rows",
                f"{result.rows:,} ({result.dropped_rows:,} dropped, {result.cut_rows:,} cut)",
            ),
            ("steps", f"{steps}; the checkpoint of step {result.best_step:,} is kept"),
            ("held-out loss", "-" if loss is None else f"{loss:.4f} a token"),
            *((f"  {name}", f"{part:.4f}") for name, part in result.held_out_losses.items()),
            ("time", f"{result.seconds:.0f} s"),
            _product(result.run),
        ]
    )
