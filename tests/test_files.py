"""Hashes of what was evaluated: never an old one for new content."""

import hashlib
import os
from pathlib import Path

import pytest
import tokenizers

from san_llm import files as fingerprint
from san_llm.files import LARGE, code_sha256, file_sha256, folder_sha256, key_of


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAN_LLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sha256"


def plainly(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_large_files_hash_is_remembered_and_fresh_does_not_ask(cache):
    path = Path(tokenizers.tokenizers.__file__)  # large, and nobody has written to it lately
    assert path.stat().st_size >= LARGE
    assert file_sha256(path) == plainly(path)
    (remembered,) = cache.iterdir()
    remembered.write_text("f" * 64)  # so that it shows where the answer comes from
    assert file_sha256(path) == "f" * 64
    assert file_sha256(path, fresh=True) == plainly(path)
    assert file_sha256(path) == plainly(path), "and the fresh one is remembered"
    remembered.write_text("")
    assert file_sha256(path) == plainly(path)


def test_a_file_that_was_just_written_is_not_remembered(cache, tmp_path):
    path = tmp_path / "new.safetensors"
    path.write_bytes(bytes(LARGE))
    assert file_sha256(path) == plainly(path)
    assert not cache.exists()


def test_new_content_of_the_same_size_and_times_has_its_own_hash(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "SETTLED", -1.0)
    path = tmp_path / "w.safetensors"
    path.write_bytes(bytes(LARGE))
    old, times = file_sha256(path), path.stat()
    assert len(list(cache.iterdir())) == 1
    path.write_bytes(b"\1" * LARGE)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    assert file_sha256(path) == plainly(path) != old
    # Another file under the old name, with everything put back that can be.
    other = tmp_path / "other"
    other.write_bytes(b"\2" * LARGE)
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.replace(path)
    assert file_sha256(path) == plainly(path)


def test_a_folder_is_what_is_loaded_from_it_through_links_too(tmp_path):
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    folder.mkdir()
    (blobs / "0000").write_bytes(b"weights")  # named by the hash of something else
    (folder / "model.safetensors").symlink_to(blobs / "0000")
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("not loaded")
    found = folder_sha256(folder)
    assert found == {
        "config.json": hashlib.sha256(b"{}").hexdigest(),
        "model.safetensors": hashlib.sha256(b"weights").hexdigest(),
    }
    (blobs / "0000").write_bytes(b"wEights")
    assert folder_sha256(folder) != found


def test_a_key_does_not_depend_on_the_order_of_names_and_code_has_one_hash():
    assert key_of({"a": 1, "b": {"c": 2, "d": 3}}) == key_of({"b": {"d": 3, "c": 2}, "a": 1})
    assert key_of({"a": 1}) != key_of({"a": 2})
    assert len(code_sha256()) == 64
