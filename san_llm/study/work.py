"""Several commands of this package at once, each in a process of its own, each with its log."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from san_llm.errors import STOPPED

LOOK_EVERY = 0.2  # seconds between looks at whether one has ended


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        name: What a person reads of it.
        arguments: Those of ``san-llm``.
        log: Where all goes that it prints.
    """

    name: str
    arguments: Sequence[str]
    log: Path

    @property
    def command(self) -> str:
        """The command as it is typed."""
        return shlex.join(["san-llm", *self.arguments])


@dataclass(frozen=True)
class Ended:
    """A job's end.

    Attributes:
        job: The job.
        code: Its exit code; negative where a signal killed it.
    """

    job: Job
    code: int

    @property
    def stopped(self) -> bool:
        """Whether it was asked to stop, and can go on."""
        return self.code in (*STOPPED.values(), -signal.SIGINT, -signal.SIGTERM)

    @property
    def last_line(self) -> str:
        """The last line that it printed, without the program's name."""
        lines = self.job.log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), f"exit code {self.code}")
        return last.strip().removeprefix("error: ")


class StopAskedError(Exception):
    """A study was asked to stop; its jobs have ended.

    Attributes:
        name: The signal's name.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def work(
    most: int, next_job: Callable[[frozenset[str]], Job | None], ended: Callable[[Ended], None]
) -> None:
    """Run jobs, so many at once, until there is none to begin and all have ended.

    Args:
        most: How many at once.
        next_job: Returns what is to be begun, given the names of those that run, or None.
        ended: Told each job that ended by itself.

    Raises:
        StopAskedError: when this process was asked to stop: so were its jobs, and they have ended.
    """
    running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}
    with _asked_to_stop() as asked:
        try:
            while True:
                # What is due changes when a job ends, and costs a look at the disk.
                while len(running) < most and not asked:
                    place = min(set(range(most)) - running.keys())
                    job = next_job(frozenset(job.name for job, _ in running.values()))
                    if job is None:
                        break
                    running[place] = (job, _begin(job, place, most))
                if not running and not asked:
                    break
                for place in _await_one(running, asked):
                    job, process = running.pop(place)
                    one = Ended(job, process.returncode)
                    if not (one.stopped and asked):
                        ended(one)
                if asked:
                    for _, process in running.values():
                        process.send_signal(asked[0])
                    _wait(process for _, process in running.values())
                    raise StopAskedError(signal.Signals(asked[0]).name)
        finally:
            for _, process in running.values():  # another error: nothing is left behind
                process.send_signal(signal.SIGTERM)
            _wait(process for _, process in running.values())


def _await_one(
    running: Mapping[int, tuple[Job, subprocess.Popen[bytes]]], asked: Sequence[int]
) -> list[int]:
    """Return the places of the jobs that have ended, once there is one, or a stop was asked for."""
    while True:
        done = [place for place, (_, process) in running.items() if process.poll() is not None]
        if done or asked:
            return done
        time.sleep(LOOK_EVERY)


def _wait(processes: Iterator[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.wait()


def _begin(job: Job, place: int, most: int) -> subprocess.Popen[bytes]:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("wb") as log:
        # A session of its own: Ctrl-C comes from here, once.
        return subprocess.Popen(
            [sys.executable, "-m", "san_llm", *job.arguments],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env=os.environ | _share(place, most),
            start_new_session=True,
        )


def _share(place: int, most: int) -> dict[str, str]:
    """Return what gives a process its share of the machine: of its cores, of its GPUs."""
    share = {"NO_COLOR": "1"}
    if most > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        share["OMP_NUM_THREADS"] = os.environ.get(
            "OMP_NUM_THREADS", str(max(1, (cores or 1) // most))
        )
        devices = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        if len(devices) > 1:
            share["CUDA_VISIBLE_DEVICES"] = devices[place % len(devices)]
    return share


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """Note SIGINT and SIGTERM instead of ending; a second one ends at once."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
