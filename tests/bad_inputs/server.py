"""One process that has imported everything and forks a child for each command line.

A child runs the real entry point with real arguments in a folder of its own, in a tenth of a
second instead of the ten that the imports take; asked to, it starts a fresh interpreter instead.
Requests come on stdin and answers go to stdout, one JSON object a line.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

GIB = 2**30
CPU_SECONDS, WALL_SECONDS = 20, 240


def import_everything() -> None:
    import accelerate
    import datasets
    import gguf
    import peft
    import torch  # noqa: F401
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    import san_llm

    for module in walk_packages(san_llm.__path__, "san_llm."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    datasets.disable_progress_bars()
    del accelerate, gguf, peft, transformers, san_llm
    del AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    threads = {path.read_text() for path in Path("/proc/self/task").glob("*/comm")}
    # Arrow's allocator has a thread of its own, which it looks after at a fork. Others were lost.
    assert len(threads - {"jemalloc_bg_thd\n"}) == 1, threads


def child(asked: dict[str, Any]) -> None:
    os.chdir(asked["folder"])
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(asked["environment"])
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    if asked["fresh"]:
        os.execv(sys.executable, [sys.executable, "-m", "san_llm", *asked["words"]])
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 3 * GIB, mapped + 3 * GIB))
    sys.argv = ["san-llm", *asked["words"]]
    from san_llm.cli import main

    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    import_everything()
    gc.freeze()
    print("{}", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(asked)
        began = time.monotonic()
        while True:
            done, status, used = os.wait4(pid, os.WNOHANG)
            if done:
                break
            if time.monotonic() - began > WALL_SECONDS:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        answer = {
            "code": os.waitstatus_to_exitcode(status),
            "memory": used.ru_maxrss * 1024,  # bytes
            "seconds": used.ru_utime + used.ru_stime,
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
