"""What do packed rows cost beside padded ones: CPU time and peak memory of a step, both ways.

Every measurement is a process of its own; the ways take turns, round after round. SAN in its lean
form learns all tokens that rows do not share; a step is a forward and a backward pass. A shape is
``rows x tokens``, and ``rows x tokens/shared`` where all rows begin with the same tokens.

``python benchmarks/long.py --output benchmarks/results_long_135m.json`` prints a table.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from measured import alone, peak_bytes, write_results

SHAPES = ("1x2048", "1x4096", "2x2048/512", "4x512", "8x104/44")
WAYS = ("padded", "packed")


def rows_of(shape: str, vocabulary: int) -> list[dict[str, list[int]]]:
    """Return rows of random tokens, learned behind what they share."""
    dice = random.Random(0)
    sizes, _, shared = shape.partition("/")
    count, length = map(int, sizes.split("x"))
    begin = [dice.randrange(10, vocabulary) for _ in range(int(shared or 0))]
    rows = []
    for _ in range(count):
        own = [dice.randrange(10, vocabulary) for _ in range(length - len(begin))]
        rows.append({"input_ids": begin + own, "labels": [-100] * len(begin) + own})
    return rows


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Run a first and some timed steps in this process; return their median and the peak."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from san_llm import SanConfig
    from san_llm.data.batches import Pack, Pad
    from san_llm.train.loss import token_losses
    from san_llm.train.packed_attention import use_packed_attention

    dtype = getattr(torch, options.dtype)
    base: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    model = get_peft_model(base.requires_grad_(False), SanConfig()).train()
    packed = options.way == "packed"
    if packed:
        use_packed_attention(base)
    rows = rows_of(options.shape, base.config.vocab_size)
    batch = Pack(share=True)(rows) if packed else Pad(pad_id=0)(rows)
    seconds = []
    for _ in range(options.steps + 1):
        before = time.process_time()
        loss = token_losses(model, batch)
        loss.backward()
        seconds.append(time.process_time() - before)
        model.zero_grad()
    return {"cpu": statistics.median(seconds[1:]), "peak": peak_bytes(), "loss": loss.item()}


def compare(options: argparse.Namespace, shape: str) -> dict[str, Any]:
    """Measure a shape both ways in turns; return what was found, round by round."""
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for turn in range(options.rounds):
        for way in WAYS:
            command = [__file__, "--child", "--way", way, "--shape", shape]
            command += ["--model", options.model, "--dtype", options.dtype]
            runs[way].append(alone([*command, "--steps", str(options.steps)], way, threads=1))
            print(f"{shape}, round {turn + 1}: {way} {runs[way][-1]}", file=sys.stderr)
    return {"shape": shape, **runs}


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows as Markdown; ratios are medians over rounds, packed to padded."""
    lines = [
        "| rows x tokens / shared | padded, CPU s | packed, CPU s | ratio | padded, peak GB | "
        "packed, peak GB | ratio |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    for row in rows:
        cells = [row["shape"].replace("x", " x ").replace("/", " / ")]
        for key, unit, digits in (("cpu", 1, 1), ("peak", 1e9, 2)):
            padded, packed = ([run[key] / unit for run in row[way]] for way in WAYS)
            cells += [f"{statistics.median(way):.{digits}f}" for way in (padded, packed)]
            ratios = [b / a for a, b in zip(padded, packed, strict=True)]
            cells.append(f"{statistics.median(ratios):.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--steps", type=int, default=1, help="timed steps a process, after one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options)))
        return
    rows = [compare(options, shape) for shape in options.shapes]
    print(table(rows))
    write_results(options, ("dtype", "steps", "rounds"), rows=rows)


if __name__ == "__main__":
    main()
