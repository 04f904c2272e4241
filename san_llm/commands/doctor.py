"""``san-llm doctor``: what this machine can do, line by line."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from san_llm.errors import plain
from san_llm.progress import quiet_libraries

doctor_app = typer.Typer(rich_markup_mode=None)
COLOURS = {"ok": "green", "warning": "yellow", "error": "bold red"}


@doctor_app.command(
    epilog="""Examples:

    san-llm doctor

    san-llm doctor --json"""
)
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Check versions, devices, bf16, 4 bits, two processes, memory, disk, caches and the hub."""
    quiet_libraries()
    from san_llm.doctor import diagnose

    stdout = Console(highlight=False, soft_wrap=True)
    findings = []
    for finding in diagnose():
        findings.append(finding)
        if as_json:
            continue
        stdout.print(f"{finding.state:8}", style=COLOURS[finding.state], end="")
        stdout.print(plain(f"{finding.what:14} {finding.found}"), markup=False)
        if finding.remedy:
            stdout.print(plain(f"{'':23}{finding.remedy}"), markup=False)
    healthy = all(finding.state != "error" for finding in findings)
    if as_json:
        print(json.dumps({"ok": healthy, "findings": [asdict(finding) for finding in findings]}))
    if not healthy:
        raise typer.Exit(1)
