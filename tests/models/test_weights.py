"""Safetensors files read and written in numpy, against the safetensors library and torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from san_llm.errors import InputError
from san_llm.merge.write import Output, write_weights
from san_llm.models.weights import INDEX, RAW, converted, read_header, read_rows, read_weights

TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SPECIAL = [0.0, -0.0, 1.0, 65504.0, 65520.0, 3.4e38, 1e-45, -1e-40, np.inf, -np.inf, np.nan]


def widen(stored: np.ndarray) -> np.ndarray:
    return converted(stored, np.empty(stored.shape, np.float32))


def narrow(wide: np.ndarray, dtype: str) -> np.ndarray:
    return converted(wide, np.empty(wide.shape, RAW[dtype]))


def stored_as(values: np.ndarray, dtype: str) -> torch.Tensor:
    """Return what torch makes of fp32 numbers in a dtype."""
    return torch.from_numpy(values.copy()).to(TORCH[dtype])


def raw(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    return tensor.view(torch.uint16).numpy().view(RAW["BF16"])


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(sorted(TORCH)),
    st.lists(st.one_of(st.floats(width=32), st.sampled_from(SPECIAL)), min_size=1),
)
def test_numbers_are_rounded_as_torch_rounds_them(dtype, numbers):
    values = np.array(numbers, dtype=np.float32)
    expected = stored_as(values, dtype)
    found = narrow(values, dtype)
    assert np.array_equal(widen(found), expected.float().numpy(), equal_nan=True)
    assert np.array_equal(widen(raw(expected)), expected.float().numpy(), equal_nan=True)


def test_every_bf16_number_survives_the_way_through_fp32():
    patterns = np.arange(2**16, dtype=np.uint16)
    numbers = widen(patterns.view(RAW["BF16"]))
    back = narrow(numbers, "BF16").view(np.uint16)
    finite = ~np.isnan(numbers)
    assert np.array_equal(back[finite], patterns[finite])
    assert np.isnan(widen(back[~finite].view(RAW["BF16"]))).all()


def some_file(path: Path, dtype: str = "BF16") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(*shape, generator=generator).to(TORCH[dtype])
        for name, shape in {"b": (7, 5), "a": (300, 1000), "c.bias": (3,), "d": (2, 3, 4)}.items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return tensors


@pytest.mark.parametrize("dtype", sorted(TORCH))
def test_any_rows_can_be_read(tmp_path, dtype):
    tensors = some_file(tmp_path / "model.safetensors", dtype)
    for tensor in read_weights(tmp_path):
        expected = tensors[tensor.name].float().numpy()
        assert tensor.shape == expected.shape
        assert np.array_equal(read_rows(tensor), expected)
        assert np.array_equal(read_rows(tensor, 1, 2), expected[1:2])


@pytest.mark.parametrize("shard_size", [10**9, 1000, 1])
@pytest.mark.parametrize("dtype", sorted(TORCH))
def test_what_is_written_loads_with_the_library_and_has_the_sum_it_says(
    tmp_path, dtype, shard_size
):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    tensors = some_file(source / "model.safetensors")
    stored = read_weights(source)
    outputs = [
        Output(t.name, t.dtype, t.shape, t)
        if t.name == "a"
        else Output(t.name, dtype, t.shape, t, lambda rows, first, last: 2 * rows)
        for t in stored
    ]
    seen: list[int] = []
    sums = write_weights(target, outputs, shard_size, seen.append)
    files = sorted(target.glob("*.safetensors"))
    assert sums == {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    assert len(files) == {10**9: 1, 1000: 2, 1: 4}[shard_size]
    assert sum(seen) == sum(output.size for output in outputs)
    found: dict[str, Any] = {}
    for file in files:
        found |= load_file(file)
    for name, tensor in tensors.items():
        expected = tensor if name == "a" else (2 * tensor.float()).to(TORCH[dtype])
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected)
    assert (target / INDEX).is_file() == (len(files) > 1)
    assert {t.name for t in read_weights(target)} == set(tensors)
    if len(files) > 1:
        index = json.loads((target / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(output.size for output in outputs)
        assert set(index["weight_map"]) == set(tensors)


def test_the_order_of_the_base_is_kept(tmp_path):
    some_file(tmp_path / "model.safetensors")
    stored = read_header(tmp_path / "model.safetensors")
    (tmp_path / "out").mkdir()
    outputs = [Output(t.name, t.dtype, t.shape, t) for t in stored]
    write_weights(tmp_path / "out", outputs, 10**9, lambda size: None)
    again = read_header(tmp_path / "out" / "model.safetensors")
    assert [t.name for t in again] == [t.name for t in stored]
    assert all(t.start % 8 == 0 for t in again[:1])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda b: b[:-1], "cut short"),
        (lambda b: b[:4], "not a safetensors file"),
        (lambda b: b"", "not a safetensors file"),
        (lambda b: b"\xff" * 8 + b[8:], "not a safetensors file"),
        (lambda b: b[:8] + b"x" + b[9:], "not JSON"),
        (lambda b: (2).to_bytes(8, "little") + b"[]", "not a table"),
        (lambda b: (9).to_bytes(8, "little") + b'{"a": 12}', "not a table"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line_that_names_it(tmp_path, damage, said):
    path = tmp_path / "model.safetensors"
    some_file(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=said) as error:
        read_header(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        read_weights(tmp_path)
    (tmp_path / INDEX).write_text('{"metadata": {}, "weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(InputError, match="gone"):
        read_weights(tmp_path)
    (tmp_path / INDEX).write_text("[]")
    with pytest.raises(InputError, match="not an index"):
        read_weights(tmp_path)
    some_file(tmp_path / "here.safetensors")
    (tmp_path / INDEX).write_text('{"metadata": {}, "weight_map": {"zzz": "here.safetensors"}}')
    with pytest.raises(InputError, match="zzz is in none"):
        read_weights(tmp_path)


def test_numbers_of_another_kind_are_refused_by_name(tmp_path):
    save_file({"packed": torch.zeros(3, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    (tensor,) = read_weights(tmp_path)
    with pytest.raises(InputError, match="packed is stored as U8; only F64, F32, BF16, F16"):
        read_rows(tensor)
