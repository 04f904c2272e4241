"""What every drawing shares: its style, its caption, and how it is written down.

Readable without colour: what differs in colour differs in place, in a sign or in its marks, too.
"""

from __future__ import annotations

import io
import warnings
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from san_llm.errors import InputError
from san_llm.files import whole_folder
from san_llm.shown import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ABOVE, BELOW, INK, SOFT = "#b35806", "#542788", "#222222", "#767676"  # PuOr's two ends, two greys
MORE, LESS, FAR = "Oranges", "Purples", "Greys"  # pale to dark, in grey and to every eye
SIDES = "PuOr_r"  # purple below 1, orange above
DPI = 150
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 100,
    "text.parse_math": False,  # a name may have a dollar sign
    "svg.hashsalt": "san-llm",  # the same numbers, the same file
    "svg.fonttype": "path",
    "path.simplify": True,
}


def check_matplotlib() -> None:
    """Refuse to draw without matplotlib.

    Raises:
        InputError: saying how to get it.
    """
    try:
        import matplotlib.figure  # noqa: F401  # whether it is there
    except ImportError:
        raise InputError(
            "drawings need matplotlib: `pip install 'san-llm[plots]'` gets it"
        ) from None


@contextmanager
def styled() -> Iterator[None]:
    """Draw in this package's style, whatever the user's own is."""
    import matplotlib as mpl

    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()  # a user's own style is for their drawings
        mpl.rcParams.update(STYLE)
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in another script
        yield


def new_figure(width: float, height: float, title: str) -> Figure:
    """Return an empty figure, sizes in inches; its title says what is seen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08, rect=(0, 0.035, 1, 0.965))  # type: ignore[union-attr, call-arg]
    figure.suptitle(title, x=0.01, ha="left", size=13)
    return figure


def plain_ticks(digits: tuple[int, ...] = (1, 2, 3, 5), short: bool = False) -> Any:
    """Return a formatter for a log axis that writes 0.2 and 1, and leaves some in-betweens out.

    Args:
        digits: The leading digits that are written.
        short: Write 300k and 1M.
    """
    import numpy as np
    from matplotlib.ticker import EngFormatter, FuncFormatter

    written = EngFormatter(sep="").format_eng if short else "{:g}".format

    def shown(value: float, _: object) -> str:
        digit = round(value / 10 ** np.floor(np.log10(value) + 1e-9))
        return written(value) if digit in digits else ""

    return FuncFormatter(shown)


def finish(figure: Figure, caption: str) -> None:
    """Write a caption below a figure and fix its layout; within :func:`styled`."""
    look: dict[str, Any] = {"ha": "right", "va": "bottom", "size": 9, "color": SOFT}
    figure.text(0.995, 0.005, plain(caption), **look)
    # Laid out once, and rounded: the layout's last digits are never the same.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axis in figure.axes:
        left, bottom, width, height = axis.get_position(original=True).bounds
        axis.set_position([round(at, 5) for at in (left, bottom, width, height)])  # type: ignore[arg-type]


def as_svg(figure: Figure) -> str:
    """Return a figure as one ``<svg>`` element, the same for the same figure; text is paths."""
    text = io.StringIO()
    title = figure.get_suptitle()
    # What is None here is not written: no date, and no address of a metadata scheme.
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with styled():
        figure.savefig(text, format="svg", metadata={**nothing, "Title": title})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]  # without the prolog, whose doctype is an address


def as_png(figure: Figure) -> bytes:
    """Return a figure as PNG."""
    image = io.BytesIO()
    with styled():
        figure.savefig(image, format="png", dpi=DPI, metadata={"Software": None})
    return image.getvalue()


@dataclass(frozen=True)
class Drawing:
    """One drawing.

    Attributes:
        title: What the drawing shows, for those who cannot see it.
        source: A ``data:`` address with the SVG: as a picture it can neither run a script nor
            disturb the page, and its names are its own.
    """

    title: str
    source: str


def drawing(figure: Figure) -> Drawing:
    """Return a figure as a page shows it."""
    encoded = b64encode(as_svg(figure).encode()).decode()
    return Drawing(figure.get_suptitle(), f"data:image/svg+xml;base64,{encoded}")


def save_figures(drawn: Mapping[str, Figure], folder: Path, overwrite: bool) -> list[Path]:
    """Write figures as PNG and SVG into a folder, which appears whole, and return the files.

    Raises:
        InputError: when the folder has files and ``overwrite`` is not set, or they are not
            drawings.
    """
    if folder.is_dir():
        strange = [path.name for path in folder.iterdir() if path.suffix not in (".png", ".svg")]
        if strange:
            raise InputError(f"{folder}: {min(strange)} is in it, which is no drawing")
    with whole_folder(folder, overwrite) as temporary:
        for name, figure in drawn.items():
            (temporary / f"{name}.png").write_bytes(as_png(figure))
            (temporary / f"{name}.svg").write_text(as_svg(figure), encoding="utf-8")
    return [folder / f"{name}.{kind}" for name in drawn for kind in ("png", "svg")]
