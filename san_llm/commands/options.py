"""Options and arguments that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

from san_llm.commands.complete import recipe_keys

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in the way.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value]...", autocompletion=recipe_keys, help="Override any key."),
]
