"""A study as one HTML page, like that of a run: whole, without a script, asking nobody."""

from __future__ import annotations

from pathlib import Path

import yaml

from san_llm.errors import InputError
from san_llm.files import refuse_file
from san_llm.look.figures import drawing
from san_llm.look.page import PAGE, write_html
from san_llm.progress import say
from san_llm.study.pictures import draw_study
from san_llm.study.record import STUDY, read_study_result
from san_llm.study.tables import grids, rate_grid, remarks


def is_study(folder: Path) -> bool:
    """Return whether a folder is that of a study with results."""
    return (folder / STUDY).is_file()


def write_study_page(folder: Path, output: Path | None, overwrite: bool) -> Path:
    """Write the page of a study, and return where.

    Args:
        folder: The study's folder.
        output: The file, which appears whole; None: in that folder.
        overwrite: Replace what is there.

    Raises:
        InputError: when the study's results are damaged, or ``output`` is in the way.
    """
    output = output or folder / PAGE
    refuse_file(output, overwrite)
    result = read_study_result(folder)
    try:
        drawings = {name: drawing(figure) for name, figure in draw_study(result).items()}
    except InputError as error:
        say(f"no pictures: {error}")
        drawings = {}
    overview, *differences = grids(result)
    write_html(
        output,
        Path(__file__).with_name("study.html"),
        result=result,
        overview=overview,
        differences=differences,
        rates=rate_grid(result),
        remarks=remarks(result),
        drawings=drawings,
        study=yaml.safe_dump(result.study, sort_keys=False, allow_unicode=True),
        recipe=yaml.safe_dump(result.recipe, sort_keys=False, allow_unicode=True),
    )
    return output
