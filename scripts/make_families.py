"""Write the table of ``docs/families.md`` from the results of the tests that hold a model type.

Such a test is marked ``holds(what)`` and runs once for each ``family``, or for several at once,
``families``; the table has a row for each and says of every column whether all its tests passed
here, now. A model type that is refused stands with the reason that it was refused with.

It takes a few minutes: ``python scripts/make_families.py``.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "families.md"
START, END = (
    f"<!-- {word} of what scripts/make_families.py writes -->" for word in ("Start", "End")
)
# The order of the rows is that of their tests.
FIRST = (
    *("san/test_model.py", "san/test_families.py", "san/test_measured.py", "san/test_encoders.py"),
    *("san/test_pictures.py", "san/test_pictures_with_text.py"),
)
COLUMNS = {
    "dense": "logits and every gradient",
    "files": "stock files",
    "lean": "lean form",
}
# What a reader would want to know of a wiring beside whether it holds.
NOTES = {
    "glm4": "gate and up are one Linear",
    "starcoder2": "`c_proj` <- `c_fc` through its GELU",
    "gpt_neox": "q, k, v of each head together; attention and MLP side by side",
    "falcon": "one value head for all queries",
    "phi": "a plain MLP, beside attention",
    "opt": "a plain MLP",
    "bert": "a norm behind each part",
    "modernbert": "q, k, v are one Linear; so are what is activated and what it multiplies",
    "t5": "cross-attention's k and v read what left the encoder: nothing feeds them",
    "whisper": "likewise",
    "mixtral": "a gamma for each expert, whose up feeds its own down; they feed no next block",
    "qwen3_moe": "likewise",
    "olmoe": "likewise",
    "qwen2_moe": "likewise, with a shared expert",
    "phimoe": "likewise; its router, a Linear that gives a choice, is left alone",
    "longformer": "attention reads tokens before rows",
    "deberta-v2": "q and k read distances between tokens, too",
    "swinv2": "likewise",
    "resnet": "a shortcut's convolution writes the sum last, where there is one",
    "gpt2": "`Conv1D`, Linears that keep their weight the other way round",
    "dinov2": "layer scales pass what is linked",
    "swin": "patch merging reads the fc2 before it four times, side by side",
    "convnext": "no link into a depthwise convolution, whose s would be a second gamma",
    "convnextv2": "likewise; a norm behind its GELU",
    "clip": "its tower, with a head for classes",
    "siglip": "likewise",
}


class Held:
    """A plugin of pytest: by model type and column, what its tests came to."""

    def __init__(self) -> None:
        """Start with nothing held."""
        self.places: dict[str, int] = {}
        self.rows: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Any:
        """Keep the outcome of a test's call, or of its start where that failed."""
        report = yield
        mark = item.get_closest_marker("holds")
        if mark is not None and (report.when == "call" or report.outcome != "passed"):
            why = dict(item.user_properties).get("why")
            file = item.path.relative_to(ROOT / "tests").as_posix()
            place = FIRST.index(file) if file in FIRST else len(FIRST)
            for family in mark.kwargs.get("families") or (item.callspec.params["family"],):
                family = family.split()[0]  # of one type there may be several
                self.places[family] = min(place, self.places.get(family, place))
                for what in mark.args:
                    self.rows[family][what].append(why or report.outcome)
        return report


def table(rows: dict[str, dict[str, list[str]]]) -> str:
    """Return the rows as Markdown."""
    lines = ["| `model_type` | " + " | ".join(COLUMNS.values()) + " | |"]
    lines.append("| --- |" + " --- |" * (len(COLUMNS) + 1))
    for family, held in rows.items():
        if "refused" in held:
            cells = ["refused"] + [""] * (len(COLUMNS) - 1)
            note = held["refused"][0]
        else:
            cells = [_cell(held.get(column, [])) for column in COLUMNS]
            note = NOTES.get(family, "")
        lines.append(f"| {family} | " + " | ".join(cells) + f" | {note} |")
    return "\n".join(lines)


def _cell(outcomes: list[str]) -> str:
    if not outcomes:
        return ""
    return "yes" if set(outcomes) == {"passed"} else "NO"


def main() -> int:
    """Run the tests, write the table, return 1 where one failed."""
    held = Held()
    sys.path.insert(0, str(ROOT))
    where = [str(ROOT / "tests" / name) for name in (*FIRST, "")]
    code = pytest.main(["-q", "-m", "holds", "-p", "no:cacheprovider", *where], plugins=[held])
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    rows = dict(sorted(held.rows.items(), key=lambda row: held.places[row[0]]))
    text = f"{before}{START}\n\n{table(rows)}\n\n{END}{after}"
    PAGE.write_text(text, encoding="utf-8")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
