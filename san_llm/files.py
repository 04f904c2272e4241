"""What an evaluation measured, and a training began with, by content: sha256 of weights and code.

Hashing 16 GB takes half a minute, so a large file's sha256 is remembered. It is found again by what
cannot stay the same when the content changes: device, inode, size, and the time of the last change
of the inode (ctime), which every write sets and no program can set back, as it can the time of
modification. Names, and the hub's blob names, are not asked. A file that was changed within the
last seconds is hashed and not remembered, since a clock's tick may hide a second change.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from san_llm.errors import InputError

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
    identity = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
    name = hashlib.sha256(repr(identity).encode()).hexdigest()
    remembered = cache_folder("sha256") / name
    if not fresh and remembered.is_file():
        known = remembered.read_text(encoding="utf-8").strip()
        if len(known) == 64:
            return known
    began = time.time()
    digest = sha256_of(path)
    after = path.stat()
    same = (after.st_mtime_ns, after.st_ctime_ns) == (facts.st_mtime_ns, facts.st_ctime_ns)
    if same and began - facts.st_ctime > SETTLED:
        remembered.parent.mkdir(parents=True, exist_ok=True)
        write_text(remembered, digest + "\n")
    return digest


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
    package = Path(__file__).resolve().parent
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def key_of(identity: Mapping[str, Any]) -> str:
    """Return one sha256 for all that makes an evaluation the same evaluation."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Return a file's sha256 as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


ASIDE = ".old"  # a folder that is being replaced, until the new one has its name
LARGEST_JSON = 2**26  # bytes; the index of the largest model known has a hundredth of that


def cache_folder(kind: str) -> Path:
    """Return where things of a kind are kept that can be made again: ``tokenized``, ``gguf``."""
    home = os.environ.get("SAN_LLM_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "san-llm"
    )
    return Path(home) / kind


def state_folder(kind: str) -> Path:
    """Return where things of a kind are kept that are the user's alone: ``chat``."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "san-llm" / kind


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing: under a temporary name beside it, then renamed.

    Raises:
        InputError: when its folder takes no file.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: no file can be made there: {error.strerror}; name another place"
        ) from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a full disk names no file
        raise


def flush(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        InputError: when the file is missing, not JSON or not an object.
    """
    try:
        if path.stat().st_size > LARGEST_JSON or not path.is_file():
            raise InputError(f"{path}: not a file of a model's or adapter's settings")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except InputError:
        raise
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not valid JSON") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value


def refuse_link(file: Path) -> None:
    """Refuse to pass on a model's file that is a link to somewhere else, a key of the user's, say.

    Raises:
        InputError: when it leads out of the model's folder, and not into the hub's cache.
    """
    inside, target = file.parent.resolve(), file.resolve()
    blobs = inside.parent.parent / "blobs"  # what the snapshots of the hub's cache link to
    if not (target.is_relative_to(inside) or target.is_relative_to(blobs)):
        raise InputError(f"{file}: a symbolic link out of the folder; put the file itself there")


def refuse_files(folder: Path, overwrite: bool) -> None:
    """Refuse to write where files are.

    Raises:
        InputError: when ``folder`` has files and ``overwrite`` is not set, is a file itself or
            cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: a file stands there; expected a folder to write to")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder}: has files in it; add --overwrite to replace them")
    refuse_no_place(folder)


def refuse_file(file: Path, overwrite: bool) -> None:
    """Refuse to write a file where something stands, or where no file can be.

    Raises:
        InputError: when a folder is there, or a file and ``overwrite`` is not set; or a file where
            its folder should be, or a folder that takes none.
    """
    above = next(folder for folder in file.absolute().parents if os.path.lexists(folder))
    if not above.is_dir():
        raise InputError(f"{file}: {above.name} is not a folder")
    if file.is_dir():
        raise InputError(f"{file}: a folder stands there; expected a file to write to")
    if os.path.lexists(file) and not overwrite:
        raise InputError(f"{file}: is there already; add --overwrite to replace it")
    if not os.access(above, os.W_OK):
        raise InputError(f"{file}: {above} takes no file of yours; name another place")


def refuse_no_place(folder: Path) -> None:
    """Refuse a folder that cannot be made, by making it and taking it away again.

    Raises:
        InputError: naming the folder, and why.
    """
    made: list[Path] = []
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder}: no folder can be made there: {error.strerror}; name another place"
        ) from None
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def whole_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Give a temporary folder that becomes ``folder`` if the block ends well, else vanishes.

    It gets its name when all that is in it is on the disk. What a killed process left of the same
    folder is cleared away first.

    Raises:
        InputError: see :func:`refuse_files`.
    """
    new_parents = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clear_stale(folder)
    refuse_files(folder, overwrite)
    temporary, owned = _own_temporary(folder)
    try:
        yield temporary
        for path in (temporary, *temporary.rglob("*")):  # made private, like every temporary
            path.chmod(0o755 if path.is_dir() else 0o644)
            flush(path)
        if folder.exists():
            # Moved aside, not deleted: if the rename below fails the old folder comes back.
            aside = temporary.with_name(f"{temporary.name}{ASIDE}")
            folder.rename(aside)
            try:
                temporary.rename(folder)
            except OSError:
                aside.rename(folder)
                raise
            shutil.rmtree(aside, ignore_errors=True)
        else:
            temporary.rename(folder)
        flush(folder.parent)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:  # the disk is full
            error.filename = str(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in new_parents:
            with suppress(OSError):  # somebody else's files are in it
                parent.rmdir()
        raise
    finally:
        os.close(owned)


def _own_temporary(folder: Path) -> tuple[Path, int]:
    """Make a temporary folder; return it and the handle whose lock says that its owner lives."""
    while True:
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.san-llm-"))
        handle, free = _try_lock(temporary)
        if handle is not None and free is not False and temporary.exists():
            return temporary, handle
        if handle is not None:  # another process took it for stale before it was locked
            os.close(handle)


def _try_lock(path: Path) -> tuple[int | None, bool | None]:
    """Try to lock a folder until the handle is closed or the process dies.

    Not by ``filelock``, which opens what it locks for writing; a folder cannot be.

    Returns:
        The handle, None where the folder is gone; and whether the lock is ours: False where another
        process holds it, None on a file system that locks no folders.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:  # renamed by its owner
        return None, False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return handle, False
    except OSError:
        return handle, None
    return handle, True


def _clear_stale(folder: Path) -> None:
    """Remove temporary folders whose owner is dead; bring back what it had moved aside."""
    ours = f".{glob.escape(folder.name)}.san-llm-????????"
    asides = list(folder.parent.glob(ours + ASIDE))  # first: each had its temporary beside it
    alive = set()
    for temporary in folder.parent.glob(ours):
        handle, free = _try_lock(temporary)
        if free:
            shutil.rmtree(temporary, ignore_errors=True)
        else:  # its owner lives, or may
            alive.add(f"{temporary.name}{ASIDE}")
        if handle is not None:
            os.close(handle)
    for aside in asides:
        if aside.name in alive:
            continue
        if folder.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(folder)
