"""How glibc's malloc serves large tensors, where a run would rather have memory than time.

A tensor that is freed between two that are kept leaves a hole, and malloc (2.36) does not put
another of the same size into it: torch asks for aligned memory, for which malloc wants a little
more room than was left. A training's holes come to a third or more of what autograd keeps, and to
several times of it with gradient checkpointing, which keeps little and makes much for a moment.
"""

from __future__ import annotations

import ctypes
import platform

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
LARGE = 2**20  # bytes


def spares_memory(checkpointing: bool, bits: str | None) -> bool:
    """Whether a run has memory rather than time: it checkpoints, or its base is quantized."""
    return checkpointing or bits is not None


def without_holes() -> bool:
    """Let every tensor of a megabyte or more come from the system, and go back there when freed.

    It costs time: fresh memory is touched page by page. Returns whether malloc is one that can.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, LARGE))
