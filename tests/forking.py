"""Python processes of ours, forked from one that has imported the libraries already.

What a process of a test does first, most of its time, is to import torch and all that stands on it.
So ``subprocess.Popen`` forks ours from a server that has imported these libraries, though nothing
of this package: its code is imported, and runs, in each process anew. Such a process is one like
any other: a child of who started it, with the arguments, environment, directory, files, limits and
session that it was to have, also to those that look at it from outside. One that will start others,
such as a launcher, forks them in the same way, from a server of its own.

Code after ``-c`` says in its first line which libraries it wants: ``# forked from: stock``.
Whatever could make a difference starts a fresh interpreter: other ways to call Python, a variable
that a library reads while it is imported, and every test with the mark ``fresh``.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

TESTS = Path(__file__).resolve().parent
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl.h
MESSAGE = 2**19  # bytes
FILES = 3
PADDING = "FORKING_PADDING"  # room for another environment
LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]
MODULES = ("san_llm", "san_llm.launch.launcher", "accelerate.commands.launch")
MODULES += ("torch.distributed.run",)
FORKED = "# forked from: "
# What libraries read while they are imported; the server's has to be the same.
READ_EARLY = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TQDM_", "OMP_", "MKL_", "CUDA_", "LD_")
READ_EARLY += ("TORCH_", "PYTORCH_", "MALLOC_", "PYTHON", "HOME", "XDG_", "LANG", "LC_", "TZ")
READ_LATER = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_CPP_LOG_LEVEL", "PYTHONPATH")
# As the commands set them before they import anything, and the launcher for its workers.
SET_EARLY = {
    "OMP_NUM_THREADS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # which leaves CUDA to the children
}

Asked = dict[str, Any]
Fresh = subprocess.Popen
# A test run in the background ignores Ctrl-C, and so would its children.
interruptible = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)


# --- who asks ---------------------------------------------------------------------------------


class Server:
    """A process that forks: asked through a socket, which also ends it when it is closed."""

    def __init__(self, ours: socket.socket, environment: dict[str, str]) -> None:
        self._socket = ours
        self._environment = environment
        self._owner = os.getpid()
        self._lock = threading.Lock()

    @classmethod
    def start(cls, kind: str) -> Server:
        """Start a server with the libraries of a kind, a key of ``IMPORTS``."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        code = f"import sys; sys.path.insert(0, {str(TESTS)!r}); import forking; forking.main()"
        Fresh(
            # The last word is room for other arguments.
            [sys.executable, "-c", code, kind, str(theirs.fileno()), " " * 2**14],
            env={**os.environ, **SET_EARLY, PADDING: " " * 2**16},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        ).returncode = 0  # it ends with this process; nobody waits for it
        theirs.close()
        assert ours.recv(1) == b"{", "the server did not start"
        return cls(ours, dict(os.environ))

    def suits(self, environment: dict[str, str]) -> bool:
        """Whether the libraries would have been imported alike."""
        return self._owner == os.getpid() and all(
            environment.get(name) == self._environment.get(name)
            or environment.get(name) == SET_EARLY.get(name)
            for name in environment.keys() | self._environment.keys()
            if name.startswith(READ_EARLY) and name not in READ_LATER
        )

    def path(self, environment: dict[str, str]) -> list[str] | None:
        """Return the folders that come before the server's own on the import path.

        None if they have more in them than a ``sitecustomize.py``.
        """
        before, now = (e.get("PYTHONPATH", "") for e in (self._environment, environment))
        if not now.endswith(before):
            return None
        more = [folder for folder in now.removesuffix(before).split(":") if folder]
        names = {name for folder in more for name in os.listdir(folder)}
        return more if names <= {"sitecustomize.py", "__pycache__"} else None

    def fork(self, asked: Asked, files: list[int]) -> int:
        """Return the number of a new child of this process."""
        with self._lock, _adopting():
            socket.send_fds(self._socket, [json.dumps(asked).encode()], files)
            return int(self._socket.recv(64))


