"""Safetensors checkpoints tensor by tensor, in numpy: no torch, and never a whole model in memory.

Format: https://huggingface.co/docs/safetensors: eight bytes with the header's length, a JSON header
with the dtype, shape and offsets of each tensor, then the numbers. A checkpoint is one such file,
or several with an index.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from san_llm.direct_file import DirectFile
from san_llm.errors import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# The numbers of a checkpoint that is not quantized; bf16 is read as the upper half of an fp32.
SIZES = {"F32": 4, "BF16": 2, "F16": 2}
# Bytes of the other kinds of numbers that a file may hold, of which only the place is read.
OTHERS = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1}
OTHERS |= {"BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
BLOCK = 2**16  # numbers worked on at once: what fits a core's cache
PIECE = 2**20  # bytes that a thread reads and works out at once
THREADS = min(4, os.cpu_count() or 1) + 1  # one more than cores: some wait for the disk

Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies.

    Attributes:
        name: The tensor's name.
        dtype: As safetensors spells it: ``BF16``.
        shape: Its shape.
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


def read_checkpoint(folder: Path) -> list[Stored]:
    """Return the tensors of a checkpoint, file by file.

    Raises:
        InputError: when there is none, or a file of its index is missing or wrong.
    """
    if (folder / INDEX).is_file():
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            files = sorted(set(index["weight_map"].values()))
            strange = [file for file in files if Path(file).name != file]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise InputError(f"{folder / INDEX}: not an index of safetensors files") from None
        if strange:
            raise InputError(f"{folder / INDEX}: {strange[0]!r} is not a file in the same folder")
        tensors = [tensor for file in files for tensor in read_header(folder / file)]
        lost = set(index["weight_map"]) - {tensor.name for tensor in tensors}
        if lost:
            raise InputError(f"{folder / INDEX}: {min(lost)} is in none of its files")
        return tensors
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    hint = ""
    for pickled in sorted([*folder.glob("*.bin"), *folder.glob("*.pt*")])[:1]:
        hint = f"; {pickled.name} is a pickle and can run code, so it is never loaded: convert it"
    raise InputError(f"{folder}: no {SINGLE} and no {INDEX} in it{hint}")


def widen(raw: Numbers, dtype: str, out: Numbers) -> Numbers:
    """Return stored numbers in fp32 (``out``): uint16 patterns of bf16, float16 or float32."""
    if dtype == "BF16":
        bits = out.view(np.uint32)
        bits[...] = raw
        bits <<= 16
    else:
        out[...] = raw
    return out


def narrow(wide: Numbers, dtype: str, out: Numbers, odd: Numbers) -> Numbers:
    """Return fp32 numbers rounded once, to nearest even, to a stored dtype.

    Args:
        wide: The numbers; they are changed.
        dtype: Which dtype.
        out: Where the rounded ones go.
        odd: Room to work in, as many uint32.
    """
    if dtype != "BF16":
        with np.errstate(over="ignore"):  # to infinity, as every conversion does
            out[...] = wide
        return out
    nan = np.isnan(wide) if wide.size and np.isnan(wide.max()) else None
    bits = wide.view(np.uint32)
    np.right_shift(bits, 16, out=odd)
    odd &= 1
    odd += 0x7FFF
    bits += odd
    bits >>= 16
    np.copyto(out, bits, casting="unsafe")
    if nan is not None:
        out[nan] = 0x7FC0
    return out


_RAW: dict[str, Any] = {"F32": np.dtype("<f4"), "BF16": np.dtype("<u2"), "F16": np.dtype("<f2")}


def read_rows(tensor: Stored, first: int = 0, last: int | None = None) -> Numbers:
    """Return rows of a stored tensor as fp32, (last - first, ...).

    Raises:
        InputError: when its numbers are of a kind that is not read.
    """
    last = tensor.shape[0] if last is None else last
    with tensor.file.open("rb", buffering=0) as file:
        data = _read(file, tensor, first, last, np.empty(_bytes(tensor, first, last), np.uint8))
    raw = _numbers(data, tensor, last - first)
    return widen(raw, tensor.dtype, np.empty(raw.shape, np.float32))


def _bytes(tensor: Stored, first: int, last: int) -> int:
    return (last - first) * (tensor.size // (tensor.shape[0] if tensor.shape else 1))


def _read(file: Any, tensor: Stored, first: int, last: int, data: Numbers) -> Numbers:
    """Read some rows' bytes into ``data``, and return it."""
    file.seek(tensor.start + _bytes(tensor, 0, first))
    left = data.data
    while left:
        got = file.readinto(left)
        if not got:
            raise InputError(f"{tensor.file}: cut short while it was read")
        left = left[got:]
    return data


def _numbers(data: Numbers, tensor: Stored, rows: int) -> Numbers:
    if tensor.dtype not in SIZES:
        raise InputError(
            f"{tensor.file}: {tensor.name} is stored as {tensor.dtype}; only "
            f"{', '.join(SIZES)} can be merged"
        )
    numbers: Numbers = data.view(_RAW[tensor.dtype])
    return numbers.reshape(rows, *tensor.shape[1:])


