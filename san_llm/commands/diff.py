"""``san-llm diff``: which channels training potentiated, and which it depressed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from san_llm.commands.options import Json, run_folders, stdout

diff_app = typer.Typer(rich_markup_mode=None)


@diff_app.command(
    epilog="""Examples:

    san-llm diff

    san-llm diff runs/mine --json

    san-llm diff path/to/adapter models/llama3"""
)
def diff(
    adapter: Annotated[
        Path | None,
        typer.Argument(
            metavar="ADAPTER|RUN",
            autocompletion=run_folders,
            help="Default: the last run's adapter.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Argument(
            metavar="BASE", help="The model it was trained on. Default: the one it names."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what training changed: channels potentiated (gamma > 1) and depressed (gamma < 1)."""
    from san_llm.look.diff import diff as start
    from san_llm.look.diff import tables

    result = start(adapter, base)
    if as_json:
        print(json.dumps(asdict(result)))
        return
    for table in tables(result):
        stdout.print(table)
        stdout.print()
