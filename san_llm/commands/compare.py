"""``san-llm compare``: evaluations, row by row."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from san_llm.commands.options import Json, check_one_form, results, run_folders
from san_llm.errors import check_one_of

compare_app = typer.Typer(rich_markup_mode=None)


@compare_app.command(
    epilog="""Examples:

    san-llm compare runs/one runs/two

    san-llm compare scores/base scores/tuned --published

    san-llm compare scores/a scores/b --latex > table.tex"""
)
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN RUN ...",
            autocompletion=run_folders,
            help="Folders of evaluations, or runs whose adapter was evaluated once.",
        ),
    ],
    metric: Annotated[
        str, typer.Option(metavar="acc|acc_norm", help="What is compared; acc_norm: by likelihood.")
    ] = "acc",
    across: Annotated[
        bool, typer.Option("--across", help="Compare other protocols and prompt styles, too.")
    ] = False,
    published: Annotated[
        bool, typer.Option("--published", help="Show published averages, marked as quoted.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="Print LaTeX tables (booktabs).")] = False,
    as_json: Json = False,
) -> None:
    """Compare evaluations row by row with the first: differences, intervals, exact tests."""
    from san_llm.evaluate import compare_tables as tables
    from san_llm.evaluate.compare import METRICS
    from san_llm.evaluate.compare import compare as start
    from san_llm.evaluate.grids import drawn

    check_one_of("--metric", metric, METRICS)
    check_one_form(markdown, latex, as_json)
    result = start(runs, metric, across, published)
    if as_json:
        print(json.dumps(asdict(result)))
    elif markdown or latex:
        print((tables.markdown if markdown else tables.latex)(result))
    else:
        for line in tables.legend(result):
            results(line)
        for grid in tables.grids(result):
            Console(highlight=False).print(drawn(grid))
        for line in tables.remarks(result):
            results(line)
