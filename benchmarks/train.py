"""End to end: rows a second of ``san-llm train`` beside TRL's SFTTrainer with LoRA r32.

Both train on the same rows of the pocket set, once, in the same batches' size, with the loss on the
responses and the same dtype; LoRA has no dropout, SAN has none to have. TRL is written as its users
write it: a prompt-completion data set and a LoraConfig on all seven projections; its gradient
checkpointing, on by default, is off, which is faster. Time runs from loading the model to the end
of training, tokenizing included; ours saves its run, too. Each run is a process of its own; they
take turns.

``python benchmarks/train.py --model models/smollm2-135m``
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measured import alone, peak_bytes, write_results

METHODS = ("trl-lora", "san-llm-lora", "san-llm-san")


def chosen_rows(count: int) -> list[dict[str, str]]:
    """Return rows from all over the pocket set."""
    from san_llm.data.sources import POCKET

    rows = json.loads((POCKET / "train.json").read_text())
    return rows[:: len(rows) // count][:count]


def trl(options: argparse.Namespace, rows: list[dict[str, str]], folder: Path) -> float:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from san_llm.protocol.prompts import training_prompt

    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = Dataset.from_list(
        [
            {
                "prompt": training_prompt("alpaca", row["instruction"], row["input"]),
                "completion": row["output"],
            }
            for row in rows
        ]
    )
    config = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=options.batch,
        num_train_epochs=1,
        learning_rate=2e-4,
        bf16=False,  # the model's own dtype, no autocast
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_length=256,
    )
    lora = LoraConfig(
        r=32,
        lora_alpha=64,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        target_modules=[f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")],
    )
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora
    )
    trainer.train()
    return time.perf_counter() - began


def ours(
    options: argparse.Namespace, rows: list[dict[str, str]], folder: Path, method: dict[str, Any]
) -> float:
    from san_llm.recipe.read import parse_recipe
    from san_llm.runs.folder import new_run
    from san_llm.train.run import train

    (folder / "rows.json").write_text(json.dumps(rows))
    os.environ["SAN_LLM_CACHE"] = str(folder / "cache")
    recipe = parse_recipe(
        json.dumps(
            {
                "name": "bench",
                "base": {"model": str(Path(options.model).resolve()), "dtype": options.dtype},
                "method": method,
                "data": {
                    "train": str(folder / "rows.json"),
                    "held_out": 0,
                    "prompt": "alpaca",
                    "loss": "response",
                },
                "training": {
                    "epochs": 1,
                    "batch_size": options.batch,
                    "micro_batch_size": options.batch,
                    "learning_rate": 2e-4,
                    "warmup_steps": 0,
                    "evaluate_every": 10_000,
                },
            }
        ),
        "bench.yaml",
    )
    run = new_run(recipe, folder / "run", overwrite=False)
    began = time.perf_counter()
    train(recipe, run)
    return time.perf_counter() - began


def measure(options: argparse.Namespace) -> dict[str, float]:
    rows = chosen_rows(options.rows)
    lora = {"name": "lora", "rank": 32, "alpha": 64.0, "dropout": 0.0}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.method == "trl-lora":
            seconds = trl(options, rows, folder)
        else:
            method = lora if options.method == "san-llm-lora" else {"name": "san"}
            seconds = ours(options, rows, folder, method)
    return {"seconds": seconds, "peak": peak_bytes()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options)))
        return
    by_method: dict[str, list[dict[str, float]]] = {method: [] for method in options.methods}
    for _ in range(options.rounds):
        for method in options.methods:
            command = [__file__, "--child", "--method", method]
            for key in ("model", "dtype", "rows", "batch"):
                command += [f"--{key}", str(getattr(options, key))]
            by_method[method].append(alone(command, method, options.threads))
            print(f"{method} {by_method[method][-1]}", file=sys.stderr)
    rows = []
    for method, runs in by_method.items():
        seconds = [run["seconds"] for run in runs]
        rows.append(
            {
                "method": method,
                "seconds": statistics.median(seconds),
                "spread": max(seconds) - min(seconds),
                "rows_per_second": options.rows / statistics.median(seconds),
                "peak_gb": statistics.median(run["peak"] for run in runs) / 1e9,
            }
        )
    first = rows[0]
    print("| method | s (spread) | rows/s | times faster | peak GB | peak ratio |")
    print("| --- | --: | --: | --: | --: | --: |")
    for row in rows:
        print(
            f"| {row['method']} | {row['seconds']:.1f} ({row['spread']:.1f}) "
            f"| {row['rows_per_second']:.2f} | {first['seconds'] / row['seconds']:.2f} "
            f"| {row['peak_gb']:.2f} | {row['peak_gb'] / first['peak_gb']:.2f} |"
        )
    write_results(options, ("dtype", "rows", "batch", "threads"), results=rows)


if __name__ == "__main__":
    main()
