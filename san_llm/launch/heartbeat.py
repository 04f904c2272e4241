"""Signs of life between the processes that train together, so that a frozen one ends the job.

A process that is killed closes its connections, and the others notice at once. One that is frozen,
or whose machine lost its power, does not, and they would wait half an hour in the next collective.
So each process has a thread that counts in the job's key-value store, and looks whether the next
process's count still moves. A slow step does no harm: the thread counts while others compute.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

from san_llm.launch.notes import launcher_is_gone, tell_failure
from san_llm.progress import say
from san_llm.runs.lock import place

EVERY = 2.0  # seconds between two signs of life
SILENCE = 30.0  # seconds without one after which a process counts as lost
STARTING = 600.0  # seconds without the first one, while others may still load their base


@contextmanager
def peers_watched() -> Iterator[None]:
    """Watch the next process while the block runs; does nothing for a process on its own."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        yield
        return
    # A connection of its own: an operation of the main thread may block for long.
    default: Any = torch.distributed.distributed_c10d._get_default_store()
    store = default.clone()
    store.set_timeout(timedelta(seconds=SILENCE))
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    store.set(_key(rank), _sign(0))
    done = threading.Event()
    thread = threading.Thread(target=_watch, args=(store, rank, world, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=EVERY + SILENCE)


def _key(rank: int) -> str:
    return f"san-llm/alive/{rank}"


def _sign(beats: int) -> str:
    return f"{beats} {os.getpid()} {place()}"


def _watch(store: Any, rank: int, world: int, done: threading.Event) -> None:
    mine, theirs = _key(rank), _key((rank + 1) % world)
    seen, silent, beats, last = b"", 0.0, 0, time.monotonic()
    ended = False
    while not ended:
        ended = done.wait(EVERY)
        if launcher_is_gone():  # killed: nobody is left who would tell, or end, the others
            os.kill(os.getpid(), signal.SIGTERM)
            return
        began = time.monotonic()
        # What this process slept itself (a laptop that was closed) is not the other's silence.
        silent += min(began - last, 2 * EVERY)
        last = began
        beats += 1
        try:
            store.set(mine, "done" if ended else _sign(beats))
            sign = store.get(theirs) if store.check([theirs]) else b""
        except Exception:
            # Refused at once, the store is gone with its launcher, and so are we. A timeout means
            # that the process or machine that keeps it has stopped.
            if time.monotonic() - began < SILENCE / 2:
                return
            _give_up(0, SILENCE, b"")
            return
        if sign != seen or sign == b"done":
            seen, silent = sign, 0.0
        elif silent > (SILENCE if sign else STARTING):
            _give_up((rank + 1) % world, silent, sign)


def _give_up(lost: int, silent: float, value: bytes) -> None:
    """Say which process is lost, end it if it is here, and end this one."""
    message = (
        f"process {lost} gave no sign of life for {silent:.0f} s: it is frozen, or its machine "
        "is gone"
    )
    if not tell_failure(message, verdict=True):
        say(f"error: {message}")
    _, _, rest = value.decode("utf-8", "replace").partition(" ")
    number, _, where = rest.partition(" ")
    if where == place() and number.isdecimal():
        # Its launcher would wait half a minute for it to end politely.
        with contextlib.suppress(OSError):
            os.kill(int(number), signal.SIGKILL)
    os._exit(1)
