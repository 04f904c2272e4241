"""What an evaluation measured, and a training began with, by content: sha256 of weights and code.

Hashing 16 GB takes half a minute, so a large file's sha256 is remembered. It is found again by what
cannot stay the same when the content changes: device, inode, size, and the time of the last change
of the inode (ctime), which every write sets and no program can set back, as it can the time of
modification. Names, and the hub's blob names, are not asked. A file that was changed within the
last seconds is hashed and not remembered, since a clock's tick may hide a second change.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from san_llm.data.rows import sha256_of
from san_llm.errors import InputError
from san_llm.record import cache_folder, write_text

LARGE = 1 << 20  # bytes from which on reading a file costs more than remembering its hash
SETTLED = 5.0  # seconds without a change, after which a hash may be remembered
# What a model's or an adapter's folder is loaded from.
LOADED = (".safetensors", ".json", ".jinja", ".model", ".txt", ".py")


def file_sha256(path: Path, fresh: bool = False) -> str:
    """Return a file's sha256; a large file's may be remembered.

    Args:
        path: The file; links are followed.
        fresh: Hash it in any case.
    """
    facts = path.stat()
    if facts.st_size < LARGE:
        return sha256_of(path)
    parts = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
    name = hashlib.sha256(repr(parts).encode()).hexdigest()
    remembered = cache_folder("sha256") / name
    if not fresh and remembered.is_file():
        known = remembered.read_text(encoding="utf-8").strip()
        if len(known) == 64:
            return known
    began = time.time()
    found = sha256_of(path)
    after = path.stat()
    same = (after.st_mtime_ns, after.st_ctime_ns) == (facts.st_mtime_ns, facts.st_ctime_ns)
    if same and began - facts.st_ctime > SETTLED:
        remembered.parent.mkdir(parents=True, exist_ok=True)
        write_text(remembered, found + "\n")
    return found


def folder_sha256(folder: Path, fresh: bool = False) -> dict[str, str]:
    """Return the sha256 of each file that a model or adapter is loaded from, by its name.

    Raises:
        InputError: when a file cannot be read.
    """
    try:
        return {
            path.name: file_sha256(path, fresh)
            for path in sorted(folder.iterdir())
            if path.suffix in LOADED and path.is_file()
        }
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from None


@cache
def code_sha256() -> str:
    """Return the sha256 of this package's own code: a version number is kept over many changes."""
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parents[1]
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def key_of(identity: Mapping[str, Any]) -> str:
    """Return one sha256 for all that makes an evaluation the same evaluation."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
