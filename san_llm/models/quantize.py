"""The only file that knows bitsandbytes: load in 4 or 8 bits, dequantize, scale rows in 4 bits."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from san_llm.errors import InputError
from san_llm.recipe.schema import Base

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


def quantization_config(base: Base) -> BitsAndBytesConfig:
    """Return how to quantize a base while it is loaded; 4-bit layers compute in its dtype."""
    from transformers import BitsAndBytesConfig

    if base.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=base.quant_type,
        bnb_4bit_use_double_quant=base.double_quant,
        bnb_4bit_compute_dtype=base.dtype,
    )


def is_quantized(linear: nn.Module) -> bool:
    """Whether a module is one of bitsandbytes' Linears."""
    return type(linear).__name__ in ("Linear4bit", "Linear8bitLt")


def keep_dtype(model: nn.Module) -> None:
    """Let PEFT's IA3 put out, over quantized Linears, the dtype that it reads.

    Where nothing autocasts it computes in fp32 there and stays in it, and attention refuses queries
    that are not scaled beside keys that are.
    """
    from peft.tuners.ia3 import IA3Layer

    for module in model.modules():
        if isinstance(module, IA3Layer) and is_quantized(module.get_base_layer()):
            module.register_forward_hook(_as_read)


def _as_read(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.to(arguments[0].dtype)


def dequantized_weight(linear: Any) -> Tensor:
    """Return the weight (d_out, d_in) of one of bitsandbytes' Linears in fp32, not rounded."""
    from bitsandbytes.functional import dequantize_4bit

    weight = linear.weight
    if type(linear).__name__ == "Linear8bitLt":
        scale = linear.state.SCB if linear.state.SCB is not None else weight.SCB
        rows: Tensor = weight.data * (scale.to(weight.device)[:, None] / 127)
        return rows
    state = copy.copy(weight.quant_state)
    state.dtype = torch.float32  # else rounded to the dtype that the base was loaded in
    wide: Tensor = dequantize_4bit(weight.data, state)
    return wide


def dequantize(model: Any) -> Any:
    """Make a quantized model, in place, the plain fp32 model of the same numbers; return it."""
    from transformers.pytorch_utils import Conv1D

    for name, linear in list(model.named_modules()):
        if not is_quantized(linear):
            continue
        weight = dequantized_weight(linear)
        d_out, d_in = weight.shape
        with torch.device("meta"):
            if linear.source_cls is Conv1D:  # GPT-2's, whose files have it the other way round
                plain, weight = Conv1D(d_out, d_in), weight.T.contiguous()
            else:
                plain = nn.Linear(d_in, d_out, bias=linear.bias is not None)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if linear.bias is not None:
            plain.bias = linear.bias
        model.set_submodule(name, plain)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    # What marks a model of transformers as quantized.
    model.is_quantized = model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
    for owner, mark in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(owner, mark):
            delattr(owner, mark)
    return model


def single_quantization(linear: Any) -> None:
    """Make the block-wise scales of a 4-bit Linear, in place, plain fp32 numbers of equal value."""
    from bitsandbytes.functional import dequantize_blockwise

    state = linear.weight.quant_state
    if state.nested:
        state.absmax = dequantize_blockwise(state.absmax, state.state2).float() + state.offset
        state.nested, state.state2, state.offset = False, None, None
        linear.weight.compress_statistics = False


def scale_rows(name: str, linear: Any, scale: Tensor) -> None:
    """Multiply the rows of a 4-bit Linear, in place, by a scale (d_out,): its codes stay.

    Raises:
        InputError: when a row is not a whole number of blocks.
    """
    single_quantization(linear)
    state = linear.weight.quant_state
    d_out, d_in = state.shape
    if d_in % state.blocksize:
        raise InputError(
            f"{name}: its rows of {d_in} numbers are not whole blocks of {state.blocksize}: a "
            "row's scale cannot go into the scales of its blocks"
        )
    blocks = state.absmax.view(d_out, -1)
    state.absmax = (blocks * scale.to(blocks)[:, None]).flatten()


def nf4_error(device: torch.device) -> float:
    """Return how far a small NF4 layer's output is from its full-precision one's, relative to it.

    Some 0.1 where bitsandbytes can do what is asked, which is known only when it has been asked.
    """
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    linear = Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    x = torch.randn(8, 64)  # several rows: one alone goes another way on a GPU
    with torch.no_grad():
        expected = x @ linear.weight.T
        output = linear.to(device)(x.to(device)).cpu()
    return float((output - expected).norm() / expected.norm())
