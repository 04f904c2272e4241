"""Signs of life on stderr: a bar in a terminal, now and then a line in a log."""

from __future__ import annotations

import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from san_llm.errors import debugging
from san_llm.shown import plain

# Progress, notes and errors go here; results go to stdout.
stderr = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


def say(text: str) -> None:
    """Print a note on stderr as a terminal may show it, whatever names and data are quoted in it.

    No markup is read, control characters are escaped, and secrets are masked.
    """
    for line in text.split("\n"):
        stderr.print(plain(line))


LINE_EVERY = 15.0  # seconds between lines where no bar can be drawn


class Bar:
    """One running job. Made by :func:`bar`."""

    def __init__(self, what: str, total: int, unit: str, live: tuple[Progress, TaskID] | None):
        self.what, self.total, self.unit, self._live = what, total, unit, live
        self.done = 0
        self._began = self._spoke = time.monotonic()

    def to(self, done: int, note: str = "") -> None:
        """Show that ``done`` of the total are done, with a short note such as the loss."""
        self.done = done
        if self._live is not None:
            progress, task = self._live
            progress.update(task, completed=done, total=self.total, note=note)
            return
        now = time.monotonic()
        if now - self._spoke >= LINE_EVERY or done == self.total:
            self._spoke = now
            spent = now - self._began
            left = f", about {spent / done * (self.total - done):.0f} s left" if done else ""
            tail = f", {note}" if note else ""
            of = f"{done:,} of {self.total:,} {self.unit}"
            if self.unit == "bytes":
                of = f"{decimal(done)} of {decimal(self.total)}"
            stderr.print(
                f"{self.what}: {of} after {spent:.0f} s{left if done < self.total else ''}{tail}"
            )

    def advance(self, by: int = 1, note: str = "") -> None:
        """Show that ``by`` more are done."""
        self.to(self.done + by, note)


@contextmanager
def bar(what: str, total: int, unit: str = "steps", quiet: bool = False) -> Iterator[Bar]:
    """Show the progress of a long job.

    Args:
        what: What is being done: ``Training``.
        total: How many units the job has.
        unit: What is counted.
        quiet: Show nothing (all processes but the first).
    """
    if quiet:
        with Progress(console=stderr, disable=True) as progress:
            yield Bar(what, total, unit, (progress, progress.add_task(what, total=total)))
    elif not stderr.is_terminal:
        yield Bar(what, total, unit, None)
    else:
        columns = (
            TextColumn("[bold]{task.description}[/]"),
            BarColumn(),
            *((DownloadColumn(),) if unit == "bytes" else (MofNCompleteColumn(), TextColumn(unit))),
            TimeElapsedColumn(),
            TextColumn("[dim]left[/]"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}[/]"),
        )
        with Progress(*columns, console=stderr) as progress:
            yield Bar(what, total, unit, (progress, progress.add_task(what, total=total, note="")))


@contextmanager
def silenced(library: str) -> Iterator[None]:
    """Keep the bars and notices of a library, and of what it starts, out of ours."""
    if debugging():
        yield
        return
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        logger.setLevel(level)


def quiet_libraries(bars: bool = False) -> None:
    """Keep the libraries' own notices and bars out of the way; set before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not bars:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    if os.environ.get("SAN_LLM_DEBUG") != "1":
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # merges untie
