"""Kills and resumes a training many times, and prints whether anybody could tell.

    python benchmarks/kills.py --kills 100

Each round trains one small run (LoRA with dropout, fp32, on the CPU) and kills -9 its whole process
tree several times: at random moments, or while a checkpoint is being written. The result must equal
a straight run's bit for bit: adapter, log and metrics.

One process is forked from one that has imported everything, which saves most of the time; with
--processes N or --cold each start is a command of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
STEPS, PER_RUN = 120, 10


class Forked:
    """A training in a process of its own, like a command, but with its imports done."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        os.setsid()
        os.chdir(folder)
        os.environ["SAN_LLM_CACHE"] = str(folder / "cache")
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        code = 1
        try:
            from san_llm.cli import main

            sys.argv = ["san-llm", "train", *arguments]
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.02)
        return int(self.returncode or 0)


def start(folder: Path, processes: int, *arguments: str) -> subprocess.Popen[bytes] | Forked:
    if not processes:
        return Forked(folder, list(arguments))
    several = ["--processes", str(processes)] if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, "-m", "san_llm", "train", *arguments, *several],
        cwd=folder,
        env={**os.environ, "SAN_LLM_CACHE": str(folder / "cache")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill(process: subprocess.Popen[bytes] | Forked) -> None:
    tree = [psutil.Process(process.pid)]
    tree += tree[0].children(recursive=True)
    for member in tree:
        member.kill()
    process.wait()


def last_step(run: Path) -> int:
    try:
        lines = (run / "log.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def wait_for_kill(
    run: Path, process: subprocess.Popen[bytes] | Forked, dice: random.Random
) -> str | None:
    """Wait for a moment to kill at, and return its kind; None if the run has ended before."""
    kind = dice.choice(["starting", "training", "training", "writing a checkpoint"])
    if kind == "starting":
        time.sleep(dice.uniform(0, 4))
        return kind if process.poll() is None else None
    target = last_step(run) + dice.randint(1, STEPS // PER_RUN)
    while process.poll() is None:
        if last_step(run) >= target:
            if kind == "training":
                time.sleep(dice.uniform(0, 0.1))
                return kind if process.poll() is None else None
            if any(run.glob("checkpoints/.checkpoint-*/*")):
                return kind
        time.sleep(0.0005)
    return None


def same(first: Path, second: Path) -> bool:
    names = ("adapter/adapter_model.safetensors", "log.jsonl")
    if any((first / name).read_bytes() != (second / name).read_bytes() for name in names):
        return False
    results = [json.loads((run / "metrics.json").read_text()) for run in (first, second)]
    own = {"run", "seconds", "resumed_at", "peak_memory"}
    return all(results[0][key] == results[1][key] for key in results[0].keys() - own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=60, help="stop after so long")
    parser.add_argument("--cold", action="store_true", help="start each as a command of its own")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    processes = options.processes if options.cold or options.processes > 1 else 0
    from tiny import rows, save_tiny, write_recipe, write_rows

    import san_llm.train.run  # noqa: F401 (for the forked ones)

    dice, began = random.Random(options.seed), time.monotonic()
    counts: dict[str, int] = {}
    runs = resumed = identical = 0
    with tempfile.TemporaryDirectory(prefix="san-llm-kills-") as name:
        folder = Path(name)
        recipe = write_recipe(
            folder / "r.yaml",
            save_tiny(folder / "tiny"),
            write_rows(folder / "rows.json", rows(30)),
            method={"name": "lora", "rank": 4, "dropout": 0.1},
            training={"max_steps": STEPS, "epochs": 99.0, "evaluate_every": 4,
                      "save_minutes": 0.002},
        )  # fmt: skip
        start(folder, processes, str(recipe), "--output", "whole").wait()
        while sum(counts.values()) < options.kills:
            if time.monotonic() - began > options.minutes * 60:
                break
            runs += 1
            run = folder / f"run{runs}"
            process = start(folder, processes, str(recipe), "--output", run.name)
            left = min(PER_RUN, options.kills - sum(counts.values()))
            while left:
                kind = wait_for_kill(run, process, dice)
                if kind is None:
                    break
                kill(process)
                left -= 1
                counts[kind] = counts.get(kind, 0) + 1
                # Killed before it had a folder, a run begins again instead.
                going_on = (run / "recipe.yaml").is_file()
                resumed += going_on
                arguments = (
                    (run.name, "--resume") if going_on else (str(recipe), "--output", run.name)
                )
                process = start(folder, processes, *arguments)
            if process.wait() == 0:
                identical += same(folder / "whole", run)
            print(f"run {runs}: {sum(counts.values())} kills, {identical} identical", flush=True)
    print("| killed while | kills |\n| --- | --: |")
    for kind, count in sorted(counts.items()):
        print(f"| {kind} | {count} |")
    print(
        f"\n{sum(counts.values())} kills, {resumed} resumed, {identical} of {runs} runs identical"
    )


if __name__ == "__main__":
    main()
