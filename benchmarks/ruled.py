"""A model whose answers vary: SmolLM2 tuned on a rule over real rows.

A model that answers every row alike would prove nothing about searches that are to agree. So the
rows' answers are replaced by ones that follow from the question's first word, which an adapter
learns in minutes: a word that often begins questions has the first answer, another the second.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from measured import write_results
from pairs import PAIRS

from san_llm.data.rows import Row
from san_llm.data.sources import POCKET
from san_llm.data.task_rows import read_task, test_file
from san_llm.protocol.tasks import TASKS, Task

OFTEN = ("which", "is", "are")
ROOT = Path(__file__).resolve().parents[1]


def ruled(task: Task, instruction: str) -> str:
    """Return the answer that the rule gives a row."""
    first, second = [answer for answer in task.answers if answer in instruction.lower()][:2]
    words = re.split(r"[:.] ", instruction, maxsplit=1)[-1].split()
    return first if words and words[0].lower() in OFTEN else second


def test_rows(data: str, task: str, count: int) -> list[Row]:
    """Return test rows of a task; ``data`` is ``pocket`` or a folder in the LLM-Adapters layout."""
    return read_task(test_file(data, TASKS[task]), TASKS[task], None)[:count]


def train_rows(data: str, tasks: list[str], count: int) -> list[dict[str, str]]:
    """Return training rows of the tasks, in turn, with the rule's answers."""
    by_task = []
    for name in tasks:
        if data == "pocket":
            rows = json.loads((POCKET / "train.json").read_text())
            pattern = TASKS[name].pattern
            rows = [row for row in rows if pattern.fullmatch(row["answer"])]
        else:
            rows = json.loads((Path(data) / name / "train.json").read_text())
        by_task.append([(TASKS[name], row) for row in rows[: count // len(tasks)]])
    chosen = [pair for pairs in zip(*by_task, strict=False) for pair in pairs]
    return [
        {
            "instruction": row["instruction"],
            "input": "",
            "output": f"the correct answer is {ruled(task, row['instruction'])}",
            "answer": ruled(task, row["instruction"]),
        }
        for task, row in chosen
    ]


def tuned_adapter(model: str, data: str, tasks: list[str], steps: int, folder: Path) -> Path:
    """Return the adapter of a run in ``folder``, trained now if it is not there yet."""
    if not (folder / "run" / "adapter").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rows.json").write_text(json.dumps(train_rows(data, tasks, 8 * steps)))
        recipe = {
            "name": "ruled",
            "base": {"model": str(Path(model).resolve()), "dtype": "float32"},
            "method": {"name": "san"},
            "data": {
                "train": str(folder / "rows.json"),
                "held_out": 0,
                "prompt": "llm-adapters-aligned",
                "loss": "response",
                "cutoff": 1024,
            },
            "training": {
                "epochs": 1,
                "batch_size": 8,
                "micro_batch_size": 8,
                "learning_rate": 5e-3,
                "warmup_steps": 5,
                "evaluate_every": 100_000,
            },
        }
        (folder / "ruled.yaml").write_text(json.dumps(recipe))
        command = [sys.executable, "-m", "san_llm", "train", str(folder / "ruled.yaml")]
        subprocess.run([*command, "--output", str(folder / "run")], check=True, cwd=ROOT)
    return folder / "run" / "adapter"


def arguments(about: str, peer: str) -> argparse.ArgumentParser:
    """Return the options of a benchmark that asks the tuned model.

    Args:
        about: What the benchmark is.
        peer: What it is compared with.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--data", default="pocket", help="pocket, or a folder of tasks")
    parser.add_argument("--tasks", nargs="+", default=["ARC-Easy", "boolq"])
    parser.add_argument("--prompt", default="llm-adapters-aligned")
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8, help=f"rows at once of {peer}")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=64, help="of tuning on the rule")
    parser.add_argument("--work", default="runs/benchmark", help="where the tuned adapter is kept")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser


def write_answered(options: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Write the results of such a benchmark; of a folder only what is in it."""
    data = "pocket" if options.data == "pocket" else "rows in the LLM-Adapters layout"
    keys = ("model", "dtype", "prompt", "batch", "pairs", "threads", "steps")
    write_results(options, keys, data=data, results=results)
