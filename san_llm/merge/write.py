"""The files of merged weights, written at the speed of the disk, hashed on their way."""

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

from san_llm.merge.direct_file import DirectFile
from san_llm.models.weights import (
    BLOCK,
    INDEX,
    RAW,
    SINGLE,
    SIZES,
    Numbers,
    Stored,
    converted,
    raw_numbers,
    read_into,
    stored_bytes,
)

PIECE = 2**20  # bytes that a thread reads and works out at once
THREADS = min(4, os.cpu_count() or 1) + 1  # one more than cores: some wait for the disk


@dataclass(frozen=True)
class Output:
    """A tensor to write.

    Attributes:
        name: The tensor's name.
        dtype: The dtype to store it as.
        shape: The tensor's shape.
        source: The stored tensor that it comes from; None: it starts as zeros.
        merge: Makes fp32 rows ``(rows, first, last)`` those to write, in place or not, but keeps
            none of them; None leaves them as they are. Called from several threads.
        beside: The base's file beside whose tensors it is written, where those are kept together.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Stored | None
    merge: Callable[[Numbers, int, int], Numbers] | None = None
    beside: Path | None = None

    @property
    def copied(self) -> bool:
        """Whether its bytes are those of its source."""
        return self.merge is None and self.source is not None and self.source.dtype == self.dtype

    @property
    def size(self) -> int:
        """How many bytes it takes."""
        if self.source is not None and self.source.dtype == self.dtype:
            return self.source.size  # of any kind of number
        return int(np.prod(self.shape)) * SIZES[self.dtype]


def write_weights(
    folder: Path, outputs: Sequence[Output], shard_size: int | None, done: Callable[[int], None]
) -> dict[str, str]:
    """Write tensors as a model's weights, named and indexed as transformers does.

    Args:
        folder: The model folder, which is there already.
        outputs: The tensors, in order.
        shard_size: Bytes that a file may hold, unless one tensor alone is larger; None: each holds
            what one of the base's does.
        done: Called with the number of bytes written since the last call.

    Returns:
        The sha256 of each file written, by name.
    """
    shards: list[list[Output]] = [[]]
    for output in outputs:
        full = (
            output.beside != shards[-1][-1].beside
            if shard_size is None and shards[-1]
            else sum(o.size for o in shards[-1]) + output.size > (shard_size or math.inf)
        )
        if shards[-1] and full:
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
    """Read rows and merge them; return ``data``, their bytes."""
    source = output.source
    with nullcontext() if source is None else source.file.open("rb", buffering=0) as opened:
        if source is not None and output.copied:
            read_into(opened, source, first, data)
        else:
            _merge(output, opened, first, last, data)
    return data


def _merge(output: Output, opened: Any, first: int, last: int, data: Numbers) -> None:
    """Work some rows' bytes out, in blocks that fit a core's cache."""
    source, shape = output.source, output.shape[1:]
    rounded = data.view(RAW[output.dtype]).reshape(last - first, *shape)
    step = max(1, BLOCK // max(1, math.prod(shape)))
    for start in range(first, last, step):
        stop = min(start + step, last)
        rows = _room("wide", (stop - start, *shape), np.float32)
        if source is None:
            rows[...] = 0
        else:
            room = _room("raw", (stored_bytes(source, start, stop),), np.uint8)
            raw = raw_numbers(read_into(opened, source, start, room), source, stop - start)
            converted(raw, rows)
        if output.merge is not None:
            rows = output.merge(rows, start, stop)
        converted(rows, rounded[start - first : stop - first])
