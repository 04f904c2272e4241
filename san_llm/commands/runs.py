"""The ``san-llm runs`` commands: what is in ``runs/``, and taking some of it away."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from san_llm.commands.options import Json, run_folders
from san_llm.errors import InputError
from san_llm.progress import say, stderr
from san_llm.shown import plain

if TYPE_CHECKING:
    from san_llm.runs.listing import Run


runs_app = typer.Typer(
    help="Show the runs of this directory, or remove some.",
    epilog="""Examples:

    san-llm runs

    san-llm runs --json

    san-llm runs rm runs/smollm2_demo-20261124-120000""",
    invoke_without_command=True,
    rich_markup_mode=None,
)
COLOURS = {"running": "cyan", "finished": "green", "stopped": "yellow", "damaged": "bold red"}


@runs_app.callback()
def runs(
    context: typer.Context,
    as_json: Json = False,
) -> None:
    """Show the runs of this directory, or remove some."""
    if context.invoked_subcommand is not None:
        return
    from san_llm.runs.listing import list_runs

    listed = list_runs()
    if as_json:
        print(json.dumps([asdict(run) for run in listed]))
    elif not listed:
        say("no run yet in this directory: `san-llm train RECIPE` makes one")
    else:
        console = Console(highlight=False)
        table = _table(listed)
        width = console.measure(table, options=console.options.update(max_width=10_000)).maximum
        if width > console.width and console.is_terminal:
            console.print(_lines(table))
        else:
            Console(highlight=False, width=width).print(table)


@runs_app.command(
    epilog="""Examples:

    san-llm runs rm runs/smollm2_demo-20261124-120000

    san-llm runs rm latest --yes"""
)
def rm(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Names or folders.", autocompletion=run_folders),
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove runs with all that is in them, after asking; nothing outside runs/ is touched."""
    from san_llm.runs.listing import list_runs, removable, remove_run

    chosen = list(dict.fromkeys(removable(name) for name in runs))
    known = {run.run: run for run in list_runs()}
    if not yes:
        if not sys.stdin.isatty():
            raise InputError("rm: nobody can be asked here; add --yes to remove without asking")
        for path in chosen:
            run = known[str(path)]
            summary = f"{run.run}: {run.status}, {run.steps:,} steps, {decimal(run.bytes)}"
            say(summary)
        stderr.print(f"Remove {'it' if len(chosen) == 1 else 'them'}? [y/N] ", end="")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            say("nothing was removed")
            raise typer.Exit(1)
    for path in chosen:
        remove_run(path)
        say(f"removed {path}, {decimal(known[str(path)].bytes)}")


COLUMNS = ("run", "status", "method", "steps", "best loss", "score %", "of base", "size")


def _table(runs: list[Run]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in COLUMNS:
        right = column in ("steps", "best loss", "size")
        table.add_column(column, justify="right" if right else "left", no_wrap=True)
    for run in runs:
        name = escape(plain(run.run))
        table.add_row(
            f"[bold]{name}[/] (latest)" if run.latest else name,
            f"[{COLOURS[run.status]}]{run.status}[/]",
            run.method or "-",
            f"{run.steps:,}",
            "-" if run.loss is None else f"{run.loss:.4f}",
            *(_score(run, of) for of in ("adapter", "base")),
            decimal(run.bytes),
        )
    return table


def _lines(table: Table) -> str:
    """Return a table that is too wide as two lines a run: its folder, and what is known of it."""
    lines = []
    for name, status, method, *known in zip(
        *(column.cells for column in table.columns), strict=True
    ):
        facts = [f"{of} {cell}" for of, cell in zip(COLUMNS[3:], known, strict=True) if cell != "-"]
        lines += [str(name), f"  {status}, {method}, {', '.join(facts)}"]
    return "\n".join(lines)


def _score(run: Run, of: str) -> str:
    """Return the last evaluation's average in percent, with its standard error."""
    from san_llm.shown import with_error

    last = next((score for score in reversed(run.scores) if score.of == of), None)
    if last is None:
        return "-"
    return with_error(last.accuracy, last.standard_error)
