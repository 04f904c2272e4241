"""Files of others, read by other libraries: what can break there becomes one line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from san_llm.errors import InputError, SanError

if TYPE_CHECKING:
    import torch


def load_or_refuse(what: str, name: str, load: Any, **keywords: Any) -> Any:
    """Return what ``load`` gives for a folder or hub id; what goes wrong there becomes one line."""
    try:
        return load(name, **keywords)
    except Exception as error:  # files of others, read by several libraries: anything can break
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # torch's first line on weights that do not fit says nothing: the second says which.
        first = lines[1] if len(lines) > 1 and lines[0].endswith(":") else "".join(lines[:1])
        if isinstance(error, RecursionError):
            raise InputError(f"{name}: its {what} cannot be loaded: nested too deeply") from error
        if isinstance(error, KeyError):
            first = f"the key {first} is missing"
        # A library that trips over a file's content says so with any of Python's errors.
        failed = isinstance(error, (RuntimeError, MemoryError, ImportError))
        kind = SanError if failed else InputError
        raise kind(
            f"{name}: its {what} cannot be loaded: {first or type(error).__name__}"
        ) from error


def is_finite(numbers: torch.Tensor) -> bool:
    """Whether all of a tensor is finite; of a sharded one, all that is here."""
    import torch
    from torch.distributed.tensor import DTensor

    if isinstance(numbers, DTensor):
        numbers = numbers.to_local()
    # Smallest and largest: a NaN is both, and no mask of the weight's size is made.
    return not numbers.numel() or bool(torch.isfinite(torch.stack(numbers.aminmax())).all())
