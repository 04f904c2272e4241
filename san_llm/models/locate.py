"""Where a base lies: in a folder, a named download, a converted ``.gguf`` file, or on the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from san_llm.architectures.defaults import completed
from san_llm.architectures.lookup import is_known
from san_llm.architectures.sizes import SIZES, check_own_sizes
from san_llm.errors import InputError, SanError, did_you_mean, nearest_file
from san_llm.files import cache_folder, read_json
from san_llm.models.download import PINNED, model_folder
from san_llm.models.hub import fetch
from san_llm.models.weights import has_weights, is_whole
from san_llm.recipe.schema import Base
from san_llm.san.measured import stock_config


def locate(model: str) -> str:
    """Return what transformers loads for a recipe's ``base.model``: a folder or a hub id.

    A ``.gguf`` file is converted once and kept in the cache.

    Raises:
        InputError: when a folder or file is not there, naming what would get it.
    """
    folder = model_folder(model)
    if folder is not None and not Path(model).exists():
        if not (folder / "config.json").is_file():
            raise InputError(
                f"{model}: not here yet: `san-llm download {model}` gets it, into {folder}"
            )
        return str(folder.resolve())
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        return str(_converted(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{model}: no config.json in it, so it is not a model")
        return str(path.resolve())
    if path.exists():
        raise InputError(f"{model}: a file; expected a folder, a .gguf file or a hub id")
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_local or ("/" not in model and did_you_mean(model, PINNED)):
        near = did_you_mean(model, PINNED) or nearest_file(path)
        raise InputError(f"{model}: no such folder{near}")
    return model


def _converted(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    from san_llm.models.from_gguf import convert_gguf
    from san_llm.progress import say

    facts = path.stat()
    key = f"{path.resolve()} {facts.st_size} {facts.st_mtime_ns}".encode()
    folder = cache_folder("gguf") / f"{path.stem}-{hashlib.sha256(key).hexdigest()[:12]}"
    if not (folder / "config.json").is_file():
        say(f"converting {path} once, to {folder}")
        convert_gguf(path, folder)
    return folder


Bits = Literal["4bit", "8bit"]


@dataclass(frozen=True)
class FoundBase:
    """A base whose files are on this machine.

    Attributes:
        base: The recipe's section.
        folder: Where its files are.
        config: What its ``config.json`` says, and its class where that is silent.
        bits: How its weights are stored quantized, or None.
    """

    base: Base
    folder: Path
    config: Mapping[str, Any]
    bits: Bits | None

    @property
    def trained_bits(self) -> Bits | None:
        """In which bits it is trained over: as the recipe says, or as it is stored."""
        return self.base.quantization or self.bits

    @property
    def vocabulary(self) -> int | None:
        """How many tokens its embedding has rows for, or None where its config does not say."""
        return self._size("vocab_size")

    @property
    def context(self) -> int | None:
        """How many tokens it can hold, or None: any number."""
        return self._size("max_position_embeddings")

    def _size(self, key: str) -> int | None:
        value = self.config.get(key)
        return value if type(value) is int else None


def find_base(base: Base) -> FoundBase:
    """Return where a base is, and what its config says; a hub id is fetched into the hub's cache.

    Raises:
        InputError: when it is not there, has no config that can be read, or is quantized by
            another library than bitsandbytes.
        SanError: when the hub fails.
    """
    name = locate(base.model)
    local = Path(name).is_dir()
    folder = Path(name) if local else _fetched(name, base.revision, base.trust_remote_code)
    return open_base(base, folder)


def open_base(base: Base, folder: Path) -> FoundBase:
    """Return a base whose files are in a folder, and what its config says.

    Raises:
        InputError: as of :func:`find_base`.
    """
    config = filled(read_json(folder / "config.json"))
    if config.get("quantization_config") and has_weights(folder) and is_whole(folder):
        raise InputError(
            f"{folder / 'config.json'}: has a quantization_config, but the weights beside it are "
            "not quantized: take the section out"
        )
    return FoundBase(base, folder, config, stored_bits(base.model, config))


def filled(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ``config.json`` with what its class takes where it is silent, by the usual names.

    Of a family that the table does not know transformers' own class says it: a GPT-2's ``n_embd``
    is its ``hidden_size``.

    Raises:
        InputError: when transformers has no such model, or its sizes are none.
    """
    if is_known(values.get("model_type")) or values.get("model_type") is None:
        return completed(values)
    config = stock_config(values)
    check_own_sizes(config)
    usual = {
        name: getattr(config, name, None)
        for name in (*SIZES, "max_position_embeddings")
        if not isinstance(getattr(type(config), name, None), property)  # computed, not said
    }
    usual["is_encoder_decoder"] = getattr(config, "is_encoder_decoder", False)
    usual["tie_word_embeddings"] = bool(getattr(config, "tie_word_embeddings", True))
    return {**{name: value for name, value in usual.items() if value is not None}, **values}


def refuse_other_tasks(config: Mapping[str, Any]) -> None:
    """Refuse a base for pictures with text, and one that makes a text of a text.

    Of the former the vocabulary is in its language model's section; of the latter, as BART,
    transformers would load the decoder alone as a causal LM.

    Raises:
        InputError: when it is one.
    """
    if config["is_encoder_decoder"]:
        raise InputError(
            f"model type {config['model_type']!r}: an encoder reads a text and a decoder writes "
            "another; a recipe trains a model that goes on from a text"
        )
    if "vocab_size" not in config:
        raise InputError(
            f"model type {config['model_type']!r}: it reads pictures with text, and a recipe's "
            "rows are text alone; in Python, SanConfig() adapts its language model"
        )


_fetched = cache(fetch)  # a process asks the hub once


def config_here(base: Base) -> Path | None:
    """Return the ``config.json`` of a base that is on this machine, or None; nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache

    try:
        name = locate(base.model)
        config = Path(name) / "config.json"
        if config.is_file():
            return config
        cached = try_to_load_from_cache(name, config.name, revision=base.revision)
    except (SanError, ValueError):  # the latter from the hub's client, on what is no hub id
        return None
    return Path(cached) if isinstance(cached, str) else None


def stored_bits(model: str, config: Mapping[str, Any]) -> Bits | None:
    """Return how a model's weights are quantized, or None where they are not.

    Args:
        model: The model's name, for messages.
        config: The model's ``config.json``.

    Raises:
        InputError: when it is by another method than bitsandbytes'.
    """
    stored = config.get("quantization_config")
    if not stored:
        return None
    if not isinstance(stored, Mapping):
        raise InputError(f"{model}: quantization_config: expected a section, found {stored!r}")
    bits: tuple[Bits, ...] = ("4bit", "8bit")
    kind = next((kind for kind in bits if stored.get(f"load_in_{kind}")), None)
    method = stored.get("quant_method", "bitsandbytes" if kind else "an unknown method")
    if kind is None or method != "bitsandbytes":
        raise InputError(
            f"{model}: quantized by {method}; only bitsandbytes' checkpoints can be read"
        )
    return kind
