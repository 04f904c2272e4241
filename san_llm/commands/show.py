"""``san-llm show``: a run drawn, as pictures and in the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from san_llm.commands.options import Json, Overwrite, results, run_folders
from san_llm.errors import InputError
from san_llm.progress import say

show_app = typer.Typer(rich_markup_mode=None)


@show_app.command(
    epilog="""Examples:

    san-llm show

    san-llm show runs/mine --weight 12.down_proj --overwrite

    san-llm show runs/mine --terminal"""
)
def show(
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN", autocompletion=run_folders, help="A run's folder. Default: the last run."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="The folder for the pictures. Default: plots/ in the run's folder."),
    ] = None,
    weight: Annotated[
        str | None,
        typer.Option(
            metavar="BLOCK.MODULE",
            help="Whose synapse scale is drawn: 12.down_proj. Default: the weight that changed "
            "most.",
        ),
    ] = None,
    terminal: Annotated[
        bool, typer.Option("--terminal", help="Draw here only, in characters; write no pictures.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Draw a run: losses, neuron scales by block and module, synapse scales, scores."""
    from san_llm.files import refuse_files
    from san_llm.look.numbers import numbers_of
    from san_llm.runs.folder import last_run

    if terminal and (output is not None or weight is not None or overwrite or as_json):
        raise InputError("--terminal: writes nothing, so it goes with no other option")
    run = run or last_run()
    numbers = numbers_of(run, weight)
    if not terminal:
        from san_llm.look.figures import check_matplotlib
        from san_llm.look.plots import save

        check_matplotlib()
        refuse_files(output or run / "plots", overwrite)
    if not as_json:
        from san_llm.look.terminal import sketches

        stdout = Console(highlight=False)
        results(f"{run}: {numbers.title}")
        for table in sketches(numbers):
            stdout.print()
            stdout.print(table)
    files: list[Path] = []
    if not terminal:
        files = save(numbers, output or run / "plots", overwrite)
    if as_json:
        result = {"run": str(run), "files": list(map(str, files)), "left_out": numbers.left_out}
        print(json.dumps(result))
        return
    if files:
        stdout.print()
    for file in files:
        results(str(file))
    for line in numbers.left_out:
        say(f"left out: {line}")
