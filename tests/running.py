"""``san-llm`` as a process of a test: started, and found again with all that it has started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
from forking import interruptible


def start(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    """Start ``san-llm`` in a directory, on one thread."""
    return subprocess.Popen(
        [sys.executable, "-m", "san_llm", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        preexec_fn=interruptible,
    )


def workers(folder: Path) -> list[psutil.Process]:
    """Return the san_llm processes that run in a directory."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) and "san_llm" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found
