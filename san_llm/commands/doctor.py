"""``san-llm doctor``: what this machine can do, line by line."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from san_llm.commands.options import Json
from san_llm.progress import quiet_libraries
from san_llm.shown import plain

doctor_app = typer.Typer(rich_markup_mode=None)
COLOURS = {"ok": "green", "warning": "yellow", "error": "bold red"}


@doctor_app.command(
    epilog="""Examples:

    san-llm doctor

    san-llm doctor --json"""
)
def doctor(
    as_json: Json = False,
) -> None:
    """Check versions, devices, bf16, 4 bits, two processes, memory, disk, caches and the hub."""
    quiet_libraries()
    from san_llm.plan.doctor import diagnose

    stdout = Console(highlight=False)
    if not stdout.is_terminal:  # a line stays a line
        stdout = Console(highlight=False, width=10_000)
    findings = []
    for finding in diagnose():
        findings.append(finding)
        if as_json:
            continue
        line = Table.grid(padding=(0, 1))
        for width in (7, 14, None):
            line.add_column(width=width, overflow="fold")
        state = Text(finding.state, COLOURS[finding.state])
        line.add_row(state, finding.what, Text(plain(finding.found)))
        if finding.remedy:
            line.add_row("", "", Text(plain(finding.remedy)))
        stdout.print(line)
    healthy = all(finding.state != "error" for finding in findings)
    if as_json:
        print(json.dumps({"ok": healthy, "findings": [asdict(finding) for finding in findings]}))
    if not healthy:
        raise typer.Exit(1)
