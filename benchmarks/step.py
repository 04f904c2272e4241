"""What does one training step cost: time and peak memory of each method, side by side.

Every measurement is a process of its own; the methods take turns, round after round, so that a busy
neighbour slows all of them alike. All methods train on the same tokens with the same loss (all
positions learned, logits in chunks), attention (SDPA) and optimizer (AdamW). ``frozen`` is the
limit: the gradient goes back through the frozen base to its embeddings, and nothing is trained.

``python benchmarks/step.py --model models/smollm2-135m`` prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from measured import alone, peak_bytes, write_results

METHODS = (
    *("frozen", "san", "san-plain", "ia3", "lora", "lora-nodrop", "dora", "dora-nodrop"),
    *("san-lora", "san-lora-nodrop", "san-dora", "san-dora-nodrop"),
)


def adapted(model: Any, method: str) -> Any:
    from peft import IA3Config, LoraConfig, get_peft_model

    from san_llm import SanConfig

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    # Rank, alpha and dropout as published for LoRA and DoRA; -nodrop without it.
    low_rank = {"r": 32, "lora_alpha": 64, "lora_dropout": 0.0}
    published = {**low_rank, "lora_dropout": 0.05}
    config = {
        "san": lambda: SanConfig(),
        "san-plain": lambda: SanConfig(form="plain"),
        "san-lora": lambda: SanConfig(carrier="lora", **published),
        "san-lora-nodrop": lambda: SanConfig(carrier="lora", **low_rank),
        "san-dora": lambda: SanConfig(carrier="dora", **published),
        "san-dora-nodrop": lambda: SanConfig(carrier="dora", **low_rank),
        "ia3": lambda: IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        "lora": lambda: LoraConfig(target_modules=targets, **published),
        "lora-nodrop": lambda: LoraConfig(target_modules=targets, **low_rank),
        "dora": lambda: LoraConfig(target_modules=targets, use_dora=True, **published),
        "dora-nodrop": lambda: LoraConfig(target_modules=targets, use_dora=True, **low_rank),
    }
    return get_peft_model(model, config[method]())


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Run warm-up and timed steps in this process; return medians and the peak."""
    import torch
    from transformers import AutoModelForCausalLM

    from san_llm.models.quantize import quantization_config
    from san_llm.recipe.schema import Base
    from san_llm.san.model import keep_4bit_layout
    from san_llm.train.loss import token_losses

    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    base = Base(model=str(options.model), dtype=options.dtype, quantization="4bit")
    keywords = {"quantization_config": quantization_config(base)} if options.bits4 else {}
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, **keywords)
    keep_4bit_layout(model)
    model.requires_grad_(False)
    if options.method == "frozen":
        model.enable_input_require_grads()
    else:
        model = adapted(model, options.method)
    if options.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
    batch, length = map(int, options.shape.split("x"))
    ids = torch.randint(10, model.config.vocab_size, (batch, length))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    walls, cpus = [], []
    for _ in range(options.steps + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        (token_losses(model, inputs) / ids.numel()).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return {
        "wall": statistics.median(walls[1:]),
        "cpu": statistics.median(cpus[1:]),
        "peak": peak_bytes(),
        "trained": sum(p.numel() for p in trained),
    }


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every method in turn, ``rounds`` times; return a row a method."""
    by_method: dict[str, list[dict[str, float]]] = {method: [] for method in options.methods}
    for turn in range(options.rounds):
        for method in options.methods:
            command = [__file__, "--child", "--method", method]
            command += ["--model", options.model, "--dtype", options.dtype]
            command += ["--shape", options.shape, "--steps", str(options.steps)]
            command += ["--checkpointing"] * options.checkpointing + ["--bits4"] * options.bits4
            by_method[method].append(alone(command, method, options.threads))
            print(f"round {turn + 1}: {method} {by_method[method][-1]}", file=sys.stderr)
    rows = []
    for method, runs in by_method.items():
        walls = [run["wall"] for run in runs]
        rows.append(
            {
                "method": method,
                "seconds": statistics.median(walls),
                "seconds_spread": max(walls) - min(walls),
                "cpu_seconds": statistics.median(run["cpu"] for run in runs),
                "peak_gb": statistics.median(run["peak"] for run in runs) / 1e9,
                "trained": runs[0]["trained"],
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows as Markdown, with ratios to the frozen limit and to LoRA where measured."""
    by_name = {row["method"]: row for row in rows}
    lines = [
        "| method | trained | s a step (spread) | CPU s | peak GB | time / frozen | time / LoRA | "
        "peak / frozen | peak / LoRA |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for row in rows:
        cells = [
            row["method"],
            f"{row['trained']:,}",
            f"{row['seconds']:.2f} ({row['seconds_spread']:.2f})",
            f"{row['cpu_seconds']:.2f}",
            f"{row['peak_gb']:.2f}",
        ]
        for key in ("cpu_seconds", "peak_gb"):
            for name in ("frozen", "lora"):
                peer = by_name.get(name)
                cells.append(f"{row[key] / peer[key]:.2f}" if peer else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--shape", default="8x128", help="rows x tokens")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--bits4", action="store_true", help="base in nf4")
    parser.add_argument("--steps", type=int, default=3, help="timed steps a process, after one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options)))
        return
    rows = compare(options)
    print(table(rows))
    keys = ("dtype", "shape", "checkpointing", "bits4", "steps", "rounds", "threads")
    write_results(options, keys, rows=rows)


if __name__ == "__main__":
    main()
