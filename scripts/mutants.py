"""Which small edits of the code would no test notice? Draws some, tries each, keeps what it saw.

The edits are those of mutmut: another sign, another constant, an argument or a key left out, a
branch that is always taken. They are drawn by a seed, a share for each module whose mistakes no
user would see, and tried in a copy of the tree, one at a time, on the fast tests that run the
edited statement. A process that has imported the libraries forks one for each edit, so that an edit
costs what its tests cost. ``make mutants`` runs it by hand; it is no check of a change.

    scripts/mutants.py --seed 1 --draw 300   try the 300 of this seed, less those tried before
    scripts/mutants.py --again               try those again that went unnoticed, or ran too long
    scripts/mutants.py                       print the table
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results_mutants.json"
KNOWN = ROOT / ".mutants"  # which test runs which statements; made anew where code or tests change
# A part: its modules, and where the tests lie that are about them.
PARTS: dict[str, tuple[list[str], list[str]]] = {
    "san": (["san/*.py"], ["san", "ops"]),
    "merge": (
        ["merge/*.py"],
        [
            "merge",
            "models/test_weights.py",
            "models/test_tokenizer_files.py",
            "san/test_formulas.py",
        ],
    ),
    "gguf": (["export/gguf.py"], ["merge/test_gguf.py", "merge/test_expected.py"]),
    "data": (["data/*.py"], ["data", "protocol", "evaluate/test_own_tasks.py"]),
    "loss, packing": (
        ["train/loss.py", "train/packed_attention.py", "train/batches.py"],
        ["train/test_loss.py", "train/test_batches.py", "data/test_batches.py", "ops"],
    ),
    "evaluate": (["evaluate/*.py"], ["evaluate", "ask", "runs/test_record.py"]),
    "files": (["files.py"], ["test_files.py", "runs", "merge/test_direct_file.py"]),
}
FAST = 5.0  # seconds: a test that takes longer is left out
AT_MOST = 30.0  # seconds of tests for an edit
SLOWER = 5  # times its seconds of CPU: what a child that waits for other work may take
FEWEST = 2  # edits of a module, however short
CAUGHT = ("caught", "ran too long")
NOT_RUN = ["the tests were not run"]
ENDED = ["the process of the tests ended"]


# --- the edits --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """One small edit of a module.

    Attributes:
        module: Path below the root.
        function: The functions and classes around it; empty at the top of the module.
        was: What is edited, as it stands.
        now: What stands there then.
        lines: The lines that a test has to run to notice; None where all of the module's count.
        nth: Tells apart edits of a function that look the same.
        code: Returns the whole edited module.
    """

    module: str
    function: str
    was: str
    now: str
    lines: tuple[int, int] | None
    nth: int
    code: Callable[[], str]

    @property
    def key(self) -> str:
        """Stays the same while the function around it moves."""
        told = (self.module, self.function, self.was, self.now, str(self.nth))
        return hashlib.sha256("\0".join(told).encode()).hexdigest()[:12]

    @property
    def is_one(self) -> bool:
        """Whether what it makes is another module, and still Python."""
        code = self.code()
        try:
            compile(code, "edited", "exec")
        except SyntaxError:
            return False
        return code != (ROOT / self.module).read_text(encoding="utf-8")


def edits_of(module: str) -> list[Edit]:
    """Return all edits of a module, in the order of the source."""
    import libcst as cst
    from libcst.metadata import MetadataWrapper, PositionProvider
    from mutmut.mutation.mutators import mutation_operators

    source = (ROOT / module).read_text(encoding="utf-8")
    found: list[tuple[cst.CSTNode, cst.CSTNode, str, tuple[int, int] | None]] = []

    class Finder(cst.CSTVisitor):
        METADATA_DEPENDENCIES = (PositionProvider,)

        def __init__(self) -> None:
            self.around: list[str] = []
            self.statements: list[cst.CSTNode] = []
            self.functions = 0

        def on_visit(self, node: cst.CSTNode) -> bool:
            # Types and imports say nothing that runs; prose is for people.
            if isinstance(node, cst.Annotation | cst.Import | cst.ImportFrom | cst.Decorator):
                return False
            if isinstance(node, cst.FunctionDef | cst.ClassDef):
                self.around.append(node.name.value)
                self.functions += isinstance(node, cst.FunctionDef)
            if isinstance(node, cst.SimpleStatementLine | cst.BaseCompoundStatement):
                self.statements.append(node)
            if not (isinstance(node, cst.SimpleString) and " " in node.value):
                for kind, operator in mutation_operators:
                    for new in operator(node) if isinstance(node, kind) else ():
                        found.append((node, new, ".".join(self.around), self.lines()))
            return True

        def on_leave(self, node: cst.CSTNode) -> None:
            if isinstance(node, cst.FunctionDef | cst.ClassDef):
                self.around.pop()
                self.functions -= isinstance(node, cst.FunctionDef)
            if self.statements and self.statements[-1] is node:
                self.statements.pop()

        def lines(self) -> tuple[int, int] | None:
            if not self.functions:
                return None
            statement = self.statements[-1]
            place = self.get_metadata(PositionProvider, statement)
            last = place.end.line
            if isinstance(statement, cst.BaseCompoundStatement) and not isinstance(
                statement, cst.FunctionDef
            ):
                body = statement.body if not isinstance(statement, cst.Match) else None
                last = self.get_metadata(PositionProvider, body).start.line - 1 if body else last
            return place.start.line, max(last, place.start.line)

    wrapper = MetadataWrapper(cst.parse_module(source))
    wrapper.visit(Finder())
    edits, seen = [], Counter[tuple[str, str, str]]()
    for node, new, function, lines in found:
        was, now = (" ".join(wrapper.module.code_for_node(one).split()) for one in (node, new))
        nth = seen[function, was, now]
        seen[function, was, now] += 1
        code = partial(_edited, wrapper.module, node, new)
        edits.append(Edit(module, function, was, now, lines, nth, code))
    return edits


def _edited(module: Any, node: Any, new: Any) -> str:
    code: str = module.deep_replace(node, new).code
    return code


def modules() -> dict[str, str]:
    """Return each module's part; a later part takes a module from an earlier one."""
    return {
        str(path.relative_to(ROOT)): part
        for part, (patterns, _) in PARTS.items()
        for pattern in patterns
        for path in sorted((ROOT / "san_llm").glob(pattern))
        if path.name != "__init__.py"
    }


