"""Safetensors checkpoints tensor by tensor, in numpy: no torch, and never a whole model in memory.

Format: https://huggingface.co/docs/safetensors: eight bytes with the header's length, a JSON header
with the dtype, shape and offsets of each tensor, then the numbers. A checkpoint is one such file,
or several with an index.
"""

from __future__ import annotations

import errno
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from queue import Queue
from typing import IO, Any

import numpy as np

from san_llm.errors import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# The numbers of a checkpoint that is not quantized; bf16 is read as the upper half of an fp32.
SIZES = {"F32": 4, "BF16": 2, "F16": 2}
# Bytes of the other kinds of numbers that a file may hold, of which only the place is read.
OTHERS = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1}
OTHERS |= {"BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
BLOCK = 2**17  # numbers worked on at once: what fits a core's cache
COPY = 2**24  # bytes copied at once

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
            if size < 8 or length > min(size - 8, 10**8):
                raise InputError(f"{file}: not a safetensors file, or cut short")
            header = json.loads(opened.read(length))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
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


def widen(raw: Numbers, dtype: str) -> Numbers:
    """Return stored numbers as fp32: uint16 patterns of bf16, float16 or float32."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)


def narrow(wide: Numbers, dtype: str) -> Numbers:
    """Return fp32 numbers rounded once, to nearest even, to a stored dtype; changes ``wide``."""
    if dtype == "F32":
        return wide
    if dtype == "F16":
        with np.errstate(over="ignore"):  # to infinity, as every conversion does
            return wide.astype(np.float16)
    nan = np.isnan(wide)
    bits = wide.view(np.uint32)
    odd = bits >> 16
    odd &= 1
    bits += odd
    bits += 0x7FFF
    bits >>= 16
    rounded = bits.astype(np.uint16)
    if nan.any():
        rounded[nan] = 0x7FC0
    return rounded


_RAW: dict[str, Any] = {"F32": np.dtype("<f4"), "BF16": np.dtype("<u2"), "F16": np.dtype("<f2")}


def read_rows(tensor: Stored, first: int = 0, last: int | None = None) -> Numbers:
    """Return rows of a stored tensor as fp32, (last - first, ...).

    Raises:
        InputError: when its numbers are of a kind that is not read.
    """
    if tensor.dtype not in SIZES:
        raise InputError(
            f"{tensor.file}: {tensor.name} is stored as {tensor.dtype}; only "
            f"{', '.join(SIZES)} can be merged"
        )
    last = tensor.shape[0] if last is None else last
    width = int(np.prod(tensor.shape[1:]))
    offset = tensor.start + first * width * SIZES[tensor.dtype]
    count = (last - first) * width
    raw: Numbers = np.fromfile(str(tensor.file), _RAW[tensor.dtype], count, offset=offset)
    if len(raw) < count:
        raise InputError(f"{tensor.file}: cut short while it was read")
    return widen(raw, tensor.dtype).reshape(last - first, *tensor.shape[1:])


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
        source: The stored tensor that it comes from, or None for numbers of its own.
        rows: Gives its fp32 rows from ``first`` to ``last``; None copies the source.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Stored | None
    rows: Callable[[int, int], Numbers] | None = None

    @property
    def size(self) -> int:
        """How many bytes it takes."""
        if self.source is not None and self.rows is None:
            return self.source.size
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
    sums = {}
    for name, shard in zip(names, shards, strict=True):
        sums[name] = _write_shard(folder / name, shard, done)
    if count > 1:
        index = {
            "metadata": {"total_size": sum(output.size for output in outputs)},
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
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("w+b", buffering=0) as file, _Follower(path) as follower:
        _write_all(file, len(header).to_bytes(8, "little") + header)
        follower.reach(8 + len(header))
        written = 8 + len(header)
        for output in outputs:
            pieces = _copy(output, file) if output.rows is None else _computed(output, file)
            for piece in pieces:
                written += piece
                follower.reach(written)
                done(piece)
        os.fsync(file.fileno())
    return follower.digest()


def _copy(output: Output, file: IO[bytes]) -> Iterator[int]:
    """Copy a stored tensor's bytes inside the kernel; give the size of each piece."""
    source = output.source
    assert source is not None, "a copy has a source"
    with source.file.open("rb") as opened:
        start, end = source.start, source.start + source.size
        while start < end:
            size = min(COPY, end - start)
            try:
                sent = os.sendfile(file.fileno(), opened.fileno(), start, size)
            except OSError as error:
                if error.errno not in (errno.ENOTSOCK, errno.EINVAL, errno.ENOSYS):
                    raise
                sent = file.write(os.pread(opened.fileno(), size, start))  # not on Linux
            if not sent:
                raise InputError(f"{source.file}: cut short while it was read")
            start += sent
            yield sent


def _computed(output: Output, file: IO[bytes]) -> Iterator[int]:
    assert output.rows is not None, "a computed tensor has rows"
    shape = Stored(output.name, output.dtype, output.shape, Path(), 0, 0)
    pending: list[Numbers] = []
    size = 0
    for first, last in row_blocks(shape):
        pending.append(narrow(output.rows(first, last), output.dtype))
        size += pending[-1].nbytes
        if size >= COPY or last == output.shape[0]:
            _write_all(file, b"".join(block.tobytes() for block in pending))
            yield size
            pending, size = [], 0


def _write_all(file: IO[bytes], data: bytes) -> None:
    left = memoryview(data)
    while left:  # an unbuffered file may take a part, and says why only when asked again
        left = left[file.write(left) :]


class _Follower:
    """Hashes a growing file in a thread of its own, right behind the writer."""

    def __init__(self, path: Path) -> None:
        self._path, self._sha256 = path, sha256()
        self._targets: Queue[int | None] = Queue()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def _follow(self) -> None:
        with self._path.open("rb", buffering=0) as file:
            position = 0
            while (target := self._targets.get()) is not None:
                while position < target:
                    piece = file.read(min(COPY, target - position))
                    if not piece:
                        return  # never written: the writer has failed
                    self._sha256.update(piece)
                    position += len(piece)

    def __enter__(self) -> _Follower:
        self._thread.start()
        return self

    def reach(self, size: int) -> None:
        """Say that the file has ``size`` bytes now."""
        self._targets.put(size)

    def __exit__(self, *_: object) -> None:
        self._targets.put(None)
        self._thread.join()

    def digest(self) -> str:
        """Return the sha256 of all that was reached."""
        return self._sha256.hexdigest()
