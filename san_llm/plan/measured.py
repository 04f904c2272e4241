"""What a tuner of PEFT comes to on a base, measured on a model without numbers.

No formula here knows PEFT's tuners. So one is put on the base's shape, its numbers are counted, and
the adapted modules of a block are called: what autograd keeps of that grows with the tokens, or, of
tuners that make whole weights, does not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from san_llm.architectures.decoders import DOWN, PARENTS, O
from san_llm.models.tuners import on_meta, put_on
from san_llm.plan.memory import WIDE, Measured
from san_llm.plan.saved import saved_bytes, storage
from san_llm.recipe.schema import PeftMethod

_IN_BLOCK = re.compile(r"\.layers\.(\d+)\.")
TOKENS = 64  # of a call; a second one has twice as many
SHARED = "shared"  # numbers that are in no module of the base
FEW = 2  # blocks of a model with numbers


def measure(method: PeftMethod, config: Mapping[str, Any], dtype: str) -> Measured:
    """Return what a tuner trains and keeps on a base.

    Args:
        method: The tuner.
        config: The base's ``config.json``.
        dtype: That of the base's features.

    Raises:
        InputError: when the tuner does not fit.
    """
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    model: Any = on_meta(method, AutoConfig.for_model(**plain), dtype)
    if model is not None:
        return _measured(model, 1)
    # One that looks at the base's numbers gets random ones, of a few blocks.
    few = plain | {"num_hidden_layers": FEW, "vocab_size": 8, "pad_token_id": None}
    base = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**few), dtype=getattr(torch, dtype)
    )
    adapted = put_on(base.requires_grad_(False), method)
    return _measured(adapted, config["num_hidden_layers"] / FEW)


def _measured(model: Any, times: float) -> Measured:
    """Return what a model's adapter comes to, in ``times`` as many blocks."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    of_base = {id(tensor) for layer in layers.values() for tensor in _held(layer.get_base_layer())}
    kinds: dict[int, str] = {}
    added: dict[int, Tensor] = {}
    for name, layer in layers.items():
        for tensor in _held(layer):
            if id(tensor) not in of_base:
                kinds[id(tensor)] = SHARED if id(tensor) in added else name.rsplit(".", 1)[-1]
                added[id(tensor)] = tensor
    trained: dict[str, float] = {}
    size = 0.0
    for number, tensor in added.items():
        many = 1 if kinds[number] == SHARED else times
        size += many * tensor.nbytes
        if tensor.requires_grad:
            kind = kinds[number]
            trained[kind] = trained.get(kind, 0) + many * tensor.numel()
    blocks = [place[1] for place in map(_IN_BLOCK.search, layers) if place]
    block = f".layers.{blocks[0]}." if blocks else "no block"
    fixed, per_token = _kept({name: layer for name, layer in layers.items() if block in name})
    counted = {kind: round(count) for kind, count in trained.items()}
    return Measured(counted, round(size), fixed, per_token)


def _held(module: nn.Module) -> Iterable[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _kept(layers: Mapping[str, Any]) -> tuple[int, float]:
    """Return the bytes autograd keeps of a block's adapted modules: in any case, and a token.

    Those that cannot be called without numbers, or keep sparse tensors, are taken to keep what they
    read and write, and a whole weight, in fp32.
    """
    try:
        few, many = (_called(layers, tokens) for tokens in (TOKENS, 2 * TOKENS))
    except (NotImplementedError, RuntimeError):
        shapes = [layer.get_base_layer().weight.shape for layer in layers.values()]
        whole = sum(math.prod(shape) for shape in shapes)
        return whole * WIDE, float(sum(sum(shape) for shape in shapes) * WIDE)
    return 2 * few - many, (many - few) / TOKENS


def _called(layers: Mapping[str, Any], tokens: int) -> int:
    """Return the bytes autograd keeps of a call, beyond those of the same modules unadapted."""
    read: dict[str, Tensor] = {}
    calls = []
    for name, layer in layers.items():
        kind, weight = name.rsplit(".", 1)[-1], layer.get_base_layer().weight
        # Readers of one norm share its output.
        group = kind if kind in (O, DOWN) else PARENTS.get(kind, kind)
        if group not in read:
            read[group] = weight.new_zeros(1, tokens, weight.shape[-1]).requires_grad_()
        calls.append((layer, read[group]))
    own = {storage(tensor) for layer in layers.values() for tensor in _held(layer)}
    own |= {storage(read[O])} if O in read else set()  # attention keeps what it gives
    unadapted = [(layer.get_base_layer(), given) for layer, given in calls]
    adapted, plain = (saved_bytes(partial(_call, made), own) for made in (calls, unadapted))
    return adapted - plain


def _call(calls: Iterable[tuple[Any, Tensor]]) -> None:
    for module, given in calls:
        module(given)
