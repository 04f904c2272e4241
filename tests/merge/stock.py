"""What a process of stock transformers, without this package, computes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from safetensors.torch import load_file
from san.adapted import text

import san_llm.merge.verify as verifying
from san_llm.merge.stock_logits import main


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


def verify_in_this_process(monkeypatch):
    """Let a verification's script run here, where it can show all but that it was alone."""

    def run(command, **how):
        assert command[:2] == [sys.executable, "-P"]
        assert Path(command[2]).name == "stock_logits.py"
        assert how == {"capture_output": True, "text": True, "check": False}
        try:
            main(*command[3:])
        except SystemExit as error:
            wrong = not str(error).startswith("san_llm was imported")
            return subprocess.CompletedProcess(command, int(wrong), "", f"{error}\n")

    monkeypatch.setattr(verifying, "subprocess", SimpleNamespace(run=run))
