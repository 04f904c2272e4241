"""Fixtures: a working directory and a cache of the test's own, a tiny base, the real 135M."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forking
import pytest

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, each on a core of its own
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
forking.install()

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test, nor what several share, reads or writes the user's cache or state."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAN_LLM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.getbasetemp() / "state"))
        yield


@pytest.fixture(autouse=True)
def processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes of a test are forked, or come from fresh interpreters where it says so."""
    fresh = request.node.get_closest_marker("fresh") is not None
    monkeypatch.setattr(forking, "switched_on", not fresh)


@pytest.fixture
def told_disk(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What the disk is told, in order: ``("flush", path)``, ``("rename", the new name)``."""
    told: list[tuple[str, str]] = []
    fsync = os.fsync

    def flushed(handle: int) -> None:
        told.append(("flush", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", flushed)
    for name, plain in (("rename", os.rename), ("replace", os.replace)):

        def renamed(old: Any, new: Any, plain: Any = plain, **how: Any) -> None:
            plain(old, new, **how)
            told.append(("rename", os.fspath(new)))

        monkeypatch.setattr(os, name, renamed)
    return told


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny LLaMA with its tokenizer. Not to be changed by a test."""
    from tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real SmolLM2-135M, which `make test` fetches before it starts pytest."""
    folder = ROOT / "models" / "smollm2-135m"
    if not (folder / "config.json").is_file():
        pytest.skip("models/smollm2-135m is not there: `san-llm download smollm2-135m` gets it")
    return folder


@pytest.fixture
def cli(here: Path) -> Cli:
    """Run ``san-llm`` as a process in the test's directory, on one thread."""

    def run(
        *arguments: object, timeout: float = 300, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "san_llm", *map(str, arguments)],
            cwd=here,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    return run


@pytest.fixture
def command(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run ``san-llm`` as ``cli`` does, but inside the test's process, which saves its start."""
    from san_llm.cli import main
    from san_llm.commands.options import stdout
    from san_llm.progress import stderr

    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        words = ["san-llm", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", words)
        for console in (stdout, stderr):  # which took their width from the test that came first
            monkeypatch.setattr(console, "_width", 120)
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        return subprocess.CompletedProcess(words, code, said.out, said.err)

    return run