def draw(seed: int, count: int) -> list[Edit]:
    """Return edits: of each module a share by its size, at least a few."""
    edits = {module: edits_of(module) for module in modules()}
    whole = sum(map(len, edits.values()))
    print(f"{whole:,} edits of {len(edits)} modules", file=sys.stderr)
    shares = {module: max(FEWEST, count * len(some) / whole) for module, some in edits.items()}
    scale = count / sum(shares.values())
    drawn: list[Edit] = []
    carried = 0.0
    for module, some in sorted(edits.items()):
        carried += shares[module] * scale
        number = min(int(carried + 0.5), len(some))
        carried -= number
        shuffled = random.Random(f"{seed} {module}").sample(some, len(some))
        drawn += islice((edit for edit in shuffled if edit.is_one), number)
    return drawn


# --- the tests --------------------------------------------------------------------------------

Runs = dict[str, tuple[float, dict[str, list[int]]]]  # a test's seconds, and lines of modules


class Watcher:
    """A plugin of pytest that notes which lines each test runs, and for how long."""

    def __init__(self, coverage: Any) -> None:
        self.coverage = coverage
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: set[str] = set()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Let what runs now count for this test."""
        self.coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Sum what a test took; one that does not pass cannot notice anything."""
        self.seconds[report.nodeid] += report.duration
        if not report.passed:
            self.failed.add(report.nodeid)


def watch(file: str, copy: Path) -> Runs:
    """Run one file of tests and return what each of those that pass has run."""
    import coverage
    import pytest

    watching = coverage.Coverage(data_file=None, source=[str(copy / "san_llm")], config_file=False)
    watcher = Watcher(watching)
    watching.start()
    pytest.main([*PYTEST, "-m", "not slow and not gpu and not fresh", file], plugins=[watcher])
    watching.stop()
    data = watching.get_data()
    runs: Runs = {test: (seconds, {}) for test, seconds in watcher.seconds.items()}
    for path in data.measured_files():
        module = str(Path(path).relative_to(copy))
        for line, tests in data.contexts_by_lineno(path).items():
            for test in tests:
                if test in runs:
                    runs[test][1].setdefault(module, []).append(line)
    return {test: told for test, told in runs.items() if test not in watcher.failed}


PYTEST = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "-o", "addopts="]
PYTEST += ["--import-mode=importlib", "--show-capture=no", "--tb=no", "--basetemp=tried"]
PYTEST += ["-p", "no:unraisableexception", "-p", "no:threadexception"]  # they collect garbage


