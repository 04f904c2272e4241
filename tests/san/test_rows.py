"""A base weight widened block by block, against the whole of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import module_name
from san.adapted import adapt
from tiny import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from san_llm.san import rows as weight_rows
from san_llm.san.rows import Projected, wide_rows

bnb = pytest.importorskip("bitsandbytes")
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {},
    "int8": {"load_in_8bit": True},
    **{
        f"{kind}{' double' if double else ''}": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": double,
        }
        for kind in ("nf4", "fp4")
        for double in (False, True)
    },
}


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Load one small base in any kind; down's rows of 96 numbers are not whole blocks of 64."""
    folder = tmp_path_factory.mktemp("odd")
    config = tiny_config(hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    LlamaForCausalLM(config).save_pretrained(folder)

    def load(kind: str) -> Any:
        options = KINDS[kind]
        how = {"quantization_config": BitsAndBytesConfig(**options)} if options else {}
        dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu", **how)

    return load


def whole(linear: Any) -> torch.Tensor:
    if isinstance(linear, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    if isinstance(linear, bnb.nn.Linear8bitLt):
        return linear.weight.data * (linear.weight.SCB[:, None] / 127)
    return linear.weight.data.float()


@pytest.mark.parametrize("block", [100, 1000, 2**22])
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_blocks_are_the_weight_and_the_product_has_its_gradient(load, kind, block, monkeypatch):
    monkeypatch.setattr(weight_rows, "BLOCK", block)
    model = load(kind)
    for projection in ("k_proj", "up_proj", "down_proj"):
        linear = model.get_submodule(module_name(1, projection))
        expected = whole(linear)
        blocks = list(wide_rows(linear, linear.weight))
        assert torch.equal(torch.cat(blocks), expected)
        shared = projection == "down_proj" and "4" in kind  # blocks that two rows have a part of
        assert (len(blocks) == 1) == (block > 1000 or kind == "fp32" or shared)
        a = torch.randn(3, linear.in_features, requires_grad=True)
        upstream = torch.randn(linear.out_features, 3)
        found = Projected.apply(a, linear, linear.weight)
        assert torch.allclose(found, expected @ a.T, atol=1e-5)
        (gradient,) = torch.autograd.grad((found * upstream).sum(), a)
        assert torch.allclose(gradient, upstream.T @ expected, atol=1e-5)


class Largest(TorchDispatchMode):
    """Watches for the largest floating-point tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.numbers = max(self.numbers, tensor.numel())
        return made


@pytest.mark.parametrize("carrier", ["lora", "dora"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "fp32"])
def test_nothing_of_the_weights_size_is_made_for_its_norms(load, kind, carrier, monkeypatch):
    monkeypatch.setattr(weight_rows, "BLOCK", 8 * 64)
    model = adapt(load(kind), carrier=carrier, r=2)
    layer = model.get_submodule(f"base_model.model.{module_name(1, 'up_proj')}")
    layer._squared_norms = None
    with Largest() as watched:
        layer.norms("default")[1].sum().backward()
    assert layer.san_lora_A["default"].grad.abs().max() > 0
    assert 0 < watched.numbers <= 8 * 64 < 96 * 64
