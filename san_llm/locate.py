"""Where a base lies: in a folder, a named download, a converted ``.gguf`` file, or on the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from san_llm.download import PINNED, fetch, model_folder
from san_llm.errors import InputError, SanError, did_you_mean, nearest_file, plain
from san_llm.recipe import Base
from san_llm.record import cache_folder, read_json


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
    from san_llm.gguf import convert_gguf
    from san_llm.progress import stderr

    facts = path.stat()
    key = f"{path.resolve()} {facts.st_size} {facts.st_mtime_ns}".encode()
    folder = cache_folder("gguf") / f"{path.stem}-{hashlib.sha256(key).hexdigest()[:12]}"
    if not (folder / "config.json").is_file():
        stderr.print(plain(f"converting {path} once, to {folder}"))
        convert_gguf(path, folder)
    return folder


def base_folder(base: Base) -> Path:
    """Return the folder with a base's files; a hub id is fetched into the hub's own cache.

    Raises:
        InputError: when it is not there.
        SanError: when the hub fails.
    """
    found = locate(base.model)
    if Path(found).is_dir():
        return Path(found)
    return _fetched(found, base.revision, base.trust_remote_code)


_fetched = cache(fetch)  # a process asks the hub once


def stored_bits(model: str, config: Mapping[str, Any]) -> Literal["4bit", "8bit"] | None:
    """Return how a checkpoint's weights are quantized, or None where they are not.

    Args:
        model: Its name, for messages.
        config: Its ``config.json``.

    Raises:
        InputError: when it is by another method than bitsandbytes'.
    """
    stored = config.get("quantization_config")
    if not stored:
        return None
    if not isinstance(stored, Mapping):
        raise InputError(f"{model}: quantization_config: expected a section, found {stored!r}")
    bits: tuple[Literal["4bit", "8bit"], ...] = ("4bit", "8bit")
    found = next((kind for kind in bits if stored.get(f"load_in_{kind}")), None)
    method = stored.get("quant_method", "bitsandbytes" if found else "an unknown method")
    if found is None or method != "bitsandbytes":
        raise InputError(
            f"{model}: quantized by {method}; only bitsandbytes' checkpoints can be read"
        )
    return found


def trained_bits(base: Base) -> Literal["4bit", "8bit"] | None:
    """Return in which bits a recipe's base is trained over: as the recipe says, or as it is stored.

    Nothing is fetched: a base that is not here any more counts as not quantized.
    """
    from huggingface_hub import try_to_load_from_cache

    if base.quantization is not None:
        return base.quantization
    try:
        found = locate(base.model)
        config = Path(found) / "config.json"
        if not config.is_file():
            cached = try_to_load_from_cache(found, config.name, revision=base.revision)
            config = Path(cached) if isinstance(cached, str) else config
        return stored_bits(base.model, read_json(config))
    except (SanError, ValueError):  # the latter from the hub's client, on what is no hub id
        return None
