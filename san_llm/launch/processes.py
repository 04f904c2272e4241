"""Processes that work together: how many, which is the first, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from san_llm.errors import InputError, SanError, debugging, of_the_disk, unexpected
from san_llm.launch.notes import tell_failure

T = TypeVar("T")


def world_size() -> int:
    """Return how many processes work together, as their launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return this process's number among them."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this process is the one that speaks and writes."""
    return rank() == 0


def agree(value: T) -> T:
    """Return the first process's ``value`` in all of them."""
    if world_size() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    _join()
    agreed: T = broadcast_object_list([value])[0]
    return agreed


def gather(values: list[T]) -> list[T]:
    """Return the values of all processes, in all of them."""
    if world_size() == 1:
        return values
    from accelerate.utils import gather_object

    _join()
    gathered: list[T] = gather_object(values)
    return gathered


def in_one_line(error: Exception) -> str:
    """Return what an error of ours or of the disk says, and of another its kind and first line."""
    return str(error) if isinstance(error, SanError) else of_the_disk(error) or unexpected(error)


@contextmanager
def told_once(message_of: Callable[[Exception], str] = in_one_line) -> Iterator[None]:
    """Leave what goes wrong in one of several processes to the command that started them.

    In a process alone, and with ``--debug``, the error goes its way.

    Args:
        message_of: Gives what the command is to say of an error.
    """
    try:
        yield
    except Exception as error:
        refused = isinstance(error, InputError)
        if not debugging() and tell_failure(message_of(error), refused=refused):
            raise SystemExit(1) from None
        raise


def _join() -> None:
    import torch
    from accelerate import PartialState

    state: Any = PartialState(cpu=not torch.cuda.is_available())
    if state.num_processes != world_size():
        raise SanError(
            f"the launcher started {world_size()} processes, but Accelerate sees "
            f"{state.num_processes}: they would work apart"
        )
