"""What the benchmarks share: a process of its own for each measurement, and the file of results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any


def alone(command: list[str], what: str, threads: int, **environment: str) -> dict[str, float]:
    """Run a benchmark's script as a process; return the JSON that its last line holds.

    Args:
        command: The script and its arguments.
        what: It measures, for a failure's message, which ends this process.
        threads: Of OpenMP.
        **environment: More variables.
    """
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "OMP_NUM_THREADS": str(threads), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{what}: {done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def peak_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def write_results(options: argparse.Namespace, keys: tuple[str, ...], **results: Any) -> None:
    """Write what was found, the machine and some of the options to ``options.output``, if given."""
    if options.output is None:
        return
    output: Path = options.output
    facts = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **{key: getattr(options, key) for key in keys},
        **results,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(facts, indent=2) + "\n")
