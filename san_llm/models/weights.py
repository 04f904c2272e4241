"""Safetensors weights tensor by tensor, in numpy: no torch, and never a whole model in memory.

Format: https://huggingface.co/docs/safetensors: eight bytes with the header's length, a JSON header
with the dtype, shape and offsets of each tensor, then the numbers. A model's weights are one
such file, or several with an index.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from san_llm.errors import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# The numbers of weights that are not quantized.
SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
# Bytes of the other kinds of numbers that a file may hold, of which only the place is read.
OTHERS = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1}
OTHERS |= {"BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
SPELLED = {stored: name for name, stored in DTYPES.items()}
BLOCK = 2**16  # numbers worked on at once: what fits a core's cache
Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies.

    Attributes:
        name: The tensor's name.
        dtype: As safetensors spells it: ``BF16``.
        shape: The tensor's shape.
        file: The file it is in.
        start: Where its bytes begin in the file.
        size: How many bytes it has.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int


def read_header(file: Path) -> list[Stored]:
    """Return the tensors of a safetensors file, in the order of their bytes.

    Raises:
        InputError: when the file is missing, cut short or no safetensors file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            head = opened.read(length) if size >= 8 and length <= min(size - 8, 10**8) else None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    if head is None:
        raise InputError(f"{file}: not a safetensors file, or cut short")
    try:
        header = json.loads(head)
    except (ValueError, RecursionError):
        raise InputError(f"{file}: not a safetensors file: its header is not JSON") from None
    tensors = []
    try:
        for name, facts in header.items():
            if name == "__metadata__":
                continue
            begin, end = facts["data_offsets"]
            start = 8 + length + begin
            shape = tuple(facts["shape"])
            tensors.append(Stored(name, facts["dtype"], shape, file, start, end - begin))
    except (TypeError, KeyError, ValueError, AttributeError):
        raise InputError(f"{file}: not a safetensors file: its header is not a table") from None
    for tensor in tensors:
        _check_place(tensor)
    tensors.sort(key=lambda tensor: (tensor.start, tensor.size))
    position = 8 + length
    for tensor in tensors:
        if tensor.start != position:
            raise InputError(f"{file}: damaged: {tensor.name} is not where the one before it ends")
        position += tensor.size
    if position > size:
        raise InputError(f"{file}: cut short: {size:,} bytes, its header speaks of {position:,}")
    if position < size:
        raise InputError(f"{file}: damaged: {size:,} bytes, its header speaks of {position:,}")
    return tensors


def _check_place(tensor: Stored) -> None:
    """Refuse a tensor whose numbers cannot be where the header says."""
    numbers = (tensor.start, tensor.size, *tensor.shape)
    if not isinstance(tensor.dtype, str) or any(type(n) is not int or n < 0 for n in numbers):
        raise InputError(f"{tensor.file}: not a safetensors file: its header is not a table")
    each = (SIZES | OTHERS).get(tensor.dtype)
    if each is not None and math.prod(tensor.shape) * each != tensor.size:
        raise InputError(
            f"{tensor.file}: damaged: {tensor.name} of the shape {tensor.shape} has "
            f"{tensor.size:,} bytes"
        )


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights of a model, be they such as are never loaded."""
    named = (folder / SINGLE).is_file() or (folder / INDEX).is_file()
    return named or any(folder.glob("pytorch_model*"))


def read_weights(folder: Path) -> list[Stored]:
    """Return the tensors of a model folder's weights, file by file.

    Those that were saved from a causal model's inner model, without ``model.`` before their names,
    have it here, as transformers loads them.

    Raises:
        InputError: when there is none, or a file of its index is missing or wrong.
    """
    tensors = stored_weights(folder)
    if all(tensor.name != "embed_tokens.weight" for tensor in tensors):
        return tensors
    return [
        tensor
        if tensor.name.startswith(("model.", "lm_head."))
        else replace(tensor, name=f"model.{tensor.name}")
        for tensor in tensors
    ]


def passed_over(folder: Path) -> str | None:
    """Return in words which weights of a folder are not read, where it holds two sets of them."""
    if not ((folder / SINGLE).is_file() and (folder / INDEX).is_file()):
        return None
    if set(_read_index(folder).values()) == {SINGLE}:
        return None
    return (
        f"{folder}: two sets of weights: {SINGLE} is read, as transformers does, and not the files "
        f"that {INDEX} names; remove the set that is not meant"
    )


def is_whole(folder: Path) -> bool:
    """Whether no weight in a folder is quantized, whatever the config beside it says."""
    return all(tensor.dtype in SIZES for tensor in read_weights(folder))


def stored_weights(folder: Path) -> list[Stored]:
    """Return what :func:`read_weights` does, by the names in the files.

    Raises:
        InputError: as there.
    """
    if (folder / SINGLE).is_file():  # before an index, as transformers looks
        return read_header(folder / SINGLE)
    if (folder / INDEX).is_file():
        weight_map = _read_index(folder)
        files = sorted(set(weight_map.values()))
        tensors = [tensor for file in files for tensor in read_header(folder / file)]
        lost = set(weight_map) - {tensor.name for tensor in tensors}
        if lost:
            raise InputError(f"{folder / INDEX}: {min(lost)} is in none of its files")
        return tensors
    hint = ""
    for pickled in sorted([*folder.glob("*.bin"), *folder.glob("*.pt*")])[:1]:
        hint = f"; {pickled.name} is a pickle and can run code, so it is never loaded: convert it"
    raise InputError(f"{folder}: no {SINGLE} and no {INDEX} in it{hint}")


def _read_index(folder: Path) -> dict[str, str]:
    """Return which file of a folder holds each tensor, as its index says."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        weight_map: dict[str, str] = dict(index["weight_map"])
        strange = [file for file in weight_map.values() if Path(file).name != file]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path}: not an index of safetensors files") from None
    if strange:
        raise InputError(f"{path}: {min(strange)!r} is not a file in the same folder")
    if "metadata" not in index:
        raise InputError(
            f'{path}: has no "metadata", without which transformers does not load it; add '
            '"metadata": {} to it'
        )
    return weight_map


