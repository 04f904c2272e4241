"""One process at a time writes to a run's folder: it holds the kernel's lock of the file ``lock``.

The kernel frees the lock when its owner ends, in whatever way, and asks no clock. What the file
says is for messages only: which process, where, and since when.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from san_llm.errors import InputError
from san_llm.progress import say

NAME = "lock"
PATIENCE = 1.0  # seconds to wait for the lock: a process that only looks holds it for an instant
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # said by file systems without them


def place() -> str:
    """Return where this process can look at others: the host, and the container."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:  # not on Linux
        space = ""
    return f"{socket.gethostname()} {space}".strip()


def refuse_busy(run: Path) -> None:
    """Refuse a run that another process trains into at this moment.

    Raises:
        InputError: naming the process and since when it runs.
    """
    if seems_busy(run):
        raise InputError(_busy(run))


def seems_busy(run: Path) -> bool:
    """Whether a process trains into a run. Only looks: nothing is made or changed."""
    try:
        handle = os.open(run / NAME, os.O_RDONLY)
    except OSError:  # there is none, or it is another user's
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: those who look do not meet
    except OSError as error:
        return error.errno not in NO_LOCKS
    finally:
        os.close(handle)
    return False


@contextmanager
def sole_writer(run: Path) -> Iterator[None]:
    """Hold a run's lock while the block runs. A lock whose owner is dead is no obstacle.

    Raises:
        InputError: when a living process holds it.
    """
    path = run / NAME
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    mine = {"process": os.getpid(), "place": place(), "since": since}
    lock = FileLock(path, timeout=PATIENCE, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(_busy(run)) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        say(f"{run}: no locks on this file system; start no second process")
    try:
        path.write_text(json.dumps(mine), encoding="utf-8")
        yield
    finally:
        if _note(path) == mine:  # while it is held: FileLock refuses a file that lost its name
            path.unlink()
        lock.release()


def _note(path: Path) -> dict[str, Any]:
    """Return what the lock's owner wrote: nothing if it wrote nothing, or not yet."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _busy(run: Path) -> str:
    note = {"process": "?", "place": place(), "since": "?"} | _note(run / NAME)
    there = "" if note["place"] == place() else f" on {str(note['place']).split()[0]}"
    return (
        f"{run}: process {note['process']}{there} has been training into it since {note['since']}; "
        "wait for its end, or stop it"
    )
