"""A new file written front to back and past the page cache, hashed on the way.

What is written once and not read again has no use for the page cache: there it pushes out what is
being read, and fresh pages cost the kernel more than the disk. Where a file system does not take
such writes (``O_DIRECT``), the same ones go through the cache.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

SEGMENT = 2**22  # bytes of one write; a multiple of any disk's block
SEGMENTS = 5  # filled, hashed and written at once
BLOCK = 2**12  # what a direct write's size and place are multiples of
DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it

Bytes = np.ndarray[Any, Any]


class DirectFile:
    """A file to :meth:`append` to, and to :meth:`close` when it is whole."""

    def __init__(self, path: Path) -> None:
        """Open the file, empty.

        Raises:
            OSError: when that cannot be done, as every method does when the disk refuses.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self._file = os.open(path, flags | DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._file = os.open(path, flags, 0o666)
        self._digest = sha256()
        self._hashing, self._writing = ThreadPoolExecutor(1), ThreadPoolExecutor(2)
        self._free = [_aligned() for _ in range(SEGMENTS)]
        self._sent: deque[tuple[Bytes, list[Future[None]]]] = deque()
        self._segment = self._free.pop()
        self._filled = self._position = 0

    def __enter__(self) -> DirectFile:
        """Return the file."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file, whole or not."""
        for threads in (self._hashing, self._writing):
            threads.shutdown(cancel_futures=True)
        os.close(self._file)

    def append(self, data: Bytes) -> None:
        """Copy bytes (uint8) to the end of the file; they may be changed afterwards."""
        while data.size:
            if self._filled == SEGMENT:
                self._send()
                self._segment = self._free.pop() if self._free else self._written()
            size = min(SEGMENT - self._filled, data.size)
            self._segment[self._filled : self._filled + size] = data[:size]
            self._filled += size
            data = data[size:]

    def close(self) -> str:
        """Bring everything to the disk; return its sha256."""
        self._send()
        while self._sent:
            self._written()
        os.ftruncate(self._file, self._position)  # the last block was written whole
        os.fsync(self._file)
        return self._digest.hexdigest()

    def _send(self) -> None:
        """Give the segment to the hash and, its last block filled up, to the disk."""
        segment, size = self._segment, self._filled
        whole = -(-size // BLOCK) * BLOCK
        segment[size:whole] = 0
        orders = [
            self._hashing.submit(self._digest.update, segment[:size].data),
            self._writing.submit(self._write, segment[:whole].data, self._position),
        ]
        self._sent.append((segment, orders))
        self._position, self._filled = self._position + size, 0

    def _written(self) -> Bytes:
        """Wait for the segment sent first, and return it."""
        segment, orders = self._sent.popleft()
        for order in orders:
            order.result()
        return segment

    def _write(self, left: memoryview, position: int) -> None:
        direct = bool(DIRECT)
        while left:  # a part may be taken, and the reason be said only when asked again
            try:
                written = os.pwrite(self._file, left, position)
            except OSError as error:
                if error.errno != errno.EINVAL or not direct:
                    raise
                direct = False  # not on this file system, or not with these blocks
                flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
                fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~DIRECT)
            else:
                left, position = left[written:], position + written


def _aligned() -> Bytes:
    """Return a segment of memory that begins with a page."""
    return np.frombuffer(mmap.mmap(-1, SEGMENT), np.uint8)
