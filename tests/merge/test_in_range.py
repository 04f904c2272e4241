"""Numbers that a dtype cannot hold: where the bounds are, and what is named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from san_llm.errors import SanError
from san_llm.merge.in_range import LARGEST, check_files, check_range, in_range
from san_llm.merge.write import Output
from san_llm.models.weights import read_weights


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_bounds_are_those_of_torch(dtype):
    largest = torch.finfo(getattr(torch, dtype)).max
    assert pytest.approx(largest, rel=1e-7) == LARGEST[dtype]
    for sign in (1, -1):
        check_range("w", dtype, np.array([0.0, sign * LARGEST[dtype]]))
        for numbers in ([1.01 * LARGEST[dtype]], [0.0, np.inf], [np.nan]):
            with pytest.raises(SanError, match=f"^w: merged, it has numbers that {dtype} cannot"):
                check_range("w", dtype, sign * np.array(numbers))
    check_range("w", dtype, np.empty(0))


def test_a_file_with_an_infinity_is_refused_by_the_tensors_name(tmp_path):
    tensors = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.ones(2, 2)}
    tensors["codes"] = torch.full((4,), 255, dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    check_files(tmp_path)
    tensors["a"][1] = torch.inf
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(SanError, match=r"^a: merged, it has numbers that bfloat16 cannot hold"):
        check_files(tmp_path)


def test_computed_rows_are_watched_and_copied_ones_are_not(tmp_path):
    save_file({"w": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (source,) = read_weights(tmp_path)
    copied = Output("w", "F32", (2, 2), source)
    assert in_range(copied, "float32") is copied
    rounded = in_range(Output("w", "F16", (2, 2), source), "float16")
    assert rounded.merge(np.full((2, 2), 7.0), 0, 2).tolist() == [[7, 7], [7, 7]]
    with pytest.raises(SanError, match="float16 cannot hold"):
        rounded.merge(np.full((2, 2), 1e6), 0, 2)
    larger = Output("w", "F32", (2, 2), source, lambda rows, first, last: rows * 1e38 * last)
    with pytest.raises(SanError, match=r"^w: merged"):
        in_range(larger, "float32").merge(np.full((2, 2), 2.0, np.float32), 0, 2)
    assert in_range(larger, "float32").merge(np.ones((1, 2), np.float32), 0, 1).max() > 9e37
