"""Files written past the page cache, against plain ones."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from san_llm.merge import direct_file
from san_llm.merge.direct_file import DirectFile

PATTERN = np.random.default_rng(0).integers(0, 256, 2**17, dtype=np.uint8)


def written(path: Path, sizes: list[int]) -> bytes:
    """Write pieces of these sizes from one room, check the hash, and return what they were."""
    room, whole = np.empty(2**17, np.uint8), b""
    with DirectFile(path) as file:
        for number, size in enumerate(sizes):
            room[:size] = np.roll(PATTERN, number)[:size]
            whole += room[:size].tobytes()
            file.append(room[:size])
            room[:size] = 0  # may be changed as soon as it was taken
        assert file.close() == hashlib.sha256(whole).hexdigest()
    return whole


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sizes=st.lists(st.integers(0, 2**17), max_size=12),
    segment=st.sampled_from([2**12, 2**13, 2**16]),
)
def test_what_is_appended_is_in_the_file(tmp_path, monkeypatch, sizes, segment):
    monkeypatch.setattr(direct_file, "SEGMENT", segment)
    whole = written(tmp_path / "file", sizes)
    assert (tmp_path / "file").read_bytes() == whole


def test_it_is_whole_before_it_is_flushed(tmp_path, monkeypatch):
    monkeypatch.setattr(direct_file, "SEGMENT", 2**12)
    flush, sizes = os.fsync, []

    def flushed(handle: int) -> None:
        sizes.append(os.fstat(handle).st_size)
        flush(handle)

    monkeypatch.setattr(os, "fsync", flushed)
    whole = written(tmp_path / "file", [5000, 1, 70000])
    assert sizes == [len(whole)]


def test_a_longer_file_of_that_name_is_replaced(tmp_path):
    (tmp_path / "file").write_bytes(bytes(10**6))
    whole = written(tmp_path / "file", [5000, 1, 70000])
    assert (tmp_path / "file").read_bytes() == whole


def test_a_disk_that_takes_no_such_writes_gets_plain_ones(tmp_path, monkeypatch):
    # Real refusals: no disk's blocks begin at multiples of 1,000 bytes.
    monkeypatch.setattr(direct_file, "SEGMENT", 1000)
    monkeypatch.setattr(direct_file, "BLOCK", 1)
    whole = written(tmp_path / "file", [999, 5000, 1, 70000])
    assert (tmp_path / "file").read_bytes() == whole


def test_without_direct_writes_the_file_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(direct_file, "DIRECT", 0)
    whole = written(tmp_path / "file", [131072] * 40)
    assert (tmp_path / "file").read_bytes() == whole


def test_a_disk_that_refuses_is_an_error(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            written(tmp_path / "file", [2**17] * 400)  # 50 MB: told long before the end
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
