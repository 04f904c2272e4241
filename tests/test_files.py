"""Hashes of what was evaluated: never an old one for new content."""

import hashlib
import os
import stat
from pathlib import Path

import pytest
import tokenizers

from san_llm import files as fingerprint
from san_llm.errors import InputError
from san_llm.files import (
    LARGE,
    LARGEST_JSON,
    cache_folder,
    code_sha256,
    file_sha256,
    folder_sha256,
    key_of,
    read_json,
    refuse_file,
    refuse_link,
    write_json,
    write_text,
)


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
    (folder / "folder.json").mkdir()
    others = ("template.jinja", "tokenizer.model", "merges.txt", "modeling.py")
    for name in others:
        (folder / name).write_text(name)
    found = folder_sha256(folder)
    for name in others:
        assert found.pop(name) == hashlib.sha256(name.encode()).hexdigest()
    assert found == {
        "config.json": hashlib.sha256(b"{}").hexdigest(),
        "model.safetensors": hashlib.sha256(b"weights").hexdigest(),
    }
    (blobs / "0000").write_bytes(b"wEights")
    assert folder_sha256(folder) != found


def test_new_text_takes_the_place_of_the_old_and_never_overwrites_it(tmp_path):
    path, other = tmp_path / "value.json", tmp_path / "other"
    write_text(path, "old\n")
    os.link(path, other)
    write_json(path, {"ü": [1, None]})
    assert other.read_text() == "old\n", "a kill half way would have left half of the new one"
    assert path.read_text() == '{\n  "ü": [\n    1,\n    null\n  ]\n}\n'
    assert read_json(path) == {"ü": [1, None]}
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert sorted(tmp_path.iterdir()) == [other, path]


def test_text_that_cannot_be_written_leaves_the_old(tmp_path, monkeypatch):
    path = tmp_path / "value.json"
    write_text(path, "old\n")
    monkeypatch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full") as error:
        write_text(path, "new\n")
    assert error.value.filename == str(path)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old\n"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file or directory"),
        ("{", "not valid JSON"),
        ("[" * 10**5, "not valid JSON"),
        ("[1]", "expected a JSON object"),
        (" " * (LARGEST_JSON + 1), "not a file of a model's or adapter's settings"),
    ],
    ids=["none", "half", "deep", "list", "large"],
)
def test_what_is_no_json_object_is_refused_with_its_name(tmp_path, content, said):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError) as error:
        read_json(path)
    assert str(error.value) == f"{path}: {said}"


def test_a_pipe_is_no_file_of_settings(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InputError, match="not a file of a model's"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("own", "xdg", "where"),
    [
        ("mine", "theirs", "mine/gguf"),
        ("", "theirs", "theirs/san-llm/gguf"),
        ("", "", ".cache/san-llm/gguf"),
    ],
)
def test_the_cache_lies_where_it_is_said_to(tmp_path, monkeypatch, own, xdg, where):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in (("SAN_LLM_CACHE", own), ("XDG_CACHE_HOME", xdg)):
        monkeypatch.setenv(name, value and str(tmp_path / value))
    assert cache_folder("gguf") == tmp_path / where


@pytest.mark.parametrize(
    ("target", "inside"),
    [("model/real", True), ("blobs/1", True), ("key", False), ("model/../key", False)],
)
def test_a_link_leads_into_the_folder_or_the_hubs_blobs(tmp_path, target, inside):
    # The hub's cache: snapshots/COMMIT/FILE links to blobs/SUM.
    model = tmp_path / "snapshots" / "model"
    for folder in (model, tmp_path / "blobs"):
        folder.mkdir(parents=True)
    to = {"model": model, "blobs": tmp_path / "blobs"}
    head, _, rest = target.partition("/")
    aim = to[head] / rest if head in to else tmp_path / target
    aim.resolve().write_text("x")
    (model / "link").symlink_to(aim)
    if inside:
        refuse_link(model / "link")
        return
    with pytest.raises(InputError, match="a symbolic link out of the folder"):
        refuse_link(model / "link")


def test_a_key_does_not_depend_on_the_order_of_names_and_code_has_one_hash():
    assert key_of({"a": 1, "b": {"c": 2, "d": 3}}) == key_of({"b": {"d": 3, "c": 2}, "a": 1})
    assert key_of({"a": 1}) != key_of({"a": 2})
    assert len(code_sha256()) == 64


def test_a_folder_that_takes_no_file_is_told_before_there_is_one_to_write(here, monkeypatch):
    refuse_file(here / "new" / "a.jsonl", overwrite=False)
    closed = []
    monkeypatch.setattr(os, "access", lambda path, how: closed.append(path))  # root may all
    with pytest.raises(InputError, match=r"a.jsonl: .* takes no file of yours; name another place"):
        refuse_file(here / "new" / "a.jsonl", overwrite=False)
    assert closed == [here]
