"""Memory that a run gives back: what is freed between kept tensors leaves the process."""

import json
import subprocess
import sys

import pytest

# 40 arrays of 4 MB, each with a small one behind it that stays.
SCRIPT = """
import json, sys
import numpy as np
from san_llm.launch.malloc import without_holes

def resident():
    pages = open("/proc/self/statm").read().split()[1]
    return int(pages) * 4096

done = without_holes() if sys.argv[1] == "without" else None
large = np.ones(2**21)
del large  # from now on malloc would keep such sizes
pairs = [(np.ones(2**19), np.ones(2**12)) for _ in range(40)]
full = resident()
pairs = [small for _, small in pairs]
print(json.dumps([done, full - resident()]))
"""


def given_back(how: str) -> tuple[bool | None, int]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True, timeout=60
    )
    can, size = json.loads(done.stdout)
    return can, size


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_large_memory_goes_back_to_the_system():
    can, size = given_back("without")
    if not can:
        pytest.skip("malloc is not glibc's")
    assert size > 0.9 * 40 * 2**22
    assert given_back("with")[1] < 0.5 * 40 * 2**22
