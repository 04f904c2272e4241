"""Whether a long run grows: memory, file handles and threads over 2,000 steps, and 2,000 answers.

    python benchmarks/soak.py --output benchmarks/results_soak.json --picture docs/pictures/soak.png

Two real commands on a tiny model, each in a process of its own that looks at itself every 20 steps
(`san-llm train`, with a checkpoint, a held-out evaluation and a sample of the model's as often) or
rows (`san-llm eval`). The first quarter is warm-up. After it a process is flat if the line through
its own memory (RssAnon), and that through all that is resident (RSS, with libraries' files), rises
by less than 5 MB in 2,000 steps, and if handles and threads stay what they were at the warm-up's
end. USS and PSS would not do: they rise when a neighbour with the same libraries ends.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
from measured import alone, write_results

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
EVERY, MOST = 20, 5.0  # steps or rows between two looks; MB
KINDS = ("own MB", "resident MB", "handles", "threads")
Samples = list[list[float]]  # of the count of steps or rows, and of each kind


def looked_at(samples: Samples, count: int) -> None:
    """Add what this process holds now, if enough has been done since the last look."""
    if count < (samples[-1][0] if samples else 0) + EVERY:
        return
    process, status = psutil.Process(), Path("/proc/self/status").read_text()
    kilobytes = [int(status.split(f"{name}:")[1].split()[0]) for name in ("RssAnon", "VmRSS")]
    sizes = [round(size * 1024 / 1e6, 3) for size in kilobytes]
    samples.append([count, *sizes, process.num_fds(), process.num_threads()])


def train(steps: int, samples: Samples) -> list[str]:
    """Prepare a training; return the command."""
    from tiny import rows, save_tiny, write_recipe, write_rows

    from san_llm.train.callbacks import Checkpoints

    often = {"evaluate_every": EVERY, "sample_prompts": ["Is 7 even?"], "sample_tokens": 8}
    write_recipe(
        Path("r.yaml"),
        save_tiny(Path("tiny")),
        write_rows(Path("rows.json"), rows(300)),
        data={"held_out": 20},
        training={"max_steps": steps, "epochs": 1000.0, "learning_rate": 1e-3, **often},
    )
    plain = Checkpoints.on_step_begin

    def begin(self: Checkpoints, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        looked_at(samples, state.global_step)
        plain(self, args, state, control, **keywords)

    Checkpoints.on_step_begin = begin  # type: ignore[method-assign]
    return ["train", "r.yaml", "--output", "run"]


def evaluate(count: int, samples: Samples) -> list[str]:
    """Prepare an evaluation; return the command."""
    from tiny import rows, save_tiny, write_rows

    from san_llm.evaluate.store import Part

    save_tiny(Path("tiny"))
    write_rows(Path("data/boolq/test.json"), rows(count))
    plain, answered = Part.append, 0

    def append(self: Part, rows: Any) -> None:
        nonlocal answered
        plain(self, rows)
        answered += len(rows)
        looked_at(samples, answered)

    Part.append = append  # type: ignore[method-assign]
    return ["eval", "--model", "tiny", "--tasks", "boolq", "--data", "data", "--output", "out"]


PARTS: dict[str, Callable[[int, Samples], list[str]]] = {"train": train, "eval": evaluate}


def inside(part: str, count: int) -> None:
    """Run a command in this process and print its samples."""
    from san_llm.cli import main

    samples: Samples = []
    with TemporaryDirectory(prefix="san-llm-soak-") as folder:
        os.chdir(folder)
        os.environ["SAN_LLM_CACHE"] = f"{folder}/cache"
        sys.argv = ["san-llm", *PARTS[part](count, samples)]
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise
        os.chdir(ROOT)
    print(json.dumps({"samples": samples}))


def judged(samples: Samples, count: int) -> dict[str, Any]:
    """Return what the samples come to, by the rule above."""
    after = np.array([sample for sample in samples if sample[0] > count / 4])
    result: dict[str, Any] = {"looks": len(after)}
    for number, kind in enumerate(KINDS, start=1):
        values = after[:, number]
        result[kind] = {"first": values[0], "last": values[-1], "most": values.max()}
        if kind.endswith("MB"):
            rise = np.polyfit(after[:, 0], values, 1)[0] * count
            result[kind] |= {"rise": round(rise, 3), "flat": bool(rise < MOST)}
        else:
            result[kind]["flat"] = bool((values == values[0]).all())
    return result


def draw(results: dict[str, Any], count: int, file: Path) -> None:
    """Draw the samples of both parts."""
    from san_llm.look.figures import as_png, new_figure, styled

    with styled():
        figure = new_figure(
            9, 5.5, f"{count:,} steps, and {count:,} answers: what the process holds"
        )
        panels = figure.subplots(2, 2, sharex=True)
        for column, (part, named) in enumerate((("train", "steps"), ("eval", "rows"))):
            samples = np.array(results[part]["samples"])
            memory, counts = panels[:, column]
            for number, kind in enumerate(KINDS, start=1):
                panel = memory if kind.endswith("MB") else counts
                panel.plot(samples[:, 0], samples[:, number], label=kind.removesuffix(" MB"))
            for panel in (memory, counts):
                panel.axvspan(0, count / 4, alpha=0.08, color="black", lw=0)
                panel.set_ylim(0, None)
                panel.legend(loc="center right")
            memory.set_title(f"san-llm {part}")
            memory.set_ylabel("MB")
            counts.set_xlabel(named)
        file.write_bytes(as_png(figure))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="steps, and rows")
    parser.add_argument("--part", choices=PARTS, help="only this, and print its samples")
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    parser.add_argument("--picture", type=Path, help="a PNG file for the drawing")
    options = parser.parse_args()
    if options.part:
        inside(options.part, options.count)
        return
    results: dict[str, Any] = {}
    for part in PARTS:
        command = [__file__, "--part", part, "--count", str(options.count)]
        samples: Any = alone(command, part, threads=1)["samples"]
        results[part] = {**judged(samples, options.count), "samples": samples}
        shown = {key: value for key, value in results[part].items() if key != "samples"}
        print(part, json.dumps(shown, indent=2))
    write_results(options, ("count",), columns=["count", *KINDS], **results)
    if options.picture:
        draw(results, options.count, options.picture)


if __name__ == "__main__":
    main()