class Tree:
    """A copy of the tree in which edits are tried, by children of this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.splitlines()  # fmt: skip
        for name in names:
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, folder / name)
        os.environ.update(PYTHONPATH=str(folder), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
        sys.path[:0] = [str(folder), str(folder / "tests")]
        os.chdir(folder)
        import forking

        forking.TESTS = folder / "tests"
        os.environ.update(forking.SET_EARLY)
        forking._import_all()
        for name in ("pytest", "hypothesis", "hypothesis.strategies", "coverage", "jsonschema"):
            import_module(name)
        gc.collect()
        gc.freeze()  # what is here is not looked through again in each child

    def run(self, seconds: float, work: Any) -> Any:
        """Return what a forked child's work returns; None if it takes more seconds of CPU."""
        told = self.folder / ".told.json"
        told.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 1))
            with open(os.devnull, "r+b") as nothing:
                for number in range(3):
                    os.dup2(nothing.fileno(), number)
            try:
                _fork_from_here()
                told.write_text(json.dumps(work()))
            finally:
                os._exit(0)
        late = time.monotonic() + SLOWER * seconds
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > late:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return None
            time.sleep(0.05)
        _end_group(child)
        if os.WIFSIGNALED(ended[1]) and os.WTERMSIG(ended[1]) == signal.SIGXCPU:
            return None
        return json.loads(told.read_text()) if told.exists() else ENDED

    def known(self, part: str) -> Runs:
        """Return which of a part's tests run which lines, from before where nothing changed."""
        KNOWN.mkdir(exist_ok=True)
        files: list[Path] = []
        for place in PARTS[part][1]:
            path = self.folder / "tests" / place
            files += sorted(path.glob("test_*.py")) if path.is_dir() else [path]
        shared = [*sorted((self.folder / "san_llm").rglob("*.py"))]
        code = hashlib.sha256(b"".join(path.read_bytes() for path in shared)).hexdigest()
        runs: Runs = {}
        for file in filter(Path.exists, files):
            name = str(file.relative_to(self.folder))
            key = hashlib.sha256(code.encode() + file.read_bytes()).hexdigest()[:16]
            short = "-".join(Path(name).with_suffix("").parts[1:])  # stems are not each one's own
            kept = KNOWN / f"{short}-{key}.json"
            if not kept.exists():
                print(f"  {name}", file=sys.stderr)
                told = self.run(1800, lambda name=name: watch(name, self.folder))
                for old in KNOWN.glob(f"{short}-????????????????.json"):
                    old.unlink()
                if told in (None, ENDED):
                    raise SystemExit(f"{name}: its tests do not come to an end")
                kept.write_text(json.dumps(told))
            runs |= json.loads(kept.read_text())
        return {test: told for test, told in runs.items() if told[0] < FAST}

    def outcome(self, edit: Edit, runs: Runs) -> tuple[str, str]:
        """Return what became of an edit, and the test that noticed."""
        tests = tests_for(edit, runs)
        if not tests:
            return "survived", "no fast test runs it"
        path = self.folder / edit.module
        before = path.stat()
        original = path.read_bytes()
        path.write_text(edit.code(), encoding="utf-8")
        os.utime(path, (before.st_atime, before.st_mtime - 10 - int(edit.key[:6], 16)))
        try:
            told = self.run(15 + 3 * sum(runs[test][0] for test in tests), lambda: noticed(tests))
        finally:
            path.write_bytes(original)
            os.utime(path, (before.st_atime, before.st_mtime))
        if told == NOT_RUN:
            raise SystemExit(f"{edit.module}: pytest does not run {tests}")
        if told is None:
            return "ran too long", ""
        return ("caught", told[0]) if told else ("survived", f"{len(tests)} tests")


def _fork_from_here() -> None:
    """Let the processes of tests be forked from one like this, which has the libraries."""
    import socket

    import forking

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        forking.nested = True
        forking.install()
        forking._serve(theirs)
    theirs.close()
    forking.servers["all"] = forking.Server(ours, dict(os.environ))