def row_blocks(tensor: Stored) -> Iterator[tuple[int, int]]:
    """Iterate over ``(first, last)`` row numbers of blocks that fit a core's cache."""
    width = max(1, int(np.prod(tensor.shape[1:])))
    step = max(1, BLOCK // width)
    for first in range(0, tensor.shape[0], step):
        yield first, min(first + step, tensor.shape[0])


@dataclass(frozen=True)
class Output:
    """A tensor to write.

    Attributes:
        name: Its name.
        dtype: The dtype to store it as.
        shape: Its shape.
        source: The stored tensor that it comes from; None: it starts as zeros.
        fold: Makes fp32 rows ``(rows, first, last)`` those to write, in place or not, but keeps
            none of them; None leaves them as they are. Called from several threads.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Stored | None
    fold: Callable[[Numbers, int, int], Numbers] | None = None

    @property
    def copied(self) -> bool:
        """Whether its bytes are those of its source."""
        return self.fold is None and self.source is not None and self.source.dtype == self.dtype

    @property
    def size(self) -> int:
        """How many bytes it takes."""
        if self.source is not None and self.source.dtype == self.dtype:
            return self.source.size  # of any kind of number
        return int(np.prod(self.shape)) * SIZES[self.dtype]


def write_checkpoint(
    folder: Path, outputs: Sequence[Output], shard_size: int, done: Callable[[int], None]
) -> dict[str, str]:
    """Write tensors as a checkpoint, named and indexed as transformers does.

    Args:
        folder: Where to; there already.
        outputs: The tensors, in order.
        shard_size: Bytes that a file may hold, unless one tensor alone is larger.
        done: Called with the number of bytes written since the last call.

    Returns:
        The sha256 of each file written, by name.
    """
    shards: list[list[Output]] = [[]]
    for output in outputs:
        if shards[-1] and sum(o.size for o in shards[-1]) + output.size > shard_size:
            shards.append([])
        shards[-1].append(output)
    count = len(shards)
    names = (
        [SINGLE]
        if count == 1
        else [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    )
    sums = {
        name: _write_shard(folder / name, shard, done)
        for name, shard in zip(names, shards, strict=True)
    }
    if count > 1:
        index = {
            "metadata": {
                "total_parameters": sum(math.prod(output.shape) for output in outputs),
                "total_size": sum(output.size for output in outputs),
            },
            "weight_map": {
                output.name: name
                for name, shard in sorted(zip(names, shards, strict=True))
                for output in shard
            },
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")
    return sums


def _write_shard(path: Path, outputs: Sequence[Output], done: Callable[[int], None]) -> str:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for output in outputs:
        table[output.name] = {
            "dtype": output.dtype,
            "shape": list(output.shape),
            "data_offsets": [position, position + output.size],
        }
        position += output.size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    with DirectFile(path) as file, ThreadPoolExecutor(THREADS) as threads:
        file.append(np.frombuffer(header, np.uint8))
        waiting: deque[Future[Numbers]] = deque()
        room = _Ring(2 * THREADS + 1)

        def write_first() -> None:
            piece = waiting.popleft().result()
            file.append(piece)
            done(len(piece))

        for output, first, last, size in _pieces(outputs):
            waiting.append(threads.submit(_piece, output, first, last, room.take(size)))
            if len(waiting) > 2 * THREADS:
                write_first()
        while waiting:
            write_first()
        return file.close()


def _pieces(outputs: Sequence[Output]) -> Iterator[tuple[Output, int, int, int]]:
    """Iterate over ``(output, first row, last row, bytes)`` of pieces, in the order of the file."""
    for output in outputs:
        rows = output.shape[0] if output.shape else 1
        if not output.size:
            continue
        row = output.size // rows
        step = max(1, PIECE // row)
        for first in range(0, rows, step):
            last = min(first + step, rows)
            yield output, first, last, (last - first) * row


class _Ring:
    """Room that is used again: fresh memory costs the kernel as much as what is done with it."""

    def __init__(self, count: int) -> None:
        self._rooms: deque[Numbers] = deque([np.empty(0, np.uint8)] * count)

    def take(self, size: int) -> Numbers:
        """Return ``size`` bytes that nobody else uses until all others have been taken once."""
        room = self._rooms.popleft()
        if room.size < size:
            room = np.empty(max(size, PIECE), np.uint8)
        self._rooms.append(room)
        return room[:size]


_OF_THREAD = threading.local()


def _room(name: str, shape: tuple[int, ...], dtype: Any) -> Numbers:
    """Return this thread's room for an array of that name, which its next one overwrites."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    room = getattr(_OF_THREAD, name, None)
    if room is None or room.size < size:
        room = np.empty(size, np.uint8)
        setattr(_OF_THREAD, name, room)
    numbers: Numbers = room[:size].view(dtype).reshape(shape)
    return numbers


def _piece(output: Output, first: int, last: int, data: Numbers) -> Numbers:
    """Read rows and fold them; return ``data``, their bytes."""
    source = output.source
    with nullcontext() if source is None else source.file.open("rb", buffering=0) as opened:
        if source is not None and output.copied:
            _read(opened, source, first, last, data)
        else:
            _fold(output, opened, first, last, data)
    return data


def _fold(output: Output, opened: Any, first: int, last: int, data: Numbers) -> None:
    """Work some rows' bytes out, in blocks that fit a core's cache."""
    source, shape = output.source, output.shape[1:]
    made = data.view(_RAW[output.dtype]).reshape(last - first, *shape)
    step = max(1, BLOCK // max(1, math.prod(shape)))
    for start in range(first, last, step):
        stop = min(start + step, last)
        rows = _room("wide", (stop - start, *shape), np.float32)
        if source is None:
            rows[...] = 0
        else:
            room = _room("raw", (_bytes(source, start, stop),), np.uint8)
            raw = _numbers(_read(opened, source, start, stop, room), source, stop - start)
            widen(raw, source.dtype, rows)
        if output.fold is not None:
            rows = output.fold(rows, start, stop)
        odd = _room("odd", rows.shape, np.uint32)
        narrow(rows, output.dtype, made[start - first : stop - first], odd)
