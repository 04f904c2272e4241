"""What does one training step cost: time and peak memory of each method, side by side.

Every measurement is a process of its own; the methods take turns, round after round, so that a busy
neighbour slows all of them alike. All methods train on the same tokens with the same loss (all
positions learned, logits in chunks), attention (SDPA) and optimizer (AdamW). ``frozen`` is the
limit: the gradient goes back through the frozen base to its embeddings, and nothing is trained.
``-autocast`` is PEFT's method as TRL trains it: low-rank products in bf16, of weights in fp32. All
other rows may use TF32 where the base has 16 bits, as ``san-llm train`` does.

``python benchmarks/step.py --model models/smollm2-135m`` prints a table and writes JSON. With
``--random`` the model is a known base's shape (``san_llm.plan.bases``) with random weights, made on
the device.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from measured import alone, peak_bytes, write_results

METHODS = (
    *("frozen", "san", "san-plain", "ia3", "lora", "lora-nodrop", "dora", "dora-nodrop"),
    *("san-lora", "san-lora-nodrop", "san-dora", "san-dora-nodrop"),
    *("lora-autocast", "dora-autocast"),
)


def adapted(model: Any, method: str) -> Any:
    from peft import IA3Config, LoraConfig, get_peft_model

    from san_llm import SanConfig
    from san_llm.models.quantize import keep_dtype

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
    model = get_peft_model(model, config[method.removesuffix("-autocast")]())
    keep_dtype(model)
    return model


def loaded(options: argparse.Namespace, dtype: Any) -> Any:
    """Return a base as it is stored, on the device."""
    from transformers import AutoModelForCausalLM

    from san_llm.models.quantize import quantization_config
    from san_llm.recipe.schema import Base

    base = Base(model=str(options.model), dtype=options.dtype, quantization="4bit")
    keywords: dict[str, Any] = {}
    if options.bits4:
        keywords["quantization_config"] = quantization_config(base)
    if options.device != "cpu":
        keywords["device_map"] = {"": options.device}
    return AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, **keywords)


def random_model(options: argparse.Namespace, dtype: Any) -> Any:
    """Return a model of a known base's shape with random weights, made on the device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from san_llm.plan.bases import KNOWN

    sizes = {**KNOWN[options.random], "max_position_embeddings": 8192}
    if options.blocks is not None:
        sizes["num_hidden_layers"] = options.blocks
    sizes.pop("model_type")
    if options.narrow != 1:
        for name in ("vocab_size", "hidden_size", "intermediate_size"):
            sizes[name] //= options.narrow
        sizes["num_attention_heads"] //= options.narrow
        sizes["num_key_value_heads"] = max(1, sizes["num_key_value_heads"] // options.narrow)
    config = LlamaConfig(**sizes)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    for name, linear in list(model.named_modules()):
        if options.bits4 and isinstance(linear, torch.nn.Linear) and "lm_head" not in name:
            model.set_submodule(name, four_bits(linear, dtype, options.device))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            whole = torch.empty(parameter.shape, dtype=dtype, device=options.device)
            whole = whole.fill_(1.0) if "norm" in name else whole.normal_(std=0.02)
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, torch.nn.Parameter(whole))
    # Not a weight, so it has to be worked out anew: the rotation's frequencies.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(options.device)
    model.is_loaded_in_4bit = options.bits4
    return model