def _end_group(leader: int) -> None:
    """End what a child has left behind: its server of processes, at least."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def tests_for(edit: Edit, runs: Runs) -> list[str]:
    """Return the tests that run an edited statement, quickest first."""
    by_line: list[str] = []
    by_module: list[str] = []
    for test, (_, lines) in sorted(runs.items(), key=lambda item: item[1][0]):
        there = lines.get(edit.module, ())
        if there:
            by_module.append(test)
        if edit.lines and any(edit.lines[0] <= line <= edit.lines[1] for line in there):
            by_line.append(test)
    chosen, seconds = [], 0.0
    # A process of a test is not watched: its tests are tried where no other is known.
    for test in by_line or by_module or sorted(runs, key=lambda test: runs[test][0]):
        seconds += runs[test][0]
        if seconds > AT_MOST:
            break
        chosen.append(test)
    return chosen


def noticed(tests: Sequence[str]) -> list[str]:
    """Run tests up to the first that fails, and return it."""
    import pytest

    class First:
        found: list[str] = []  # noqa: RUF012

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed:
                self.found.append(report.nodeid)
                raise KeyboardInterrupt  # ends pytest without a look at the failure

        pytest_collectreport = pytest_runtest_logreport  # a module that cannot be imported

    first = First()
    ended = pytest.main([*PYTEST, *tests], plugins=[first])
    return first.found or ([] if ended == 0 else NOT_RUN)


# --- what was seen ----------------------------------------------------------------------------


def read() -> dict[str, dict[str, Any]]:
    """Return what became of each edit that was tried, by its key."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def write(results: dict[str, dict[str, Any]]) -> None:
    """Keep the results, an edit a line."""
    lines = (f"{json.dumps(key)}: {json.dumps(told)}" for key, told in results.items())
    RESULTS.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def table(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table: a part each, and their sum."""
    parts = modules()
    rows: dict[str, Counter[str]] = {part: Counter() for part in [*PARTS, "together"]}
    for told in results.values():
        if told["module"] in parts:
            for part in (parts[told["module"]], "together"):
                outcome = "caught" if told["outcome"] in CAUGHT else told["outcome"]
                rows[part].update([outcome, "drawn"])
    yield "| part | drawn | caught | without effect | unnoticed | caught of those with effect |"
    yield "| --- | --: | --: | --: | --: | --: |"
    for part, row in rows.items():
        effect = row["drawn"] - row["no effect"]
        share = f"{100 * row['caught'] / effect:.0f} %" if effect else ""
        numbers = [row[name] for name in ("drawn", "caught", "no effect", "survived")]
        yield f"| {part} | {' | '.join(map(str, numbers))} | {share} |"


def try_all(edits: list[tuple[Edit, int]], results: dict[str, dict[str, Any]]) -> None:
    """Try edits, one after the other, and keep each result at once."""
    parts = modules()
    # Not a TemporaryDirectory: each process that is forked from here would remove it at its end.
    folder = Path(tempfile.mkdtemp(prefix="mutants-")).resolve()
    try:
        tree = Tree(folder)
        known = {part: tree.known(part) for part in sorted({parts[e.module] for e, _ in edits})}
        for number, (edit, seed) in enumerate(edits, 1):
            began = time.monotonic()
            outcome, by = tree.outcome(edit, known[parts[edit.module]])
            place = {"module": edit.module, "function": edit.function}
            told = {"seed": seed, **place, "was": edit.was, "now": edit.now}
            results[edit.key] = told | {"outcome": outcome, "by": by}
            write(results)
            spent = time.monotonic() - began
            print(f"{number}/{len(edits)} {spent:.1f} s {outcome}: {edit.module}", file=sys.stderr)
            if outcome == "survived":
                print(
                    f"  {edit.key} {edit.function} {edit.lines}\n  {edit.was}\n  -> {edit.now}",
                    file=sys.stderr,
                )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--draw", type=int, default=0, help="how many new edits to try")
    parser.add_argument("--again", action="store_true", help="try the unnoticed ones again")
    parser.add_argument("--module", default="", help="only modules whose path has this in it")
    options = parser.parse_args()
    results = read()
    edits: list[tuple[Edit, int]] = []
    if options.draw:
        drawn = draw(options.seed, options.draw)
        edits += [(edit, options.seed) for edit in drawn if edit.key not in results]
    if options.again:
        doubtful = ("survived", "ran too long")
        left = {key: told for key, told in results.items() if told["outcome"] in doubtful}
        for module in sorted({told["module"] for told in left.values()}):
            edits += [(e, left[e.key]["seed"]) for e in edits_of(module) if e.key in left]
    edits = [(edit, seed) for edit, seed in edits if options.module in edit.module]
    if edits:
        try_all(edits, results)
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
