"""A small random copy of a model, and rows for it to read.

A copy has the real one's class, depth, layer types and head counts, so that its modules have the
same names; only widths, vocabulary and positions are small. Its numbers are random throughout:
norms, biases and layer scales that start at 0 or 1 would hide what passes them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn

from san_llm.errors import InputError, first_line
from san_llm.measure.experts import is_experts

LARGEST = 50_000_000  # numbers of a copy; those of most models have a hundredth of that
TOKENS = 6  # of a row: enough to tell attention, which reads the tokens before
VOCABULARY = 131
# Channels of a head, and of the residual stream at least (a norm's cross-talk is one part in so
# many), of the first copy and the second; what comes first is tried first.
SIZES = (((4, 48), (2, 64)), ((8, 48), (4, 64)), ((16, 48), (8, 64)))

_HEADS = (
    *("num_attention_heads", "num_heads", "n_head", "n_heads"),
    "encoder_attention_heads",
)
_HEAD_SIZE = ("head_dim", "d_kv", "kv_channels", "attention_head_size")
_STREAM = ("hidden_size", "d_model", "n_embd", "embed_dim", "dim")
_WIDTH_WORDS = ("size", "dim", "width", "rank", "embd", "d_model", "d_ff", "d_kv", "inner")
# Sizes that are no widths.
_KEPT = (
    *("vocab", "image", "patch", "window", "kernel", "chunk", "stride", "conv_dim", "token"),
    *("type_", "batch", "grid", "group", "block_size", "merge", "crop", "tile", "num_", "temporal"),
    "pool_size",
)
# Widths inside of a block that are tied to no other: the narrower, the faster.
_INSIDE = (
    *("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "ffn_embed_dim"),
    *("encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size", "hidden_dim"),
)
PATCHES = 3  # on a side of a picture
WINDOW = 2  # patches on a side of what attention looks at in a Swin
_COUNTS = {"max_position_embeddings": 64, "n_positions": 64, "max_target_positions": 64}
_COUNTS |= {"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4}
_COUNTS |= {"num_experts_per_tok": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1}
_COUNTS |= {
    "max_source_positions": 16,
    "max_length": 32,  # of a spectrogram
    "max_seq_len": 64,
    "window_size": WINDOW,
    "vocab_size": VOCABULARY,
}


@dataclass(frozen=True)
class Copy:
    """A small model and what it reads.

    Attributes:
        model: The copy, in float64 and eval mode.
        rows: The arguments of its forward, one row each.
        more: Another row, of the same shapes.
        whole_heads: Whether the real one rotates all channels of a head, as a copy always does.
    """

    model: nn.Module
    rows: dict[str, Any]
    more: dict[str, Any]
    whole_heads: bool = True


def small_copies(config: Any, model_class: Any) -> tuple[Copy, Copy]:
    """Return two copies of a model, of other sizes and other numbers.

    Args:
        config: Its config, of transformers.
        model_class: The class to make of it, with ``_from_config``.

    Raises:
        InputError: when no copy can be made or run, with the last reason.
    """
    last: Exception | None = None
    for sizes in SIZES:
        try:
            first, second = (
                _copy(config, model_class, size, seed) for seed, size in enumerate(sizes)
            )
        except Exception as error:
            last = error
            continue
        return first, second
    raise InputError(
        f"model type {config.model_type!r}: no small copy of it can be made to measure its "
        f"propagation graph: {first_line(last) if last else 'no reason given'}"
    )


def _copy(config: Any, model_class: Any, size: tuple[int, int], seed: int) -> Copy:
    small = shrunk(config, *size)
    if hasattr(small, "_experts_implementation"):
        small._experts_implementation = "eager"  # the fused ones know no float64
    with torch.device("meta"):
        numbers = sum(p.numel() for p in model_class._from_config(small).parameters())
    if numbers > LARGEST:
        raise InputError(f"made small, it still has {numbers:,} numbers")
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model: nn.Module = model_class._from_config(
            small, attn_implementation="eager", dtype=torch.float64
        )
        model.eval().requires_grad_(False)
        _randomize(model)
        rows, more = (_row(model, small) for _ in range(2))
    with torch.no_grad():
        model(**rows)
    return Copy(model, rows, more, _rotates_whole_heads(getattr(config, "rope_parameters", None)))


def without_numbers(config: Any, model_class: Any) -> Any:
    """Return a model of its real sizes whose parameters have no numbers.

    Raises:
        InputError: when there is none of this config.
    """
    try:
        with torch.device("meta"):
            return model_class._from_config(config)
    except Exception as error:
        raise InputError(
            f"model type {config.model_type!r}: no model of this config: {first_line(error)}"
        ) from None


def shrunk(config: Any, head: int, stream: int) -> Any:
    """Return a config with the depth and head counts of another, and small widths.

    Args:
        config: The config of the real model.
        head: Channels of a head.
        stream: Channels of the residual stream, at least.
    """
    small = copy.deepcopy(config)
    _shrink(small, head, stream)
    return small


def _shrink(config: Any, head: int, narrowest: int) -> None:
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None:
            _shrink(part, head, narrowest)
    values = {key: value for key, value in vars(config).items() if not key.startswith("_")}
    by = _divisor(values, head, narrowest)
    stream = _stream(values)
    inside = None if stream is None else 5 * _divided(stream, by) // 4
    for key, value in values.items():
        if key in _INSIDE and inside is not None:
            if type(value) is int:
                setattr(config, key, min(_divided(value, by), inside))
        elif _is_width(key):
            if type(value) is int and value > 1:
                setattr(config, key, _divided(value, by))
            elif isinstance(value, (list, tuple)) and all(type(v) is int for v in value):
                setattr(config, key, type(value)(_divided(v, by) for v in value))
        elif "token_id" in key and type(value) is int and value >= VOCABULARY:
            setattr(config, key, len(key) % VOCABULARY)
    for key, count in _COUNTS.items():
        if type(values.get(key)) is int:
            setattr(config, key, count)
    if type(values.get("patch_size")) is int and values.get("image_size"):
        patches = PATCHES
        if "depths" in values:  # halved stage by stage, until the last has one patch or one window
            patches = 2 ** (len(values["depths"]) - 1)
            patches *= WINDOW if "window_size" in values else 1
        config.image_size = patches * values["patch_size"]
    elif "depths" in values and values.get("image_size"):  # patches of several sizes
        config.image_size = 2 ** (len(values["depths"]) + 2)
    if isinstance(values.get("rope_parameters"), dict):
        config.rope_parameters = _plain_rotation(values["rope_parameters"])
        if "mrope_section" in values["rope_parameters"]:  # of time, height and width
            size = getattr(config, "head_dim", None)
            half = (size or config.hidden_size // config.num_attention_heads) // 2
            sections = [half - 2 * (half // 3), half // 3, half // 3]
            config.rope_parameters["mrope_section"] = sections


def _divisor(values: Mapping[str, Any], head: int, narrowest: int) -> float:
    """Return what widths are divided by, so that a head has about ``head`` channels."""
    heads: Any = next((values[key] for key in _HEADS if values.get(key)), None)
    stream = _stream(values)
    heads = heads[0] if isinstance(heads, (list, tuple)) else heads
    sizes = (values[key] for key in _HEAD_SIZE if type(values.get(key)) is int)
    own = next(sizes, None)
    if own is not None:
        return float(min(own / head, stream / narrowest) if stream else own / head)
    if heads and stream:
        return float(stream / heads / max(head, 2 * -(-narrowest // heads // 2)))
    widths = (value for key, value in values.items() if _is_width(key))
    lists = [value for value in widths if isinstance(value, (list, tuple)) and value]
    return float(min((min(widths) for widths in lists), default=narrowest)) / narrowest


def _stream(values: Mapping[str, Any]) -> int | None:
    """Return the channels of the residual stream, in a pyramid's first stage."""
    names = [name for name in _STREAM if type(values.get(name)) is int]
    if "depths" in values:  # hidden_size is the last stage's
        names.reverse()
    return values[names[0]] if names else None


