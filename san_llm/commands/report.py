"""``san-llm report``: one page about runs, for a reader who was not there."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from san_llm.commands.options import Json, Overwrite, results, run_folders
from san_llm.errors import InputError
from san_llm.progress import say

report_app = typer.Typer(rich_markup_mode=None)


@report_app.command(
    epilog="""Examples:

    san-llm report

    san-llm report runs/mine --output mine.html --overwrite

    san-llm report runs/san runs/lora

    san-llm report studies/mine"""
)
def report(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUN]...",
            autocompletion=run_folders,
            help="Runs, the first of which the others are compared with, or one study. "
            "Default: the last run.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="The page. Default: report.html in the run's folder; of several, here."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write one HTML page: what was done, curves, scales, scores, answers, how to repeat it."""
    from san_llm.look.page import default_output, write_page
    from san_llm.runs.folder import last_run

    if runs and len(runs) == 1:
        from san_llm.study.page import is_study, write_study_page

        if is_study(runs[0]):
            page = write_study_page(runs[0], output, overwrite)
            results(json.dumps({"output": str(page)}) if as_json else str(page))
            return
    chosen = runs or [last_run()]
    if len({run.resolve() for run in chosen}) < len(chosen):
        raise InputError("a run is named twice")
    output = output or default_output(chosen)
    chapters = write_page(chosen, output, overwrite)
    missing = [(chapter.facts.folder, gap) for chapter in chapters for gap in chapter.missing]
    if as_json:
        gaps = [{"run": str(folder), **asdict(gap)} for folder, gap in missing]
        print(json.dumps({"output": str(output), "missing": gaps}))
        return
    for folder, gap in missing:
        say(f"{folder}: {gap.what}")
        if gap.command:
            say(f"  {gap.command}")
    results(str(output))
