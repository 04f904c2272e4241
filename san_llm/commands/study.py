"""``san-llm study``: a recipe's variants over seeds, each at its own best rate, compared."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from san_llm.commands.options import Json, check_one_form, results
from san_llm.errors import STOPPED, InputError
from san_llm.progress import quiet_libraries, say

study_app = typer.Typer(rich_markup_mode=None)


@study_app.command(
    epilog="""Examples:

    san-llm study recipes/study_example.yaml --plan

    san-llm study mine.yaml --processes 2

    san-llm study mine.yaml --commands > commands.txt

    san-llm study mine.yaml --latex > table.tex"""
)
def study(
    file: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study's file.")],
    only_plan: Annotated[
        bool, typer.Option("--plan", help="Tell what it would take, and run nothing.")
    ] = False,
    commands: Annotated[
        bool,
        typer.Option(
            "--commands",
            help="Print the runs that can begin now, a command a line, and run nothing.",
        ),
    ] = False,
    processes: Annotated[int, typer.Option(min=1, help="How many runs at once.")] = 1,
    accelerate: Annotated[
        Path | None,
        typer.Option(metavar="CONFIG.yaml", help="Launch each training as this file says."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The study's folder. Default: studies/NAME.")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Try again the runs that failed.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="Print LaTeX tables (booktabs).")] = False,
    as_json: Json = False,
) -> None:
    """Train a recipe's variants over seeds, each at its own best rate, and compare them.

    What is there is never run again; stopped at any moment, the same command goes on.
    """
    check_one_form(markdown, latex, as_json)
    if only_plan and commands:
        raise InputError("--plan and --commands exclude each other")
    quiet_libraries()
    from san_llm.evaluate.grids import drawn
    from san_llm.study import tables
    from san_llm.study.run import StudyRequest, begin
    from san_llm.study.work import StopAskedError

    under_way = begin(StudyRequest(file, processes, accelerate, output, retry))
    if commands:
        for command in under_way.commands():
            results(command)
        return
    plan = under_way.plan()
    if only_plan and as_json:
        print(json.dumps(asdict(plan)))
        return
    console = Console(highlight=False, stderr=not only_plan)
    console.print(drawn(tables.plan_grid(plan)))
    for line in tables.plan_lines(plan):
        console.print(line)
    if only_plan:
        return
    try:
        result = under_way.finish()
    except StopAskedError as stop:
        say(f"stopped: `san-llm study {file}` goes on")
        raise typer.Exit(STOPPED[stop.name]) from None
    if as_json:
        print(json.dumps(asdict(result)))
    elif markdown or latex:
        print((tables.markdown if markdown else tables.latex)(result))
    else:
        for grid in tables.all_grids(result):
            Console(highlight=False).print(drawn(grid))
        for line in tables.remarks(result):
            results(line)
        results(f"all of it: {under_way.folder / 'study.json'}")