def _divided(value: int, by: float) -> int:
    return max(2, 2 * round(value / by / 2))


def _is_width(key: str) -> bool:
    return any(word in key for word in _WIDTH_WORDS) and not any(word in key for word in _KEPT)


def _plain_rotation(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return rotary parameters of whole heads, without scaling: neither joins channels."""
    if any(isinstance(value, dict) for value in parameters.values()):
        return {
            key: _plain_rotation(value) if isinstance(value, dict) else value
            for key, value in parameters.items()
        }
    plain = {"rope_theta": parameters.get("rope_theta", 10_000.0), "rope_type": "default"}
    return plain | ({"partial_rotary_factor": 1.0} if "partial_rotary_factor" in parameters else {})


def _rotates_whole_heads(parameters: Any) -> bool:
    if not isinstance(parameters, dict):
        return True
    own = parameters.get("partial_rotary_factor", 1.0) == 1.0
    return own and all(map(_rotates_whole_heads, parameters.values()))


def _randomize(model: nn.Module) -> None:
    """Give every parameter random numbers, of a size that keeps all paths alive."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.numel():  # register tokens, none of them
                continue
            if parameter.dim() > 1:
                reads = parameter.shape[-1] if is_experts(module) else parameter[0].numel()
                parameter.normal_(0, reads**-0.5)
            elif name.endswith("bias"):
                parameter.normal_()
            else:  # norms and layer scales, some of which count as 1 + weight
                parameter.uniform_(0.5, 1.5)


def _picture(config: Any) -> torch.Tensor:
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", 32)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.randn(1, config.num_channels, height, width, dtype=torch.float64)


def _row(model: nn.Module, config: Any) -> dict[str, Any]:
    """Return the arguments of a forward: one row of random tokens, a random picture, or both."""
    name = getattr(model, "main_input_name", "input_ids")
    if name == "pixel_values":
        return {name: _picture(config)}
    ids = torch.randint(VOCABULARY // 2, VOCABULARY, (1, TOKENS))
    if "pixel_values" in signature(model.forward).parameters and hasattr(config, "vision_config"):
        return {name: ids, "pixel_values": _picture(config)}
    if name == "input_features":
        size = (1, config.num_mel_bins, 2 * config.max_source_positions)
        return {name: torch.randn(size, dtype=torch.float64), "decoder_input_ids": ids}
    if name == "input_values" and hasattr(config, "num_mel_bins"):  # a spectrogram
        size = (1, config.max_length, config.num_mel_bins)
        return {name: torch.randn(size, dtype=torch.float64)}
    if name == "input_values":
        return {name: torch.randn(1, 4000, dtype=torch.float64)}
    decoder = {"decoder_input_ids": ids.flip(1)} if config.is_encoder_decoder else {}
    return {"input_ids": ids, **decoder}
