"""Which channel of a writer is which channel of a reader, as a form that fits any width."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from san_llm.architectures.entry import Carry
from san_llm.errors import InputError


@dataclass(frozen=True)
class ChannelMap:
    """How the channels of a writer are laid out in a reader.

    The writer's channels are so many ``parts`` side by side, of each of which a stretch is read:
    ``first`` stretches' lengths from its start. The reader has each stretch ``repeat`` times in a
    row, and all of that ``tile`` times in a row. ``units`` counts the stretches of one part that
    are repeated on their own, as heads are.

    Attributes:
        parts: Parts of the writer's channels: 1, or as many as heads that keep q, k and v together.
        units: Stretches of a part that are repeated on their own: key and value heads.
        before: Channels of a part before those that are read, as a multiple of what is read.
        after: Channels of a part after those, likewise.
        repeat: How often each stretch stands in the reader.
        tile: How often all of them do.
    """

    parts: int = 1
    units: int = 1
    before: float = 0
    after: float = 0
    repeat: int = 1
    tile: int = 1

    def source(self, d_out: int, d_in: int) -> NDArray[np.int64]:
        """Return the writer's channel behind each of the reader's, (d_in,).

        Raises:
            InputError: when the sizes do not go into such parts.
        """
        read, rest = divmod(d_in, self.parts * self.units * self.repeat * self.tile)
        part, over = divmod(d_out, self.parts)
        read *= self.units  # of each part
        before, after = round(self.before * read), round(self.after * read)
        if rest or over or not read or before + read + after != part:
            raise InputError(f"{d_out} channels do not make {d_in} of {self}")
        channels = np.arange(d_out).reshape(self.parts, part)[:, before : before + read]
        stretches = channels.reshape(self.parts * self.units, -1)
        return np.tile(np.repeat(stretches, self.repeat, axis=0).reshape(-1), self.tile)

    def carry(self, d_out: int, d_in: int) -> Carry:
        """Return it for a writer and a reader of these sizes.

        Raises:
            InputError: when they do not go into such parts.
        """
        source = self.source(d_out, d_in)
        read = len(source) // (self.parts * self.repeat * self.tile)
        before = int(source[0])
        return Carry(
            start=before,
            stop=before + read,
            groups=self.repeat,
            head_dim=read // self.units,
            parts=self.parts,
            tile=self.tile,
        )


def find_map(source: NDArray[np.int64], d_out: int) -> ChannelMap | None:
    """Return the form of a map, or None where it has none.

    Args:
        source: The writer's channel behind each of the reader's, (d_in,).
        d_out: How many channels the writer has.
    """
    d_in = len(source)
    tile = next(
        n
        for n in range(d_in, 0, -1)
        if d_in % n == 0 and (source == np.tile(source[: d_in // n], n)).all()
    )
    once = source[: d_in // tile]
    breaks = [0, *(np.flatnonzero(np.diff(once) != 1) + 1), len(once)]
    # A repeated head and the next one after it run on: the shortest run tells where heads end.
    length = math.gcd(*np.diff(breaks).tolist())
    if (once.reshape(-1, length) != once[::length, None] + np.arange(length)).any():
        return None
    heads = once[::length]
    distinct = list(dict.fromkeys(heads.tolist()))
    repeat, over = divmod(len(heads), len(distinct))
    if over:
        return None
    if len(distinct) == 1 and tile > 1 and repeat == 1:
        repeat, tile = tile, 1  # one head for all queries: the same as tiles
    strides = set(np.diff(distinct).tolist())
    if len(strides) > 1:
        return None
    stride = strides.pop() if strides else d_out
    if stride == length or len(distinct) == 1:
        parts, units, part = 1, len(distinct), d_out
    else:
        parts, units, part = len(distinct), 1, stride
    read = units * length
    before = distinct[0]
    after = part - before - read
    found = ChannelMap(parts, units, before / read, after / read, repeat, tile)
    try:
        fits = (found.source(d_out, d_in) == source).all()
    except InputError:
        return None
    return found if fits else None
