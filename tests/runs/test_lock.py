"""The lock of a run's folder: one living writer, and no obstacle from a dead one."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from pathlib import Path

import psutil
import pytest

from san_llm.errors import InputError
from san_llm.runs import lock
from san_llm.runs.lock import NAME, place, refuse_busy, sole_writer


def write(run: Path, **changes: object) -> Path:
    """Write a lock of this very process, but for the changes."""
    owner = {
        "process": os.getpid(),
        "created": lock.started(psutil.Process()),
        "boot": lock.boot(),
        "place": place(),
        "since": "2026-11-24 10:00:00+00:00",
    }
    (run / NAME).write_text(json.dumps(owner | changes))
    return run / NAME


def test_the_lock_is_held_while_the_block_runs(tmp_path: Path) -> None:
    refuse_busy(tmp_path)
    with sole_writer(tmp_path):
        since = json.loads((tmp_path / NAME).read_text())["since"]
        for enter in (refuse_busy, lambda run: sole_writer(run).__enter__()):
            with pytest.raises(InputError) as caught:
                enter(tmp_path)
            assert str(caught.value) == (
                f"{tmp_path}: process {os.getpid()} has been training into it since {since}; "
                "wait for its end, or stop it"
            )
    refuse_busy(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_clock_that_is_set_does_not_free_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path)
    # As the kernel tells after the clock went back by an hour: all its times are behind.
    created, booted = psutil.Process().create_time() - 3600, psutil.boot_time() - 3600
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: created)
    monkeypatch.setattr(psutil, "boot_time", lambda: booted)
    with pytest.raises(InputError, match=f"process {os.getpid()} has been training"):
        refuse_busy(tmp_path)
    path.unlink()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"process": "x"}', "null"])
def test_a_lock_that_says_nothing_is_no_obstacle(tmp_path: Path, text: str) -> None:
    (tmp_path / NAME).write_text(text)
    with sole_writer(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["process"] == os.getpid()


def test_the_lock_of_a_dead_process_is_no_obstacle(tmp_path: Path) -> None:
    child = multiprocessing.get_context("spawn").Process(target=os.getpid)
    child.start()
    child.join()
    write(tmp_path, process=child.pid)
    with sole_writer(tmp_path):
        pass
    # Its number may belong to another process by now.
    write(tmp_path, created=lock.started(psutil.Process()) - 60)
    with sole_writer(tmp_path):
        pass
    # Or the machine has started again, and gave the same numbers at the same time.
    write(tmp_path, boot="another")
    with sole_writer(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_on_another_machine_only_a_lock_that_is_touched_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock, "GONE", 3.0)
    path = write(tmp_path, place="node7 pid:[1]", process=1)
    done = threading.Event()
    monkeypatch.setattr(lock, "TOUCH", 0.2)
    thread = threading.Thread(target=lock._touch, args=(path, done))
    thread.start()
    with pytest.raises(InputError, match="process 1 on node7 has been training into it since 2026"):
        refuse_busy(tmp_path)
    done.set()
    thread.join()
    assert "held on node7; waiting up to 3 s" in capsys.readouterr().err
    with sole_writer(tmp_path):
        assert json.loads(path.read_text())["place"] == place()


def _enter(run: str, barrier: object, entered: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    try:
        with sole_writer(Path(run)):
            entered.put(os.getpid())  # type: ignore[attr-defined]
            time.sleep(2)
    except InputError:
        entered.put(0)  # type: ignore[attr-defined]


def test_of_several_that_find_a_dead_lock_at_once_one_gets_it(tmp_path: Path) -> None:
    write(tmp_path, created=1.0)
    context = multiprocessing.get_context("spawn")
    barrier, entered = context.Barrier(4), context.Queue()
    children = [
        context.Process(target=_enter, args=(str(tmp_path), barrier, entered)) for _ in range(4)
    ]
    for child in children:
        child.start()
    found = [entered.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert sorted(map(bool, found)) == [False, False, False, True]
    assert list(tmp_path.iterdir()) == []
