"""Real processes that tell each other what one of them has found out, however long that took."""

from __future__ import annotations

import os
import subprocess
import sys

from san_llm.launch.command import _free_port

WAITING = """# forked from: all
import time
from datetime import timedelta
from torch import distributed
from san_llm.launch.processes import agree, gather, rank

start = distributed.init_process_group
def noted(*arguments, **keywords):
    print(keywords.get("timeout"))
    return start(*arguments, **keywords)
distributed.init_process_group = noted
agree(None)
distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=1), distributed.group.WORLD)
time.sleep(0 if rank() else 2)  # the first hashes a base
print(agree(f"from {rank()}"))
time.sleep(2 if rank() else 0)  # and the other is the last to evaluate
print(gather([rank(), rank()]))
"""


def test_processes_wait_for_what_one_does_alone_longer_than_for_a_step() -> None:
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2"}
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", WAITING],
            env={**os.environ, **together, "RANK": str(n), "LOCAL_RANK": str(n)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(2)
    ]
    for process in pair:
        out, errors = process.communicate(timeout=120)
        assert out.splitlines() == ["0:30:00", "from 0", "[0, 0, 1, 1]"], errors
