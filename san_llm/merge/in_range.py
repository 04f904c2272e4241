"""Merged numbers that their dtype cannot hold, or that are none, are never written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from san_llm.errors import SanError
from san_llm.merge.write import Output
from san_llm.models.weights import SPELLED, Numbers, read_rows, read_weights

LARGEST = {"float32": 3.4028235e38, "bfloat16": 3.3895314e38, "float16": 65504.0}


def check_files(folder: Path) -> None:
    """Refuse merged weights that were written with infinities."""
    for tensor in read_weights(folder):
        if tensor.dtype in SPELLED:  # codes of fewer bits are all in range
            check_range(tensor.name, SPELLED[tensor.dtype], read_rows(tensor))


def in_range(output: Output, dtype: str) -> Output:
    """Return the output with its computed rows watched, see :func:`check_range`."""
    merge = output.merge
    if merge is None and output.source is not None and output.source.dtype == output.dtype:
        return output

    def watched(rows: Numbers, first: int, last: int) -> Numbers:
        if merge is not None:
            with np.errstate(over="ignore", invalid="ignore"):  # told below, by name
                rows = merge(rows, first, last)
        check_range(output.name, dtype, rows)
        return rows

    return replace(output, merge=watched)


def check_range(name: str, dtype: str, numbers: Numbers) -> None:
    """Refuse numbers that would be stored as an infinity; a NaN is in no range."""
    largest = LARGEST[dtype]
    if numbers.size and not (numbers.max() <= largest and numbers.min() >= -largest):
        raise SanError(f"{name}: merged, it has numbers that {dtype} cannot hold")
