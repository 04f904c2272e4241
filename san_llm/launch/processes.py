"""Processes that work together: how many, which is the first, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

from san_llm.errors import InputError, SanError, debugging, of_the_disk, unexpected
from san_llm.launch.notes import tell_failure

T = TypeVar("T")

# How long processes wait for one another: within a step, where all do the same and NCCL's own ten
# minutes are short of a slow disk; and where one works alone while the others wait, as the first
# does that hashes a large base, or the last that still evaluates.
STEP, ALONE = timedelta(minutes=30), timedelta(days=2)


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
    from torch import distributed

    values = [value]
    distributed.broadcast_object_list(values, src=0, group=_waiting_group())
    return values[0]


def gather(values: list[T]) -> list[T]:
    """Return the values of all processes, in all of them."""
    if world_size() == 1:
        return values
    from torch import distributed

    group, gathered = _waiting_group(), [values] * world_size()
    distributed.all_gather_object(gathered, values, group=group)
    return [value for theirs in gathered for value in theirs]


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


@cache
def _waiting_group() -> Any:
    """Return the group in which processes wait for what one of them does alone.

    It is gloo's, on GPUs too: NCCL ends a process whose collective takes longer than its time-out,
    however much the others still have to do. Gloo notices at once when one is gone.
    """
    from torch import distributed

    _join()
    return distributed.new_group(backend="gloo", timeout=ALONE)


def _join() -> None:
    import torch
    from accelerate import PartialState

    gpus = torch.cuda.device_count()
    # Where each process is shown one GPU only, as srun can, that is it whatever the number.
    if gpus > 1 and int(os.environ.get("LOCAL_RANK", "0")) >= gpus:
        raise InputError(
            f"the launcher started {os.environ.get('LOCAL_WORLD_SIZE', 'more')} processes on this "
            f"machine, which has {gpus} GPUs, and each needs one of its own"
        )
    state: Any = PartialState(cpu=not torch.cuda.is_available(), timeout=STEP)
    if state.num_processes != world_size():
        raise SanError(
            f"the launcher started {world_size()} processes, but Accelerate sees "
            f"{state.num_processes}: they would work apart"
        )