@contextlib.contextmanager
def _adopting() -> Any:
    """Become the parent of those below whose parent ends while the block runs."""
    control = ctypes.CDLL(None, use_errno=True).prctl
    assert control(SUBREAPER, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        control(SUBREAPER, 0, 0, 0, 0)


servers: dict[str, Server] = {}
nested = False  # whether this process has been forked itself
switched_on = True


def _kind(words: list[str]) -> str | None:
    """Return which server can fork a command line; None if it is for a fresh interpreter."""
    if not words or words[0] != sys.executable:
        return None
    rest = words[2:] if words[1:2] == ["-u"] else words[1:]
    if rest[:1] == ["-m"]:
        return "all" if rest[1] in MODULES else None
    if rest[:1] == ["-c"]:
        wanted = rest[1].partition("\n")[0].partition(FORKED)[2]
        return wanted or ("all" if nested else None)
    if rest[:1] == ["-P"]:
        return "stock" if rest[1].endswith("/stock_logits.py") else None
    return "all" if rest[:1] and rest[0].startswith(f"{TESTS}/launch/") else None


def _server(kind: str | None) -> Server | None:
    if kind is None or not switched_on or sys.platform != "linux":
        return None
    if kind not in servers and not nested:
        servers[kind] = Server.start(kind)
    return servers.get(kind)


class Popen(Fresh):  # type: ignore[type-arg]
    """``subprocess.Popen`` that forks where it can."""

    def _execute_child(
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo,
        creationflags, shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite,
        restore_signals, gid, gids, uid, umask, start_new_session, process_group,
    ):  # fmt: skip
        plain = not (executable or shell or pass_fds or process_group not in (None, -1))
        plain = plain and preexec_fn in (None, interruptible) and isinstance(args, list | tuple)
        plain = plain and gid is gids is uid is None and umask < 0
        words = [os.fspath(word) for word in args] if plain else []
        environment = dict(os.environ if env is None else env)
        server = _server(_kind(words))
        path = server and server.suits(environment) and server.path(environment)
        if path is None or path is False:
            return super()._execute_child(
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo,
                creationflags, shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite,
                restore_signals, gid, gids, uid, umask, start_new_session, process_group,
            )  # fmt: skip
        asked = {
            "words": words,
            "folder": os.path.abspath(cwd or "."),
            "environment": environment,
            "limits": [resource.getrlimit(number) for number in LIMITS],
            "session": start_new_session,
            "path": path,
            "libraries": server._environment.get("PYTHONPATH", ""),
        }
        ends = (p2cread, c2pwrite, errwrite)
        try:
            given = [end if end >= 0 else number for number, end in enumerate(ends)]
            self.pid = server.fork(asked, given)
            self._child_created = True
        finally:
            self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
        return None


def install() -> None:
    """Let this process fork the processes of ours that it starts."""
    subprocess.Popen = Popen  # type: ignore[misc]


# --- who forks --------------------------------------------------------------------------------


def _import_stock() -> None:
    import torch  # noqa: F401
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    del save_file, AutoModelForCausalLM, LlamaForCausalLM


def _import_light() -> None:
    """Import what a command has that needs no model: no torch, nor anything that stands on it."""
    from importlib import import_module

    for name in LIGHT:
        import_module(name)


def _import_all() -> None:
    import logging
    import warnings

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    _import_stock()
    from importlib import import_module

    for name in LIBRARIES:
        import_module(name)
    import datasets
    from transformers import AutoTokenizer, Trainer, TrainingArguments

    datasets.disable_progress_bars()
    del AutoTokenizer, Trainer, TrainingArguments


LIBRARIES = [
    *("typer", "rich.progress", "rich.markup", "rich.table", "pydantic", "yaml", "jinja2"),
    *("psutil", "filelock", "huggingface_hub", "pyarrow.parquet", "scipy.stats", "gguf"),
    *("accelerate", "accelerate.commands.launch", "peft", "datasets", "bitsandbytes"),
    *("torch.distributed.run", "torch.distributed.fsdp", "torch.distributed.tensor"),
]


LIGHT = ["typer", "rich.progress", "rich.markup", "rich.table", "rich.syntax", "pydantic", "yaml"]
LIGHT += ["psutil", "filelock", "numpy"]
IMPORTS = {"all": _import_all, "stock": _import_stock, "light": _import_light}


def main() -> None:
    """Import the libraries, and fork whenever asked."""
    global nested
    nested = True
    install()  # before a library takes it
    kind, number = sys.argv[1:3]
    del sys.path[0], os.environ[PADDING]  # the path of this file
    IMPORTS[kind]()
    threads = {path.read_text() for path in Path("/proc/self/task").glob("*/comm")}
    # Arrow's allocator has a thread of its own, which it looks after at a fork. Others were lost.
    assert len(threads - {"jemalloc_bg_thd\n"}) == 1, threads
    gc.collect()
    gc.freeze()
    theirs = socket.socket(fileno=int(number))
    theirs.set_inheritable(False)
    theirs.send(b"{")
    _serve(theirs)


def _serve(theirs: socket.socket) -> NoReturn:
    """Fork a child for whatever is asked, until nobody can ask any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        message, files, _, _ = socket.recv_fds(theirs, MESSAGE, FILES)
        if not message:
            os._exit(0)
        reading, writing = os.pipe()
        between = os.fork()
        if between == 0:
            # What this one forks becomes an orphan, and so a child of who has asked: when this one
            # has ended, which takes a while if there is much memory to give back.
            orphaned_by = os.getpid()
            if os.fork():
                os._exit(0)
            while os.getppid() == orphaned_by:
                time.sleep(0.001)
            for number in (reading, theirs.detach()):
                os.close(number)
            _live(json.loads(message), files, writing)
        os.close(writing)
        os.waitpid(between, 0)
        theirs.send(os.read(reading, 64))
        for number in (reading, *files):
            os.close(number)


def _live(asked: Asked, files: list[int], ready: int) -> NoReturn:
    """Be the process that was asked for, and write its number once it is one."""
    if asked["session"]:
        os.setsid()
    os.chdir(asked["folder"])
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(asked["environment"])
    _show(asked["words"], asked["environment"])
    for number, pair in zip(LIMITS, asked["limits"], strict=True):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(number, pair)
    os.write(ready, str(os.getpid()).encode())
    os.close(ready)
    servers.clear()
    if _starts_others(asked["words"]):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() == 0:
            ours.close()
            nothing = os.open(os.devnull, os.O_RDWR)
            for number in range(FILES):
                os.dup2(nothing, number)
            os.chdir("/")
            _serve(theirs)
        theirs.close()
        # On the import path is here what was there before the libraries were imported.
        there = asked["environment"] | {"PYTHONPATH": asked["libraries"]}
        servers["all"] = Server(ours, there)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _run(asked["words"][1:], asked["path"])


def _starts_others(words: list[str]) -> bool:
    command = words[3:4] if "san_llm" in words else []
    launches = {"--processes", "--accelerate"} & set(words) or command == ["doctor"]
    return bool(launches) or bool(set(MODULES[1:]) & set(words))


def _show(words: list[str], environment: dict[str, str]) -> None:
    """Put arguments and environment where others look for them, in /proc."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    areas = [int(field) for field in fields[45:49]]
    for texts, begin, end in (
        (words, *areas[:2]),
        ([f"{name}={value}" for name, value in environment.items()], *areas[2:]),
    ):
        content = b"".join(os.fsencode(text) + b"\0" for text in texts)[: end - begin - 1]
        ctypes.memset(begin, 0, end - begin)
        ctypes.memmove(begin, content, len(content))


def _run(words: list[str], path: list[str]) -> NoReturn:
    """Do what the interpreter does with its arguments, to its end."""
    import atexit
    import runpy
    import tempfile

    tempfile.tempdir = None
    unbuffered = words[0] == "-u" or bool(os.environ.get("PYTHONUNBUFFERED"))
    words = words[1:] if words[0] in ("-u", "-P") else words
    sys.stdout.reconfigure(line_buffering=os.isatty(1), write_through=unbuffered)  # type: ignore[union-attr]
    code: object = 0
    try:
        sys.path[:0] = path
        for folder in path:
            runpy.run_path(f"{folder}/sitecustomize.py")
        if words[0] == "-m":
            sys.path.insert(0, os.getcwd())
            sys.argv[:] = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.path.insert(0, "")
            sys.argv[:] = ["-c", *words[2:]]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            if not words[0].endswith("/stock_logits.py"):
                sys.path.insert(0, os.path.dirname(words[0]))
            sys.argv[:] = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    with contextlib.suppress(BaseException):
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code or 0 if isinstance(code, int | None) else 1)
