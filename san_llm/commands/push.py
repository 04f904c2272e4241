"""``san-llm push``: a run's adapter, or a merged model, to the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from san_llm.commands.options import Json, results, run_folders

push_app = typer.Typer(rich_markup_mode=None)


@push_app.command(
    epilog="""Examples:

    san-llm push owner/llama-mine --dry-run

    san-llm push owner/llama-mine runs/mine --private

    san-llm push owner/llama-mine-merged runs/mine/merged"""
)
def push(
    name: Annotated[str, typer.Argument(metavar="HUB_ID", help="Where to: owner/name.")],
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN|FOLDER",
            autocompletion=run_folders,
            help="A run, whose adapter is meant, an adapter or a merged model. Default: the last "
            "run.",
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be uploaded.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Upload an adapter or a merged model, with its card, to the hub."""
    from san_llm.models.hub import upload

    done = upload(folder, name, private, dry_run)
    if as_json:
        print(json.dumps({"folder": str(done.folder), "files": done.files, "pushed": done.address}))
    elif done.address is not None:
        results(done.address)
    else:
        results(f"{done.folder} to {name}:")
        for file, size in done.files.items():
            results(f"  {file}  {decimal(size)}")
