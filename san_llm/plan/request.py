"""What a plan was asked for: a recipe, and the devices that it would run on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from san_llm.errors import InputError, check_one_of
from san_llm.launch.devices import has_driver
from san_llm.plan.memory import Device
from san_llm.shown import parse_size

DEVICES: tuple[Device, ...] = get_args(Device)


@dataclass(frozen=True)
class PlanRequest:
    """What ``san-llm plan`` was asked.

    Attributes:
        recipe: A recipe file, or the name of a shipped one.
        overrides: ``key=value`` arguments.
        memory: What a device has, such as ``24GB``; None: no limit.
        device: ``cpu`` or ``cuda``; None: this machine's.
        devices: How many devices, with a process for each.
        sharded: Whether they share the base among them (FSDP2).
        data: Tokenize the rows, for their real lengths.
    """

    recipe: str
    overrides: Sequence[str] = ()
    memory: str | None = None
    device: str | None = None
    devices: int = 1
    sharded: bool = False
    data: bool = False


def find_device(name: str | None) -> Device:
    """Return a device by its name; without one what this machine has, by its driver.

    Raises:
        InputError: when there is no such name.
    """
    if name is not None:
        check_one_of("--device", name, DEVICES)
        return "cuda" if name == "cuda" else "cpu"
    return "cuda" if has_driver() else "cpu"


def bytes_of(memory: str) -> int:
    """Return the bytes of what a device has, such as ``24GB``, ``24GiB`` or ``24G``.

    Raises:
        InputError: when it is no size.
    """
    text = memory.strip()
    try:
        return parse_size(text if text.upper().endswith("B") else f"{text}B")
    except InputError:
        raise InputError(
            f"--memory: expected a size such as 24GB or 24GiB, found {memory!r}"
        ) from None
