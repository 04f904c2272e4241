"""Record a command as it looks in a terminal, as an SVG.

``python scripts/record_demo.py OUT.svg COMMAND ...``

The command runs in a terminal of its own (a pty, 100 columns); what stands on its screen at the
end, with colours, becomes an SVG, from the first line on that begins with ``$ ``: what a package
manager prints before is left out.
"""

from __future__ import annotations

import os
import pty
import re
import sys
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

COLUMNS, LINES = 100, 600


def record(command: list[str]) -> tuple[pyte.Screen, int]:
    """Run a command in a pty and return its last screen and its exit status."""
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)

    def read(handle: int) -> bytes:
        data = os.read(handle, 65536)
        stream.feed(data)
        return data

    os.environ |= {"COLUMNS": str(COLUMNS), "LINES": "50", "TERM": "xterm-256color"}
    return screen, os.waitstatus_to_exitcode(pty.spawn(command, read))


def colour(name: str) -> str | None:
    """Return pyte's colour as rich's."""
    if name == "default":
        return None
    named = {"brown": "yellow", "brightbrown": "bright_yellow"}
    is_hex = len(name) == 6 and all(c in "0123456789abcdef" for c in name)
    return f"#{name}" if is_hex else named.get(name, name.replace("bright", "bright_"))


def to_text(screen: pyte.Screen) -> Text:
    """Return a screen as styled text, without the empty lines at its end."""
    lines = []
    for number in range(LINES):
        line = Text()
        for column in range(COLUMNS):
            cell = screen.buffer[number][column]
            style = Style(
                color=colour(cell.fg),
                bgcolor=colour(cell.bg),
                bold=cell.bold,
                italic=cell.italics,
                underline=cell.underscore,
                reverse=cell.reverse,
            )
            line.append(cell.data, style)
        line.rstrip()
        lines.append(line)
    while lines and not lines[-1].plain:
        lines.pop()
    began = (number for number, line in enumerate(lines) if line.plain.startswith("$ "))
    del lines[: next(began, 0)]
    return Text("\n").join(lines)


def main(out: str, *command: str) -> None:
    """Record ``command`` into the SVG file ``out``."""
    screen, status = record(list(command))
    if status:
        sys.exit(status)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, color_system="truecolor")
        console.print(to_text(screen), no_wrap=True)
    title = "$ " + " ".join(command)
    svg = console.export_svg(title=title)
    # No fonts from elsewhere: the picture asks for nothing when it is opened.
    svg = re.sub(r"@font-face\s*\{.*?\}", "", svg, flags=re.DOTALL)
    Path(out).write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
