"""Some hundred bad inputs through the real command line: refused in one line, with nothing written.

The inputs are in ``bad_inputs``: files with what is said about them in ``expected.yaml``, and
``building.py`` for those that are made here.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from bad_inputs.table import GOOD, HERE, all_cases
from tiny import rows, save_tiny, write_rows

CASES = all_cases()
FRESH = 100  # every so many cases a process of its own instead of a fork
GIB = 2**30


class Server:
    """The process that forks; see ``bad_inputs/server.py``."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                # As the commands set them before they import anything.
                "TQDM_DISABLE": "1",
                "TRANSFORMERS_VERBOSITY": "error",
            },
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "{}\n"

    def run(self, words, folder, notes, fresh=False, **environment):
        """Run a command line in a folder; its output comes back through files in ``notes``."""
        notes.mkdir(parents=True, exist_ok=True)
        asked = {
            "words": words,
            "folder": str(folder),
            "stdout": str(notes / "stdout"),
            "stderr": str(notes / "stderr"),
            "environment": {"SAN_LLM_CACHE": str(self._cache), "COLUMNS": "120", **environment},
            "fresh": fresh,
        }
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        done = json.loads(self._process.stdout.readline())
        for stream in ("stdout", "stderr"):
            done[stream] = (notes / stream).read_bytes().decode("utf-8")
        return done

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    one = Server(tmp_path_factory.mktemp("cache"))
    yield one
    one.close()


@pytest.fixture(scope="module")
def good(server, tmp_path_factory) -> Path:
    """A folder in which all is well: a base, rows, a recipe, a finished and a stopped run."""
    folder = tmp_path_factory.mktemp("good") / "here"
    folder.mkdir()
    save_tiny(folder / "model", num_hidden_layers=2)
    write_rows(folder / "rows.json", rows(12))
    write_rows(folder / "data" / "boolq" / "test.json", rows(2))
    shutil.copyfile(GOOD, folder / "good.yaml")
    for run in ("stopped", "done"):
        words = ["train", "good.yaml", "--output", f"runs/{run}"]
        done = server.run(words, folder, folder.parent / run)
        assert done["code"] == 0, done
    shutil.rmtree(folder / "runs" / "stopped" / "adapter")
    (folder / "runs" / "stopped" / "metrics.json").unlink()
    return folder


def tree(folder: Path) -> dict[str, str]:
    """Return all that is in a folder: directories, links, and files with their content's hash."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.is_symlink():
                what = f"link to {os.readlink(path)}"
            elif path.is_dir():
                what = "folder"
            elif path.is_file() and path.stat().st_size < GIB // 4:
                what = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                what = f"{path.lstat().st_size} bytes"
            found[str(path.relative_to(folder))] = what
    return found


def is_control(character: str) -> bool:
    return unicodedata.category(character) == "Cc" and character != "\n"


def test_there_are_at_least_two_hundred_cases_and_no_file_is_forgotten():
    assert len({case.name for case in CASES}) == len(CASES) >= 200
    written = {case.name for case in CASES}
    for kind, word in (("recipes", "recipe"), ("rows", "rows")):
        for file in (HERE / kind).iterdir():
            assert f"{word} {file.name}" in written


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_bad_input_is_refused_in_one_line_and_writes_nothing(
    server, good, tmp_path, case, request
):
    here = tmp_path / "here"
    shutil.copytree(good, here, symlinks=True)
    if case.damage is not None:
        case.damage(here)
    before = tree(here)
    done = server.run(
        shlex.split(case.command),
        here,
        tmp_path,
        fresh=CASES.index(case) % FRESH == 0,
        **case.environment,
    )
    said = done["stderr"]
    lines = said.splitlines()
    errors = [line for line in lines if re.match(r"(error|Error): ", line)]
    assert done["code"] == case.code, done
    assert done["stdout"] == ""
    # One line; of a recipe with several mistakes one for each. Nothing comes behind.
    assert len(errors) == 1 or "yaml" in errors[0], said
    assert errors == lines[-len(errors) :], said
    assert any(case.says in line for line in errors), said
    assert all(len(line) <= 1100 for line in errors)
    assert "Traceback" not in said
    assert not any(map(is_control, said)), repr(said)
    assert tree(here) == before
    assert done["memory"] < 2 * GIB, done
