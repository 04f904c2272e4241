"""Is `san-llm plan` right: its estimate beside the peak of the same recipe's `san-llm train`.

Each setting is a recipe of its own, trained for two steps by a process of its own, whose peak of
resident memory the run's ``metrics.json`` has. Rows are as long as the cutoff and begin unlike, but
for the prompt's template; the estimate knows their tokens as `san-llm plan --data` does. What is
kept is measured; the table works the estimates out anew, so that it shows today's.

``python benchmarks/plan.py --output benchmarks/results_plan_peaks.json`` measures what is not yet
in there and prints the table of all; ``--only 3 7`` measures these anew.
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
from typing import Any, NamedTuple

from measured import write_results

from san_llm.architectures.sizes import shape_of
from san_llm.plan.memory import Batch, Memory, Setting, memory
from san_llm.recipe.read import load_recipe, parse_recipe

BASE = Path("models/smollm2-135m")
# LLaMA shapes with random weights and the tokenizer of SmolLM2.
SHAPES: dict[str, dict[str, int]] = {
    # 12 blocks like LLaMA-7B's in their proportions, without groups of query heads.
    "narrow": {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 12,
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
BITS4, AGAIN = "base.quantization=4bit", "training.gradient_checkpointing=true"
PADDED, LORA = "training.packing=false", "method.name=lora"


class Case(NamedTuple):
    """One training: a base, rows of equal length, and what differs from SAN in its lean form.

    Attributes:
        base: ``135m``, or a key of ``SHAPES``.
        rows: In a batch.
        tokens: A row.
        changes: ``key=value`` of the recipe.
        held_out: Not looked at when the estimate was written.
    """

    base: str
    rows: int
    tokens: int
    changes: tuple[str, ...]
    held_out: bool = False

    def __str__(self) -> str:
        """Return it in one cell of a table."""
        short = [change.split(".", 1)[1] for change in self.changes]
        return f"{self.base}, {self.rows} x {self.tokens}, {', '.join(short)}"


CASES = (
    Case("135m", 24, 128, (FP32,)),
    Case("135m", 3, 512, (FP32,), held_out=True),
    Case("135m", 12, 256, (BF16,)),
    Case("135m", 24, 256, (FP32, AGAIN)),
    Case("135m", 8, 192, (FP32, PADDED)),
    Case("135m", 8, 128, (FP32, BITS4)),
    Case("135m", 8, 256, (BF16, BITS4), held_out=True),
    Case("135m", 8, 128, (FP32, LORA)),
    Case("135m", 10, 128, (BF16, LORA), held_out=True),
    Case("135m", 12, 128, (FP32, LORA, AGAIN)),
    Case("135m", 8, 192, (FP32, "method.mode=neuron"), held_out=True),
    Case("135m", 8, 192, (FP32, "method.name=ia3", "method.target_modules=peft")),
    Case("135m", 8, 128, (FP32, "method.form=plain")),
    Case("135m", 8, 128, (BF16, "method.carrier=lora"), held_out=True),
    Case("135m", 8, 128, (FP32, "method.carrier=dora")),
    Case("135m", 8, 128, (FP32, "method.name=dora")),
    Case("narrow", 16, 256, (FP32,)),
    Case("narrow", 10, 512, (BF16, PADDED), held_out=True),
    Case("wide", 12, 256, (FP32,)),
    Case("wide", 16, 256, (BF16, AGAIN), held_out=True),
    Case("wide", 16, 256, (FP32, LORA)),
)


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
        for number in range(48)
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def base_of(name: str, folder: Path) -> Path:
    """Return the folder of a base; one with random weights is made."""
    if name == "135m":
        return BASE.resolve()
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    target = folder / name
    torch.manual_seed(0)
    config = json.loads((BASE / "config.json").read_text()) | SHAPES[name] | {"head_dim": 64}
    config["tie_word_embeddings"] = False
    LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16).save_pretrained(target)
    for file in BASE.glob("tokenizer*"):
        shutil.copy(file, target)
    return target


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """Train one case's recipe; return its peak, and what the estimate has to know of it."""
    from san_llm.plan.largest import look_at

    base = base_of(case.base, folder)
    recipe = {
        "base": {"model": str(base)},
        "method": {"name": "san"},
        "data": {"loss": "all", "held_out": 0, "cutoff": case.tokens},
        "training": {"max_steps": 2, "learning_rate": 1e-3, "warmup_steps": 0},
    }
    recipe["data"]["train"] = str(write_rows(folder / "rows.json", case.tokens))
    recipe["training"] |= {"batch_size": case.rows, "micro_batch_size": case.rows}
    file, run = folder / "case.yaml", folder / "run"
    file.write_text(json.dumps(recipe), encoding="utf-8")
    chosen = load_recipe(file, case.changes)
    seen = look_at(chosen, case.rows)
    done = subprocess.run(
        [sys.executable, "-m", "san_llm", "train", file, *case.changes, "--output", run],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{case}: {done.stderr[-2000:]}")
    return {
        "held_out": case.held_out,
        "config": json.loads((base / "config.json").read_text()),
        "recipe": recipe | {"base": {"model": case.base}, "data": recipe["data"] | {"train": "-"}},
        "changes": case.changes,
        "batch": vars(seen.batch_for(chosen.method)),
        "peak": json.loads((run / "metrics.json").read_text())["peak_memory"],
    }


def planned(case: dict[str, Any]) -> Memory:
    """Return the estimate of what was measured."""
    recipe = parse_recipe(json.dumps(case["recipe"]), "case.yaml", case["changes"])
    return memory(
        Setting(
            shape=shape_of(case["config"]),
            dtype=recipe.base.dtype,
            bits=recipe.base.quantization,
            double_quant=bool(recipe.base.double_quant),
            method=recipe.method,
            batch=Batch(**case["batch"]),
            checkpointing=recipe.training.gradient_checkpointing,
            device="cpu",
        )
    )


def table(cases: dict[str, dict[str, Any]]) -> str:
    """Return what was found as Markdown."""
    lines = [
        "| setting | | planned GB | peak GB | error | without the runtime |",
        "| --- | --- | --: | --: | --: | --: |",
    ]
    for name, case in cases.items():
        plan, peak = planned(case), case["peak"]
        # Of what the step takes, without what Python and the libraries do.
        step = (plan.total - plan.runtime) / (peak - plan.runtime) - 1
        lines.append(
            f"| {name} | {'held out' if case['held_out'] else ''} | {plan.total / 1e9:.2f} | "
            f"{peak / 1e9:.2f} | {100 * (plan.total / peak - 1):+.1f} % | {100 * step:+.1f} % |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=int, nargs="+", help="measure these anew; from 0")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to go on with")
    options = parser.parse_args()
    cases = json.loads(options.output.read_text())["cases"] if options.output.exists() else {}
    wanted = [CASES[number] for number in options.only or ()]
    for case in wanted or [case for case in CASES if str(case) not in cases]:
        with tempfile.TemporaryDirectory(prefix="plan-") as folder:
            os.environ["SAN_LLM_CACHE"] = folder + "/cache"
            cases[str(case)] = measure(case, Path(folder))
        cases = {str(case): cases[str(case)] for case in CASES if str(case) in cases}
        write_results(options, (), cases=cases)
    print(table(cases))


if __name__ == "__main__":
    main()