def four_bits(linear: Any, dtype: Any, device: str) -> Any:
    """Return a random NF4 Linear of a Linear's shape, as a 4-bit base has it."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    with torch.device("meta"):
        made = Linear4bit(
            *(linear.in_features, linear.out_features), bias=False, compute_dtype=dtype
        )
    # Made in the device's memory, but quantized on the way there, as bitsandbytes wants it.
    values = torch.empty(linear.weight.shape, dtype=dtype, device=device).normal_(std=0.02).cpu()
    made.weight = Params4bit(
        *(values, False), compress_statistics=True, quant_type="nf4", module=made
    ).to(device)
    return made


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Run warm-up and timed steps in this process; return medians and the peak."""
    import torch

    from san_llm.san.model import keep_4bit_layout
    from san_llm.train.loss import token_losses
    from san_llm.train.run import short_factors

    torch.manual_seed(0)
    dtype, on_gpu = getattr(torch, options.dtype), options.device != "cpu"
    model: Any = (random_model if options.random else loaded)(options, dtype)
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
    ids = torch.randint(10, model.config.vocab_size, (batch, length)).to(options.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    cast = torch.autocast(torch.device(options.device).type, dtype=torch.bfloat16)
    walls, cpus, warm_up = [], [], 3 if on_gpu else 1
    for _ in range(options.steps + warm_up):
        wall, cpu = time.perf_counter(), time.process_time()
        with short_factors(options.dtype):
            with cast if options.method.endswith("-autocast") else nullcontext():
                loss = token_losses(model, inputs) / ids.numel()
            loss.backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    if not math.isfinite(loss.item()):
        sys.exit(f"{options.method}: the loss is {loss.item()}")
    return {
        "wall": statistics.median(walls[warm_up:]),
        "cpu": statistics.median(cpus[warm_up:]),
        "peak": torch.cuda.max_memory_allocated() if on_gpu else peak_bytes(),
        "trained": sum(p.numel() for p in trained),
    }


def child(options: argparse.Namespace, method: str) -> list[str]:
    """Return the command that measures one method as the options say."""
    command = [__file__, "--child", "--method", method, "--model", options.model]
    command += ["--dtype", options.dtype, "--shape", options.shape, "--steps", str(options.steps)]
    command += ["--device", options.device, "--narrow", str(options.narrow)]
    if options.random:
        command += ["--random", options.random]
    if options.blocks is not None:
        command += ["--blocks", str(options.blocks)]
    return command + ["--checkpointing"] * options.checkpointing + ["--bits4"] * options.bits4


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every method in turn, ``rounds`` times; return a row a method."""
    by_method: dict[str, list[dict[str, float]]] = {method: [] for method in options.methods}
    for turn in range(options.rounds):
        for method in options.methods:
            found = alone(child(options, method), method, options.threads)
            by_method[method].append(found)
            print(f"round {turn + 1}: {method} {by_method[method][-1]}", file=sys.stderr)
    return [row_of(method, runs) for method, runs in by_method.items()]


def row_of(method: str, runs: list[dict[str, float]]) -> dict[str, Any]:
    """Return what all rounds of a method came to."""
    walls = [run["wall"] for run in runs]
    return {
        "method": method,
        "seconds": statistics.median(walls),
        "seconds_spread": max(walls) - min(walls),
        "cpu_seconds": statistics.median(run["cpu"] for run in runs),
        "peak_gb": statistics.median(run["peak"] for run in runs) / 1e9,
        "trained": runs[0]["trained"],
    }


def table(rows: list[dict[str, Any]], clock: str = "cpu_seconds") -> str:
    """Return rows as Markdown, with ratios to the frozen limit and to LoRA where measured.

    Args:
        rows: Of :func:`row_of`.
        clock: What ratios of time are of: ``cpu_seconds``, or ``seconds`` where a GPU works.
    """
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
            f"{row['seconds']:.3g} ({row['seconds_spread']:.2g})",
            f"{row['cpu_seconds']:.2f}",
            f"{row['peak_gb']:.2f}",
        ]
        for key in (clock, "peak_gb"):
            for name in ("frozen", "lora"):
                peer = by_name.get(name)
                cells.append(f"{row[key] / peer[key]:.2f}" if peer else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """Return the options of words, or of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--shape", default="8x128", help="rows x tokens")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--bits4", action="store_true", help="base in nf4")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda:0")
    parser.add_argument("--random", help="a base's shape, such as meta-llama/Meta-Llama-3-8B")
    parser.add_argument("--blocks", type=int, help="of a random model; default: all")
    parser.add_argument("--narrow", type=int, default=1, help="divides a random model's sizes")
    parser.add_argument("--steps", type=int, default=3, help="timed steps a process, after one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main() -> None:
    options = parsed()
    if options.child:
        print(json.dumps(measure(options)))
        return
    rows = compare(options)
    print(table(rows, "cpu_seconds" if options.device == "cpu" else "seconds"))
    keys = ("dtype", "shape", "checkpointing", "bits4", "steps", "rounds", "threads", "device")
    write_results(options, keys, rows=rows)


if __name__ == "__main__":
    main()
