"""``san-llm push``: a run's adapter, or a merged model, to the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from san_llm.commands.options import Json, results, run_folders
from san_llm.errors import InputError

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
    from san_llm.files import refuse_link
    from san_llm.models.hub import check_push
    from san_llm.models.hub import push as start
    from san_llm.runs.folder import adapter_of, last_run

    check_push(name, "HUB_ID", signed_in=not dry_run)
    folder = folder or last_run()
    if (folder / "recipe.yaml").is_file():
        folder = adapter_of(folder)
    if not any((folder / file).is_file() for file in ("adapter_config.json", "config.json")):
        raise InputError(f"{folder}: neither a run, nor an adapter, nor a model")
    found = sorted(folder.rglob("*"))
    for path in found:
        refuse_link(path)
    files = {path: path.stat().st_size for path in found if path.is_file()}
    kind = "Adapter" if (folder / "adapter_config.json").is_file() else "Merged model"
    address = None if dry_run else start(folder, name, private, kind)
    if as_json:
        sizes = {str(path.relative_to(folder)): size for path, size in files.items()}
        print(json.dumps({"folder": str(folder), "files": sizes, "pushed": address}))
        return
    if address is not None:
        results(address)
        return
    results(f"{folder} to {name}:")
    for path, size in files.items():
        results(f"  {path.relative_to(folder)}  {decimal(size)}")
