"""The page itself: one HTML file that asks the network for nothing and runs no script.

Whatever comes from files goes through :func:`_shown` and the template's escaping, and the page's
content policy forbids what could have slipped through both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from san_llm import __version__
from san_llm.evaluate.compare_tables import published, sources
from san_llm.evaluate.differences import LEVEL, RESAMPLES
from san_llm.evaluate.grids import Grid
from san_llm.files import refuse_file, write_text
from san_llm.look.evaluations import read_evaluations, table
from san_llm.look.facts import read_facts
from san_llm.look.side_by_side import side_by_side
from san_llm.look.story import Part, tell
from san_llm.protocol.published import QUOTED
from san_llm.recipe.read import to_yaml
from san_llm.shown import escaped, masked

PAGE = "report.html"
_NUMERIC = frozenset("+-0123456789")


def default_output(runs: Sequence[Path]) -> Path:
    """Return where a page goes unless told otherwise: into its run, or for several here."""
    return runs[0] / PAGE if len(runs) == 1 else Path(PAGE)


def write_page(runs: Sequence[Path], output: Path, overwrite: bool = False) -> list[Part]:
    """Write the page of one run, or of several side by side, and return what it says of each.

    Args:
        runs: The runs' folders.
        output: The file, which appears whole.
        overwrite: Replace what is there.

    Raises:
        InputError: when a folder is not a run or is damaged, or ``output`` is in the way.
    """
    refuse_file(output, overwrite)
    all_facts = [read_facts(run) for run in runs]
    evaluations = [read_evaluations(facts) for facts in all_facts]
    parts = []
    for number, (facts, (own, wrong)) in enumerate(zip(all_facts, evaluations, strict=True)):
        others = [
            evaluated
            for other_facts, (of_other, _) in zip(all_facts, evaluations, strict=True)
            if other_facts is not facts and other_facts.recipe.base == facts.recipe.base
            for evaluated in of_other
        ]
        parts.append(tell(number, facts, own, others, wrong))
    both = side_by_side(parts) if len(parts) > 1 else None
    write_html(output, Path(__file__).with_name("page.html"), parts=parts, both=both)
    return parts


def write_html(output: Path, template: Path, **values: Any) -> None:
    """Write a page, made from a template that may use the parts of this folder's."""
    text = environment(template.parent).get_template(template.name).render(values)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, text)


def environment(*folders: Path) -> Environment:
    """Return what renders a page's templates, this folder's and those of others."""
    environment = Environment(
        loader=FileSystemLoader([Path(__file__).parent, *folders]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.globals.update(
        table=table,
        to_yaml=to_yaml,
        text_columns=_text_columns,
        version=__version__,
        quoted=published(QUOTED),
        sources=sources(QUOTED),
        resamples=RESAMPLES,
        level=LEVEL,
    )
    return environment


def _text_columns(grid: Grid) -> set[int]:
    """Return the columns in which nothing begins as a number does."""
    columns = range(len(grid.header))
    return {n for n in columns if not any(row[n][:1] in _NUMERIC for row in grid.rows if row[n])}


def _shown(value: Any) -> Any:
    """Return a value as a page may show it: no secrets, and characters that hide as escapes."""
    return value if isinstance(value, Markup) else escaped(masked(str(value)), kept="\n")
