"""``san-llm download``: a base model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from san_llm.commands.options import Overwrite, results
from san_llm.progress import quiet_libraries

download_app = typer.Typer(rich_markup_mode=None)


@download_app.command(
    epilog="""Examples:

    san-llm download smollm2-135m

    san-llm download meta-llama/Meta-Llama-3-8B --output models/llama3"""
)
def download(
    name: Annotated[str, typer.Argument(help="smollm2-135m, or a hub id: owner/name.")],
    output: Annotated[
        Path | None, typer.Option(help="Where to keep it. Default: models/NAME.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Get a base model, as safetensors, and print its folder."""
    from san_llm.models.download import download as run
    from san_llm.models.download import model_folder

    # From the hub come gigabytes: its own bars show them. A named model is converted under ours.
    quiet_libraries(bars=model_folder(name) is None)
    results(str(run(name, output, overwrite)))
