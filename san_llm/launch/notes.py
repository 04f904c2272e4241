"""What command, launcher and workers tell each other: notes in a folder that the three share."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil

NOTES = "SAN_LLM_NOTES"  # the environment's name for the folder of notes
VERDICT, FAILURE, READY, STOPPED_BY = "verdict", "failure", "ready", "stopped"
FAILED, REFUSED = "failed", "refused"  # the first line of a failure's note
_PARENT = os.getppid()  # of a worker: its launcher


def send(number: int, processes: list[psutil.Process]) -> None:
    """Send a signal to those of the processes that have not ended yet."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


def launcher_is_gone() -> bool:
    """Whether the launcher that started this worker has ended."""
    return os.getppid() != _PARENT


def tell_ready() -> None:
    """Let the command know that this worker, if it is the first here, can be asked to stop."""
    _tell(READY, str(os.getpid()))


def tell_stopped(name: str) -> None:
    """Let the command know by which signal the workers were stopped: ``SIGINT`` or ``SIGTERM``."""
    _tell(STOPPED_BY, name)


def _tell(kind: str, text: str) -> None:
    if NOTES in os.environ and os.environ.get("LOCAL_RANK", "0") == "0":
        with contextlib.suppress(OSError):  # the command is gone, and its notes
            note = Path(os.environ[NOTES], f".{kind}")
            note.write_text(text)
            note.rename(note.with_name(kind))


def tell_failure(
    message: str, first: bool = True, verdict: bool = False, refused: bool = False
) -> bool:
    """Leave a worker's error for the command to tell; say whether there is a command that will.

    Args:
        message: What went wrong.
        first: Keep an earlier message. What fails next fails because of the first, mostly.
        verdict: It is certain that this came first: no other message counts.
        refused: The input was wrong; nothing has failed.
    """
    if NOTES not in os.environ:
        return False
    note = Path(os.environ[NOTES], VERDICT if verdict else FAILURE)
    try:
        with note.open("x" if first else "w", encoding="utf-8") as file:
            file.write(f"{REFUSED if refused else FAILED}\n{message}")
    except FileExistsError:
        pass
    except OSError:  # the command is gone, and its notes
        return False
    return True
