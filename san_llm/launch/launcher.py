"""The process between a command and its workers: Accelerate's launcher, watched."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, NoReturn

import psutil

from san_llm.errors import debugging
from san_llm.launch.notes import send, tell_failure

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

FROZEN = 20.0  # seconds after which a worker that SIGSTOP holds counts as lost


def leave() -> NoReturn:
    """End a worker that has done its work, without the interpreter's own end.

    The process group's threads can outlive their owner there, and a worker that is aborted at its
    very end makes its launcher call the whole job failed.
    """
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _watch(parent: int) -> None:
    """Ask the workers to stop when the command that started the launcher is gone.

    Also end one that is frozen: its peers notice, but here may be no other that could end it.
    """
    held: dict[int, float] = {}
    while os.getppid() == parent:
        time.sleep(0.5)
        for worker in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                stopped = worker.status() == psutil.STATUS_STOPPED
                held[worker.pid] = held.get(worker.pid, 0) + 0.5 if stopped else 0
                if held[worker.pid] > FROZEN:
                    rank = worker.environ().get("RANK")
                    tell_failure(
                        f"process {rank} was frozen (SIGSTOP) for {FROZEN:.0f} s", verdict=True
                    )
                    worker.kill()
    send(signal.SIGTERM, psutil.Process().children())


def first_failure(error: ChildFailedError) -> tuple[int, int]:
    """Return the rank and exit code of the worker that failed first.

    Torch notes the second, and takes the lowest rank of it. A worker that a signal has ended did
    not fail because of others; only SIGTERM is what a launcher sends to those that are left.
    """

    def place(rank: int) -> tuple[int, bool]:
        failure = error.failures[rank]
        return failure.timestamp, failure.exitcode >= 0 or failure.exitcode == -signal.SIGTERM

    rank = min(error.failures, key=place)
    return rank, error.failures[rank].exitcode


def _main() -> None:
    """Run Accelerate's launcher without its own report of a worker that has told its error."""
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()
    from accelerate.commands.launch import main
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if not debugging():
        logging.disable()
    try:
        main()
    except ChildFailedError as error:
        rank, code = first_failure(error)
        if code < 0:
            hint = "; out of memory?" if code == -signal.SIGKILL else ""
            message = f"process {rank} was ended by {signal.Signals(-code).name}{hint}"
            tell_failure(message, first=code == -signal.SIGTERM)
        else:
            tell_failure(f"process {rank} ended with exit code {code}")
        sys.exit(1)
    except SignalException:
        # The whole group was asked to stop, as Slurm does: the workers have saved, and said so.
        sys.exit(0)
    except Exception as error:
        tell_failure(f"accelerate launch: {' '.join(str(error).split())}")
        sys.exit(1)


if __name__ == "__main__":
    _main()
