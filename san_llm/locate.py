"""Where a base model lies: a folder, a named download, a converted ``.gguf`` file, or the hub."""

from __future__ import annotations

import hashlib
from pathlib import Path

from san_llm.download import PINNED, fetch, model_folder
from san_llm.errors import InputError, did_you_mean
from san_llm.recipe import Base
from san_llm.record import cache_folder


def locate(model: str) -> str:
    """Return what transformers loads for a recipe's ``base.model``: a folder or a hub id.

    A ``.gguf`` file is converted once and kept in the cache.

    Raises:
        InputError: when a folder or file is not there, naming what would get it.
    """
    folder = model_folder(model)
    if folder is not None and not Path(model).exists():
        if not (folder / "config.json").is_file():
            raise InputError(f"{model}: not here yet: `san-llm download {model}` gets it")
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
        raise InputError(f"{model}: no such folder{did_you_mean(model, PINNED)}")
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
        stderr.print(f"converting {path} once, to {folder}")
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
    return fetch(found, base.revision, base.trust_remote_code)
