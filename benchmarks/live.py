"""What the live view and the gamma statistics cost: their share of a training's CPU time.

One real training in a terminal of 80 x 24 (in memory). Every second that this process spends inside
the view and the statistics is counted by the clock of the thread that spends it, and divided by
all CPU seconds of the training's steps. The rest of the run (loading, judging) is not in it.

    python benchmarks/live.py --model models/smollm2-135m --steps 12
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from measured import write_results
from rich.console import Console
from rich.live import Live

from san_llm import progress
from san_llm.recipe.read import load_recipe
from san_llm.recipe.shipped import find_recipe
from san_llm.runs.folder import new_run
from san_llm.train.callbacks import Drift
from san_llm.train.run import train
from san_llm.train.trainer import SanTrainer
from san_llm.train.view import View


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    options = parser.parse_args()

    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()

    def counted(what: str, function: Callable[..., Any], clock: Callable[[], float]) -> Any:
        def timed(*arguments: Any, **keywords: Any) -> Any:
            began = clock()
            try:
                return function(*arguments, **keywords)
            finally:
                spent[what] += clock() - began
                calls[what] += 1

        return timed

    drawing, statistics, steps = "drawing", "gamma statistics", "steps"
    Live.refresh = counted(drawing, Live.refresh, time.thread_time)
    for name in ("tell", "counted"):
        setattr(View, name, counted("telling", getattr(View, name), time.thread_time))
    Drift.measure = counted(statistics, Drift.measure, time.thread_time)
    SanTrainer.training_step = counted(steps, SanTrainer.training_step, time.process_time)
    progress.stderr = Console(file=io.StringIO(), force_terminal=True, width=80, height=24)
    overrides = {
        "base.model": options.model,
        "training.max_steps": options.steps,
        "training.micro_batch_size": 16,
    }
    recipe = load_recipe(
        find_recipe("smollm2_demo"), [f"{key}={overrides[key]}" for key in overrides]
    )
    with TemporaryDirectory() as folder:
        train(recipe, new_run(recipe, Path(folder) / "run", overwrite=False))
    shown = (drawing, "telling", statistics)
    shares = {
        what: {
            "calls": calls[what],
            "milliseconds each": round(1000 * spent[what] / calls[what], 3),
            "share of the steps": round(spent[what] / spent[steps], 6),
        }
        for what in shown
    }
    total = sum(spent[what] for what in shown) / spent[steps]
    shares["all"] = {"share of the steps": round(total, 6)}
    shares[steps] = {
        "calls": calls[steps],
        "milliseconds each": round(1000 * spent[steps] / calls[steps]),
    }
    print(json.dumps(shares, indent=2))
    write_results(options, ("model", "steps"), **shares)


if __name__ == "__main__":
    main()
