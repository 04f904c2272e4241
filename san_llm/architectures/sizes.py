"""How large a model is, by its config alone: the shapes of its Linears, and what is a size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from san_llm.architectures.decoders import FAMILIES
from san_llm.errors import InputError


@dataclass(frozen=True)
class Shape:
    """The sizes of a base model.

    Attributes:
        hidden: Features of the residual stream.
        inner: Features inside an MLP.
        blocks: How many blocks.
        heads: How many query heads.
        q: Features of all query heads.
        kv: Features of all key heads.
        vocabulary: Rows of the embedding.
        tied: Whether the output head is the embedding.
        linears: ``(d_out, d_in)`` of each Linear of a block, by name.
        config: The ``config.json`` that says so.
        counted: Weights of the blocks' Linears, and all others, where they were counted.
    """

    hidden: int
    inner: int
    blocks: int
    heads: int
    q: int
    kv: int
    vocabulary: int
    tied: bool
    linears: Mapping[str, tuple[int, int]]
    config: Mapping[str, Any]
    counted: tuple[int, int] | None = None

    @property
    def linear_numbers(self) -> int:
        """Weights of all blocks' Linears."""
        if self.counted is not None:
            return self.counted[0]
        return self.blocks * sum(d_out * d_in for d_out, d_in in self.linears.values())

    @property
    def other_numbers(self) -> int:
        """Weights of embedding, head and norms, which are never quantized."""
        if self.counted is not None:
            return self.counted[1]
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + (2 * self.blocks + 1) * self.hidden


def shape_of(config: Mapping[str, Any]) -> Shape:
    """Return the sizes that a checked config of a supported family, completed, gives."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or hidden // heads
    return Shape(
        hidden=hidden,
        inner=config["intermediate_size"],
        blocks=config["num_hidden_layers"],
        heads=heads,
        q=heads * head_dim,
        kv=(config.get("num_key_value_heads") or heads) * head_dim,
        vocabulary=config["vocab_size"],
        tied=config["tie_word_embeddings"],
        linears=linear_shapes(config),
        config=config,
    )


# The largest that a model's sizes may be; the largest models known have a hundredth of them.
SIZES = {"num_hidden_layers": 10_000, "hidden_size": 2**21, "intermediate_size": 2**24}
SIZES |= {"num_attention_heads": 2**14, "num_key_value_heads": 2**14, "head_dim": 2**16}
SIZES |= {"vocab_size": 2**26}


def check_sizes(config: Any) -> None:
    """Refuse a config whose sizes are no sizes, before anything is counted up to them.

    Args:
        config: A ``PretrainedConfig`` or the dictionary of a ``config.json``.

    Raises:
        InputError: naming the key.
    """
    for key, largest in SIZES.items():
        value = setting(config, key)
        if value is None and key in ("num_key_value_heads", "head_dim"):
            continue
        _check(key, value, largest)


def check_own_sizes(config: Any) -> None:
    """Refuse numbers that are no sizes in a config of any model, by the names that it has for them.

    Args:
        config: A ``PretrainedConfig``, whose class has looked at types.

    Raises:
        InputError: naming the key.
    """
    for key, largest in (SIZES | {"max_position_embeddings": 2**40}).items():
        value = getattr(config, key, None)
        computed = isinstance(getattr(type(config), key, None), property)  # -1 in XLNet: any number
        if type(value) is int and not computed:
            _check(config.attribute_map.get(key, key), value, largest)


def _check(key: str, value: Any, largest: int) -> None:
    if type(value) is not int or not 0 < value <= largest:
        raise InputError(
            f"config.json: {key}: expected a whole number from 1 to {largest:,}, found {value!r}"
        )


def setting(config: Any, key: str, default: Any = None) -> Any:
    """Return what a config, an object of transformers' or a ``config.json``, has under a key."""
    if isinstance(config, Mapping):
        return config.get(key, default)
    return getattr(config, key, default)


def projection_shapes(config: Any) -> dict[str, tuple[int, int]]:
    """Return ``(d_out, d_in)`` of the seven projections of a LLaMA block, fused or not."""
    hidden, inter = setting(config, "hidden_size"), setting(config, "intermediate_size")
    heads = setting(config, "num_attention_heads")
    kv_heads = setting(config, "num_key_value_heads") or heads
    head_dim = setting(config, "head_dim") or hidden // heads
    return {
        "q_proj": (heads * head_dim, hidden),
        "k_proj": (kv_heads * head_dim, hidden),
        "v_proj": (kv_heads * head_dim, hidden),
        "o_proj": (hidden, heads * head_dim),
        "gate_proj": (inter, hidden),
        "up_proj": (inter, hidden),
        "down_proj": (hidden, inter),
    }


def linear_shapes(config: Any) -> dict[str, tuple[int, int]]:
    """Return ``(d_out, d_in)`` of each Linear of a block that SAN adapts, from a model config.

    Args:
        config: A ``PretrainedConfig`` or the dictionary of a ``config.json``.
    """
    family = FAMILIES[setting(config, "model_type")]
    shapes: dict[str, tuple[int, int]] = {}
    for projection, (d_out, d_in) in projection_shapes(config).items():
        name = family.linear_of(projection)
        above = shapes[name][0] if name in shapes else 0
        shapes[name] = (above + d_out, d_in)
    return shapes


def norm_sizes(config: Any) -> dict[str, int]:
    """Return how wide each norm of a block is, by its name there, from a model config.

    Args:
        config: A ``PretrainedConfig`` or the dictionary of a ``config.json``.
    """
    family = FAMILIES[setting(config, "model_type")]
    heads = setting(config, "num_attention_heads")
    head_dim = projection_shapes(config)["q_proj"][0] // heads
    return {
        name: head_dim if "." in name else setting(config, "hidden_size")
        for name in (*family.norms, *family.other_norms)
    }