def converted(numbers: Numbers, out: Numbers) -> Numbers:
    """Return numbers in the dtype of ``out``, rounded to nearest even where it has fewer places."""
    with np.errstate(over="ignore", invalid="ignore"):  # to infinity, and a NaN to a NaN
        np.copyto(out, numbers, casting="unsafe")
    return out


RAW: dict[str, Any] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
}


def read_rows(tensor: Stored, first: int = 0, last: int | None = None) -> Numbers:
    """Return rows of a stored tensor as fp32, (last - first, ...).

    Raises:
        InputError: when its numbers are of a kind that is not read.
    """
    last = tensor.shape[0] if last is None else last
    with tensor.file.open("rb", buffering=0) as file:
        data = np.empty(stored_bytes(tensor, first, last), np.uint8)
        read_into(file, tensor, first, data)
    raw = raw_numbers(data, tensor, last - first)
    return converted(raw, np.empty(raw.shape, np.float32))


def read_bytes(tensor: Stored) -> Iterator[bytes]:
    """Give a stored tensor's bytes, some at a time."""
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        left = tensor.size
        while left:
            piece = file.read(min(left, 2**22))
            if not piece:
                raise InputError(f"{tensor.file}: cut short while it was read")
            left -= len(piece)
            yield piece


def stored_bytes(tensor: Stored, first: int, last: int) -> int:
    """Return how many bytes some rows of a tensor take in its file."""
    return (last - first) * (tensor.size // (tensor.shape[0] if tensor.shape else 1))


def read_into(file: Any, tensor: Stored, first: int, data: Numbers) -> Numbers:
    """Read bytes into ``data``, as many as it holds, from a row's first on; return it."""
    file.seek(tensor.start + stored_bytes(tensor, 0, first))
    left = data.data
    while left:
        got = file.readinto(left)
        if not got:
            raise InputError(f"{tensor.file}: cut short while it was read")
        left = left[got:]
    return data


def raw_numbers(data: Numbers, tensor: Stored, rows: int) -> Numbers:
    """Return bytes as rows of numbers in the tensor's dtype."""
    if tensor.dtype not in SIZES:
        raise InputError(
            f"{tensor.file}: {tensor.name} is stored as {tensor.dtype}; only "
            f"{', '.join(SIZES)} can be merged"
        )
    numbers: Numbers = data.view(RAW[tensor.dtype])
    return numbers.reshape(rows, *tensor.shape[1:])


def row_blocks(tensor: Stored) -> Iterator[tuple[int, int]]:
    """Iterate over ``(first, last)`` row numbers of blocks that fit a core's cache."""
    width = max(1, int(np.prod(tensor.shape[1:])))
    step = max(1, BLOCK // width)
    for first in range(0, tensor.shape[0], step):
        yield first, min(first + step, tensor.shape[0])
