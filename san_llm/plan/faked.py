"""What a method comes to on a base that no table knows: one step of it, on tensors without numbers.

The model's own code is run by PyTorch's fake tensors, which have a shape, a dtype and a device but
no memory, and what autograd would keep of it is added up, each storage once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from san_llm.architectures.sizes import Shape
from san_llm.errors import InputError, first_line, unexpected
from san_llm.measure.behaviour import taken
from san_llm.measure.experts import is_experts
from san_llm.models.adapter import add_adapter
from san_llm.models.locate import refuse_other_tasks
from san_llm.ops.head_loss import instead_of_logits
from san_llm.plan.memory import BYTES, Batch, Faked
from san_llm.plan.saved import saved_bytes, storage
from san_llm.recipe.schema import AdapterMethod
from san_llm.san.measured import stock_config


def faked_shape(config: Mapping[str, Any]) -> Shape:
    """Return the sizes of a base by its own modules; those of its Linears are left out.

    Raises:
        InputError: when transformers has no causal LM of it, or it is one for more than text.
    """
    model = _model(config, "float32")
    refuse_other_tasks(config)
    linears = _linears(model)
    numbers = sum(m.weight.numel() for m in linears)
    return Shape(
        hidden=config["hidden_size"],
        inner=max(size for module in linears for size in module.weight.shape),
        blocks=config["num_hidden_layers"],
        heads=config.get("num_attention_heads", 1),  # Mamba has none
        q=config["hidden_size"],
        kv=config["hidden_size"],
        vocabulary=config["vocab_size"],
        tied=config["tie_word_embeddings"],
        linears={},
        config=config,
        counted=(numbers, sum(p.numel() for p in model.parameters()) - numbers),
    )


def fake(
    config: Mapping[str, Any], method: AdapterMethod | None, dtype: str, batch: Batch
) -> Faked:
    """Return what a method trains, adds and keeps on a base.

    Args:
        config: The base's ``config.json``.
        method: The method, or None for full fine-tuning.
        dtype: That of the base's features.
        batch: The largest micro-batch.

    Raises:
        InputError: when the method does not fit, or the model's code cannot be run so.
    """
    # The grouped products of experts are known without numbers in bf16 alone.
    experts = any(is_experts(module) for module in _model(config, dtype).modules())
    computed = "bfloat16" if experts else dtype
    problem: Exception | None = None
    for masked in {batch.masked: None, False: None}:  # not every model takes a mask as it is
        base = _model(config, computed)
        linears = _linears(base)
        own = {id(parameter) for parameter in base.parameters()}
        model: Any = base.requires_grad_(True) if method is None else add_adapter(base, method)
        trained, added = _counted(model, own)
        try:
            kept = _kept(model, base, batch, masked)
        except Exception as error:  # a model's own code, of whatever kind
            problem = problem or error
            continue
        return Faked(
            trained,
            added,
            kept * BYTES[dtype] // BYTES[computed],
            largest=max(module.weight.numel() for module in linears),
            rows=sum(max(module.weight.shape) for module in linears),
        )
    assert problem is not None
    raise InputError(
        f"model type {config['model_type']!r}: what a step keeps cannot be computed without "
        f"weights: {first_line(problem)}; `san-llm train` works all the same"
    ) from problem


def _counted(model: Any, own: set[int]) -> tuple[dict[str, int], int]:
    """Return trained numbers by kind of module, and the bytes of what is not the base's own."""
    trained: dict[str, int] = {}
    added = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = _kind(name)
            trained[kind] = trained.get(kind, 0) + parameter.numel()
        if id(parameter) not in own:
            added += parameter.nbytes
    return trained, added


def _model(config: Mapping[str, Any], dtype: str) -> Any:
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                stock_config(config), dtype=getattr(torch, dtype)
            )
    except ValueError as error:
        raise InputError(
            f"model type {config.get('model_type')!r}: no causal LM: {first_line(error)}"
        ) from None
    except Exception as error:  # what a config says is looked at by the model's own code
        raise InputError(
            f"config.json: transformers makes no {config.get('model_type')} of it: "
            f"{unexpected(error)}"
        ) from None
    return model.requires_grad_(False)


def _linears(model: Any) -> list[Any]:
    """Return what bitsandbytes would quantize of a model: every Linear but the output head."""
    head = model.get_output_embeddings()
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]


def _kind(name: str) -> str:
    """Return the module's short name of a parameter, or whose it is in full fine-tuning."""
    parts = name.replace(".base_layer", "").split(".")
    places = [place for place, part in enumerate(parts) if part.isdigit()]
    inside = parts[places[0] + 1 :] if places else parts[-2:]
    return ".".join(part for part in inside[:-1] if "lora" not in part and "san" not in part)


def _kept(model: Any, base: Any, batch: Batch, masked: bool) -> int:
    rows = 1 if batch.packed else max(1, round(batch.tokens / batch.longest))
    length = batch.tokens if batch.packed else batch.longest
    from san_llm.san.experts import SanExperts  # not before the adapter: PEFT would not know SAN

    with FakeTensorMode(allow_non_fake_inputs=True), _tried():
        model.to_empty(device="cpu")
        weights = {storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
        tokens = torch.zeros(rows, length, dtype=torch.long)
        mask = torch.ones(rows, 1, length, length, dtype=torch.bool) if masked else None
        head = base.get_output_embeddings()
        given = taken(model, attention_mask=mask)
        beside = 0
        for layer in model.modules():
            if isinstance(layer, SanExperts):  # which asks the router's numbers
                lean = layer.gelu_of(layer.working_adapters()) is not None
                layer.enable_adapters(False)
                chosen = tokens.numel() * getattr(base.config, "num_experts_per_tok", 1)
                # It keeps besides what it scales: what all read, and in the plain form also what
                # gate and up write, and what goes into down; in the lean form one of these less.
                inside = -layer.inside if lean else 3 * layer.inside
                outside = tokens.numel() if lean else chosen
                beside += (chosen * inside + outside * layer.d_in) * base.dtype.itemsize
        with instead_of_logits(head, base.config, lambda hidden, *_: hidden.sum()):
            kept = saved_bytes(lambda: model(input_ids=tokens, use_cache=False, **given), weights)
    return kept + beside


@contextmanager
def _tried() -> Iterator[None]:
    """Let PyTorch log no traceback of an error that is caught: a mask not taken is no news."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    was, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = was
