"""The lock of a run's folder: one living writer, and no obstacle from a dead one."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from san_llm.errors import InputError
from san_llm.runs.lock import NAME, place, refuse_busy, seems_busy, sole_writer

HOLD = """
import os, signal, subprocess, sys, time
from pathlib import Path
from san_llm.runs.lock import sole_writer
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
with sole_writer(Path(sys.argv[1])):
    {inside}
    print("in", flush=True)
    time.sleep(60)
"""
FORK = "if not os.fork(): time.sleep(60); os._exit(0)"
FORK_IN_THREAD = """import threading
    thread = threading.Thread(target=lambda: os.fork() or time.sleep(60))
    thread.start(); time.sleep(0.2)"""
WORKERS = """import multiprocessing
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,)).start()"""
EXEC = 'subprocess.Popen(["sleep", "60"], close_fds=False)'
OLD = {  # of the version before: a file alone was the lock
    "process": os.getpid(),
    "created": 5.0,
    "boot": "",
    "place": place(),
    "since": "2026-11-24 10:00:00+00:00",
}


@contextmanager
def holder(run: Path, inside: str = "pass") -> Iterator[subprocess.Popen[str]]:
    """Have a process hold the lock, in a process group of its own that ends with the block."""
    command = [sys.executable, "-c", HOLD.format(inside=inside), str(run)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "in\n"
            yield process
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_the_lock_is_held_while_the_block_runs(tmp_path: Path) -> None:
    refuse_busy(tmp_path)
    assert list(tmp_path.iterdir()) == []  # who looks leaves nothing
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


def test_an_error_in_the_block_frees_the_lock(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), sole_writer(tmp_path):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [{"process": 1}, {"place": "elsewhere"}, {"since": "now"}])
def test_the_lock_of_another_owner_stays(tmp_path: Path, change: dict[str, object]) -> None:
    with sole_writer(tmp_path):
        mine = json.loads((tmp_path / NAME).read_text())
        (tmp_path / NAME).unlink()  # as a user may who takes it for stale
        (tmp_path / NAME).write_text(json.dumps(mine | change))
    assert json.loads((tmp_path / NAME).read_text()) == mine | change


def test_another_process_is_named(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        assert seems_busy(tmp_path)
        for enter in (refuse_busy, lambda run: sole_writer(run).__enter__()):
            with pytest.raises(InputError, match=f": process {process.pid} has been training"):
                enter(tmp_path)
        assert json.loads((tmp_path / NAME).read_text())["process"] == process.pid


def test_neither_clocks_nor_times_free_the_lock(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        for when in (0, 2**31):
            os.utime(tmp_path / NAME, (when, when))
            with pytest.raises(InputError, match=f"process {process.pid} has been training"):
                refuse_busy(tmp_path)
        os.kill(process.pid, signal.SIGSTOP)  # nor that its owner does nothing
        assert seems_busy(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"process": "x"}', "null", json.dumps(OLD)])
def test_a_file_that_nobody_holds_is_no_obstacle(tmp_path: Path, text: str) -> None:
    (tmp_path / NAME).write_text(text)
    assert not seems_busy(tmp_path)
    assert (tmp_path / NAME).read_text() == text
    with sole_writer(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["process"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_holder_that_says_nothing_yet_holds(tmp_path: Path, text: str) -> None:
    with holder(tmp_path):
        (tmp_path / NAME).write_text(text)
        with pytest.raises(InputError, match=r": process \? has been training into it"):
            refuse_busy(tmp_path)


def test_a_holder_on_another_machine_is_named_with_it(tmp_path: Path) -> None:
    with holder(tmp_path):
        note = {"process": 1, "place": "node7 pid:[1]", "since": "2026-11-24 10:00:00+00:00"}
        (tmp_path / NAME).write_text(json.dumps(note))
        with pytest.raises(InputError, match="process 1 on node7 has been training into it since"):
            refuse_busy(tmp_path)


@pytest.mark.parametrize("how_ended", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("inside", ["pass", FORK, FORK_IN_THREAD, WORKERS, EXEC])
def test_the_lock_of_a_dead_process_is_no_obstacle_even_if_its_children_live(
    tmp_path: Path, inside: str, how_ended: signal.Signals
) -> None:
    with holder(tmp_path, inside) as process:
        assert seems_busy(tmp_path)
        os.kill(process.pid, how_ended)
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            if inside == WORKERS and how_ended == signal.SIGINT:
                break  # waits for its worker, after the block
            time.sleep(0.01)
        with sole_writer(tmp_path):
            assert json.loads((tmp_path / NAME).read_text())["process"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_child_that_is_done_does_not_free_the_lock_of_its_parent(tmp_path: Path) -> None:
    with sole_writer(tmp_path):
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
        context = multiprocessing.get_context("fork")  # ends as Python does
        worker = context.Process(target=seems_busy, args=(tmp_path,))
        worker.start()
        worker.join()
        assert seems_busy(tmp_path)
        assert (tmp_path / NAME).is_file()


def test_who_looks_does_not_keep_a_writer_out(tmp_path: Path) -> None:
    (tmp_path / NAME).touch()
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            seems_busy(tmp_path)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            with sole_writer(tmp_path):
                assert seems_busy(tmp_path)
    finally:
        done.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_and_used(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with sole_writer(tmp_path):
        assert "no locks on this file system" in " ".join(capsys.readouterr().err.split())
        assert not seems_busy(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_error_is_told(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    (tmp_path / NAME).symlink_to("mine")  # FileLock follows none
    with pytest.raises(OSError, match="symbolic links"), sole_writer(tmp_path):
        pytest.fail("the block must not be entered")
    assert (tmp_path / "mine").read_text() == "kept"


def test_a_new_lock_in_a_new_folder_of_that_name_stays(tmp_path: Path) -> None:
    with sole_writer(tmp_path):
        (tmp_path / NAME).unlink()
        (tmp_path / NAME).write_text("of another")
    assert (tmp_path / NAME).read_text() == "of another"


def _enter(run: str, barrier: object, entered: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    try:
        with sole_writer(Path(run)):
            entered.put(os.getpid())  # type: ignore[attr-defined]
            time.sleep(3)
    except InputError:
        entered.put(0)  # type: ignore[attr-defined]


def test_of_several_that_find_a_dead_lock_at_once_one_gets_it(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(json.dumps(OLD))
    context = multiprocessing.get_context("spawn")
    barrier, entered = context.Barrier(4), context.Queue()
    children = [
        context.Process(target=_enter, args=(str(tmp_path), barrier, entered)) for _ in range(4)
    ]
    for child in children:
        child.start()
    answers = [entered.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert sorted(map(bool, answers)) == [False, False, False, True]
    assert list(tmp_path.iterdir()) == []


TURNS = """
import os, sys, time
from pathlib import Path
from san_llm.errors import InputError
from san_llm.runs import lock
lock.PATIENCE = 30
run, mark = Path(sys.argv[1]), Path(sys.argv[2])
print("in", flush=True)
for _ in range(int(sys.argv[3])):
    with lock.sole_writer(run):
        {mark}
        assert lock.seems_busy(run)
        {unmark}
"""
MARK = "os.close(os.open(mark, os.O_CREAT | os.O_EXCL))"


def test_no_two_hold_it_though_its_file_goes_and_comes(tmp_path: Path) -> None:
    run, mark = tmp_path / "run", tmp_path / "mark"
    run.mkdir()
    code = TURNS.format(mark=MARK, unmark="mark.unlink()")
    command = [sys.executable, "-c", code, str(run), str(mark), "100"]
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert list(tmp_path.iterdir()) == [run]
    assert list(run.iterdir()) == []


@pytest.mark.parametrize("how_ended", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_ended_at_any_moment_leaves_no_obstacle(
    tmp_path: Path, how_ended: signal.Signals
) -> None:
    code = TURNS.format(mark="pass", unmark="pass")
    dice = random.Random(0)
    for _ in range(10):
        command = [sys.executable, "-c", code, str(tmp_path), "-", "1000000"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(dice.uniform(0, 0.05))
            process.send_signal(how_ended)
        with sole_writer(tmp_path):
            assert json.loads((tmp_path / NAME).read_text())["process"] == os.getpid()
        assert list(tmp_path.iterdir()) == []
