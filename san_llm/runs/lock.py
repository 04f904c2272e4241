"""One process at a time writes to a run's folder: the file ``lock`` in it says which one.

The file is linked into place, which is atomic on network file systems, too, and its owner touches
it every few seconds. On the owner's machine a look at the process tells whether the lock still
holds; from another machine, whether the file's time still moves: clocks need not agree.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from san_llm.errors import InputError
from san_llm.progress import say

NAME = "lock"
TOUCH = 5.0  # seconds between two signs of life
GONE = 75.0  # seconds without one; network file systems show a file's time late by up to 60


def place() -> str:
    """Return what processes share that can look at each other: the host, and the container."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:  # not on Linux
        space = ""
    return f"{socket.gethostname()} {space}".strip()


def boot() -> str:
    """Return what names this run of the machine, until it starts again."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:  # not on Linux
        return ""


def started(process: psutil.Process) -> float:
    """Return the seconds from the machine's start to a process's, which no set clock moves."""
    return process.create_time() - psutil.boot_time()


def refuse_busy(run: Path) -> None:
    """Refuse a run that another process trains into at this moment.

    Raises:
        InputError: naming the process and since when it runs.
    """
    owner = _owner(run / NAME)
    if owner is not None and _alive(run / NAME, owner):
        raise InputError(_busy(run, owner))


def seems_busy(run: Path) -> bool:
    """Whether a process trains into a run, told at once: of another machine by its last touch.

    That is right where clocks agree; :func:`refuse_busy` takes the time to be sure.
    """
    path = run / NAME
    owner = _owner(path)
    if owner is None:
        return False
    if owner.get("place") == place():
        return _alive(path, owner)
    touched = _time(path)
    return touched is not None and abs(time.time() - touched / 1e9) < GONE


@contextmanager
def sole_writer(run: Path) -> Iterator[None]:
    """Hold a run's lock while the block runs. A lock whose owner is dead is no obstacle.

    Raises:
        InputError: when a living process holds it.
    """
    path = run / NAME
    mine = {
        "process": os.getpid(),
        "created": started(psutil.Process()),
        "boot": boot(),
        "place": place(),
        "since": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
    }
    done = threading.Event()
    touching = threading.Thread(target=_touch, args=(path, done), daemon=True)
    try:  # around the taking, too: a signal may end the process as soon as the lock is there
        while not _link(path, mine):
            owner = _owner(path)
            if owner is not None and _alive(path, owner):
                raise InputError(_busy(run, owner))
            _remove(path, owner)
        touching.start()
        yield
    finally:
        done.set()
        if touching.is_alive():
            touching.join()
        if _owner(path) == mine:
            path.unlink(missing_ok=True)


def _busy(run: Path, owner: dict[str, Any]) -> str:
    host = str(owner.get("place")).split()[0]
    there = "" if owner.get("place") == place() else f" on {host}"
    return (
        f"{run}: process {owner.get('process')}{there} has been training into it since "
        f"{owner.get('since')}; wait for its end, or stop it"
    )


def _link(path: Path, owner: dict[str, Any]) -> bool:
    """Put the lock in its place; False if there is one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{NAME}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(owner, file)
        try:
            os.link(name, path)
        except FileExistsError:
            return False
        return True
    finally:
        os.unlink(name)


def _owner(path: Path) -> dict[str, Any] | None:
    """Return who holds the lock: None if no one, nothing known if the file says nothing."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _alive(path: Path, owner: dict[str, Any]) -> bool:
    number, created = owner.get("process"), owner.get("created")
    if not isinstance(number, int) or not isinstance(created, float):
        return False
    if owner.get("place") == place():
        try:
            process = psutil.Process(number)
            # The same number may have gone to another process since; the kernel's clock is coarse.
            same = owner.get("boot") == boot() and abs(started(process) - created) < 2
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False
    say(
        f"{path}: held on {str(owner.get('place')).split()[0]}; waiting up to {GONE:.0f} s for a "
        "sign of life"
    )
    before, end = _time(path), time.monotonic() + GONE
    while time.monotonic() < end:
        time.sleep(1)
        now = _time(path)
        if now != before:
            return now is not None  # the file is gone: its owner has ended
    return False


def _time(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _remove(path: Path, owner: dict[str, Any] | None) -> None:
    """Take a dead owner's lock away, but never one that a third process has just put there."""
    if owner is None:
        return
    aside = path.with_name(f".{NAME}.{os.getpid()}.old")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
        if _owner(aside) != owner:
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()


def _touch(path: Path, done: threading.Event) -> None:
    while not done.wait(TOUCH):
        with contextlib.suppress(OSError):
            os.utime(path)
