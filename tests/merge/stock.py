"""What a process of stock transformers, without this package, computes."""

import json
import os
import subprocess
import sys

from safetensors.torch import load_file
from san.adapted import text


def stock_logits(script, folders, out):
    """Return the fp32 logits of checkpoints as a script computes them in a process of its own.

    The script finds ``[folders, tokens, out]`` as JSON in its first argument.
    """
    asked = json.dumps([[str(folder) for folder in folders], text().tolist(), str(out)])
    done = subprocess.run(
        [sys.executable, "-c", script, asked],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return load_file(out)
