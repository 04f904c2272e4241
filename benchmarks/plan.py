"""Is `san-llm plan` right: its estimate beside the peak of the same recipe's `san-llm train`.

Each setting is a recipe of its own, trained for two steps by a process of its own, whose peak of
resident memory the run's ``metrics.json`` has. Rows are as long as the cutoff and begin unlike,
but for the prompt's template; the estimate knows their tokens as `san-llm plan --data` does.

``python benchmarks/plan.py --output benchmarks/results_plan.json`` prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measured import write_results

BASE = Path("models/smollm2-135m")
# LLaMA shapes with random weights and the tokenizer of SmolLM2.
SHAPES: dict[str, dict[str, int]] = {
    # 16 blocks like LLaMA-7B's in their proportions, without groups of query heads.
    "narrow": {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    # 6 blocks like LLaMA-3-8B's in their proportions.
    "wide": {
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
}
FP32, BF16 = "base.dtype=float32", "base.dtype=bfloat16"
BITS4, KEPT = "base.quantization=4bit", "training.gradient_checkpointing=true"
PADDED, LORA = "training.packing=false", "method.name=lora"
# Base, rows, tokens a row, and what differs from SAN in its lean form.
SETTINGS: list[tuple[str, int, int, tuple[str, ...]]] = [
    ("135m", 8, 128, (FP32,)),
    ("135m", 2, 512, (FP32,)),
    ("135m", 8, 256, (BF16,)),
    ("135m", 16, 128, (FP32, KEPT)),
    ("135m", 8, 128, (FP32, PADDED)),
    ("135m", 8, 128, (FP32, BITS4)),
    ("135m", 8, 128, (BF16, BITS4)),
    ("135m", 4, 128, (FP32, LORA)),
    ("135m", 8, 128, (BF16, LORA)),
    ("135m", 8, 128, (FP32, LORA, KEPT)),
    ("135m", 8, 128, (FP32, "method.mode=neuron")),
    ("135m", 8, 128, (FP32, "method.name=ia3")),
    ("135m", 8, 128, (FP32, "method.form=plain")),
    ("135m", 4, 128, (BF16, "method.carrier=lora")),
    ("135m", 4, 128, (FP32, "method.carrier=dora")),
    ("135m", 4, 128, (FP32, "method.name=dora")),
    ("narrow", 8, 256, (FP32,)),
    ("narrow", 4, 512, (BF16, PADDED)),
    ("wide", 8, 256, (FP32,)),
    ("wide", 16, 128, (BF16, KEPT)),
    ("wide", 8, 128, (FP32, LORA)),
]


def write_rows(path: Path, tokens: int) -> Path:
    """Write rows of more tokens than ``tokens``, so that the cutoff makes them equal."""
    dice = random.Random(0)
    words = ["river", "stone", "bread", "lamp", "garden", "window", "paper", "music", "train"]
    rows = [
        {
            "instruction": f"{dice.choice(words)} {number}",
            "input": "",
            "output": " ".join(dice.choice(words) for _ in range(tokens)),
        }
        for number in range(40)
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def base_of(name: str, folder: Path) -> Path:
    """Return the folder of a base; one with random weights is made when it is first asked for."""
    if name == "135m":
        return BASE.resolve()
    target = folder / name
    if not target.is_dir():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        how = json.loads((BASE / "config.json").read_text()) | SHAPES[name] | {"head_dim": 64}
        how["tie_word_embeddings"] = False
        LlamaForCausalLM(LlamaConfig(**how)).to(torch.bfloat16).save_pretrained(target)
        for file in BASE.glob("tokenizer*"):
            shutil.copy(file, target)
    return target


def measure(number: int, folder: Path) -> dict[str, Any]:
    """Train one setting's recipe and return its peak beside what was planned."""
    from san_llm.data.largest import look_at
    from san_llm.plan import make_plan
    from san_llm.recipe import given_keys, load_recipe

    name, rows, tokens, changes = SETTINGS[number]
    recipe_file = folder / "setting.yaml"
    recipe = {
        "base": {"model": str(base_of(name, folder))},
        "method": {"name": "san"},
        "data": {"loss": "all", "held_out": 0, "cutoff": tokens},
        "training": {"max_steps": 2, "learning_rate": 1e-3, "warmup_steps": 0},
    }
    recipe["data"]["train"] = str(write_rows(folder / "rows.json", tokens))
    recipe["training"] |= {"batch_size": rows, "micro_batch_size": rows}
    recipe_file.write_text(json.dumps(recipe), encoding="utf-8")
    chosen = load_recipe(recipe_file, changes)
    seen = look_at(chosen, rows)
    plan = make_plan(chosen, given_keys(recipe_file, changes), "cpu", seen=seen)
    planned = next(iter(plan.memory.values()))
    run = folder / "run"
    done = subprocess.run(
        [sys.executable, "-m", "san_llm", "train", recipe_file, *changes, "--output", run],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{SETTINGS[number]}: {done.stderr[-2000:]}")
    peak = json.loads((run / "metrics.json").read_text())["peak_memory"]
    shutil.rmtree(run)
    return {
        "setting": f"{name}, {rows} x {tokens}, {', '.join(changes)}",
        "planned": {**vars(planned), "total": planned.total},
        "peak": peak,
        "error": planned.total / peak - 1,
        # Of what the step takes, without what Python and the libraries do.
        "error_of_step": (planned.total - planned.runtime) / (peak - planned.runtime) - 1,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return what was found as Markdown."""
    lines = [
        "| setting | planned GB | peak GB | error | without the runtime |",
        "| --- | --: | --: | --: | --: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['setting']} | {row['planned']['total'] / 1e9:.2f} | {row['peak'] / 1e9:.2f} | "
            f"{100 * row['error']:+.1f} % | {100 * row['error_of_step']:+.1f} % |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=int, nargs="+", help="numbers of settings, from 0")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        os.environ["SAN_LLM_CACHE"] = folder + "/cache"
        for number in options.only or range(len(SETTINGS)):
            rows.append(measure(number, Path(folder)))
            print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(rows))
    write_results(options, (), rows=rows)


if __name__ == "__main__":
    main()
