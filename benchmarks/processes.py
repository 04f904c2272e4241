"""What a second process brings an evaluation: whole commands, one thread in each process.

``san-llm eval`` answers the same rows with one process and with two, in turn; the files of rows
must be the same byte for byte. Starting up is counted, and shown alone: a run of 8 rows.

``python benchmarks/processes.py --data DIR`` (a folder in the LLM-Adapters layout, of whose
training rows it takes as many as asked; else the pocket set)
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measured import write_results
from pairs import PAIRS
from ruled import arguments, train_rows, tuned_adapter


def seconds(adapter: Path, data: Path, processes: int, output: Path, *more: str) -> float:
    """Return the seconds of one evaluation as a user starts it."""
    command = [sys.executable, "-m", "san_llm", "eval", "--adapter", str(adapter)]
    command += ["--data", str(data), "--processes", str(processes), "--output", str(output)]
    began = time.perf_counter()
    done = subprocess.run(
        [*command, "--fresh", "--overwrite", *more],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    taken = time.perf_counter() - began
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return taken


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], peer="san-llm")
    parser.add_argument("--protocol", default="generate", choices=("generate", "loglik"))
    parser.set_defaults(tasks=["ARC-Easy"], rows=320)
    options = parser.parse_args()
    adapter = tuned_adapter(
        options.model, options.data, options.tasks, options.steps, Path(options.work)
    )
    by_way: dict[str, list[float]] = {"one": [], "two": [], "start_one": [], "start_two": []}
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "data"
        for task in options.tasks:
            (data / task).mkdir(parents=True)
            rows = train_rows(options.data, [task], options.rows)
            (data / task / "test.json").write_text(json.dumps(rows))
        more = ["--tasks", ",".join(options.tasks), "--protocol", options.protocol]
        for name, processes in (("start_one", 1), ("start_two", 2)):
            out = Path(temporary) / name
            by_way[name].append(seconds(adapter, data, processes, out, *more, "--limit", "8"))
        for _ in range(options.pairs):
            for name, processes in (("one", 1), ("two", 2)):
                out = Path(temporary) / name
                by_way[name].append(seconds(adapter, data, processes, out, *more))
                print(f"{name}: {by_way[name][-1]:.1f} s", file=sys.stderr)
            of_one, of_two = (
                (Path(temporary) / n / "rows.jsonl").read_bytes() for n in ("one", "two")
            )
            if of_one != of_two:
                sys.exit("the rows of one process and of two differ")
        answers = {json.loads(line)["parsed"] for line in of_one.splitlines()}
    ratios = [single / double for single, double in zip(by_way["one"], by_way["two"], strict=True)]
    quoted = options.pairs >= PAIRS
    middle = {name: statistics.median(times) for name, times in by_way.items()}
    ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print("| protocol | rows | one process, s | two, s | times faster | starting: one, two |")
    print("| --- | --: | --: | --: | --: | --: |")
    print(
        f"| {options.protocol} | {options.rows * len(options.tasks)} | {middle['one']:.1f} "
        f"| {middle['two']:.1f} "
        f"| {ratio if quoted else 'not quoted from so few pairs'} "
        f"| {middle['start_one']:.1f}, {middle['start_two']:.1f} |"
    )
    print(f"every row the same, answers: {', '.join(sorted(map(str, answers)))}", file=sys.stderr)
    keys = ("model", "tasks", "rows", "protocol", "pairs")
    write_results(options, keys, seconds=by_way, ratios=ratios if quoted else None)


if __name__ == "__main__":
    main()
