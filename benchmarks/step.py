"""What does one training step cost: time and peak memory of each method, side by side.

Every measurement is a process of its own; the methods take turns, round after round, so that a busy
neighbour slows all of them alike. All methods train on the same tokens with the same loss (all
positions learned, logits in chunks), attention (SDPA) and optimizer (AdamW). ``frozen`` is the
limit: the gradient goes back through the frozen base to its embeddings, and nothing is trained.
``-autocast`` is PEFT's method as TRL trains it: low-rank products in bf16, of weights in fp32. All
other rows may use TF32 where the base has 16 bits, as ``san-llm train`` does.

``python benchmarks/step.py --model models/smollm2-135m`` prints a table and writes JSON. With
``--random`` the model is a known base's shape (``san_llm.plan.bases``) with random weights, made on
the device. ``--measured`` takes one of ``MEASURED``, which no table of families knows; of one that
reads pictures ``--shape`` is rows x pixels on a side, and the loss is that of ten classes.
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

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS = (
    *("frozen", "san", "san-plain", "ia3", "lora", "lora-nodrop", "dora", "dora-nodrop"),
    *("san-lora", "san-lora-nodrop", "san-dora", "san-dora-nodrop"),
    *("lora-autocast", "dora-autocast"),
)


# Random models of no family with an entry: their class, their sizes, LoRA's targets.
MEASURED: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "dinov2-s": (
        "AutoModelForImageClassification",
        {
            "model_type": "dinov2",
            "hidden_size": 384,
            "num_hidden_layers": 12,
            "num_attention_heads": 6,
            "image_size": 518,
            "patch_size": 14,
            "num_labels": 10,
        },
        ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
    ),
    "moe": (  # a sixteenth of a Qwen3-30B-A3B's experts, and half of its width
        "AutoModelForCausalLM",
        {
            "model_type": "qwen3_moe",
            "vocab_size": 32_000,
            "hidden_size": 1024,
            "moe_intermediate_size": 384,
            "num_hidden_layers": 8,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        },
        ["q_proj", "k_proj", "v_proj", "o_proj"],  # PEFT has whole matrices for experts
    ),
}


def adapted(model: Any, method: str, targets: list[str]) -> Any:
    from peft import IA3Config, LoraConfig, get_peft_model

    from san_llm import SanConfig
    from san_llm.models.quantize import keep_dtype

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


def measured_model(options: argparse.Namespace, dtype: Any) -> Any:
    """Return a random model of ``MEASURED``."""
    import transformers

    from san_llm.measure.behaviour import look_at
    from san_llm.measure.run import measure

    made, sizes, _ = MEASURED[options.measured]
    if options.blocks is not None:
        sizes = sizes | {"num_hidden_layers": options.blocks}
    config = transformers.AutoConfig.for_model(**sizes)
    model = getattr(transformers, made).from_config(config, dtype=dtype).to(options.device)
    if options.method is None:  # before the processes: its graph is no part of a step
        measure(model.config, type(model))
    if made == "AutoModelForCausalLM":
        look_at(model, options.measured)
    return model


def inputs_of(model: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Return a batch of random tokens, or pictures, with what is learned of each."""
    import torch

    batch, length = map(int, options.shape.split("x"))
    if model.main_input_name == "pixel_values":
        pixels = torch.randn(batch, 3, length, length, dtype=model.dtype)
        named = {"pixel_values": pixels, "labels": torch.arange(batch) % 10}
    else:
        ids = torch.randint(10, model.config.vocab_size, (batch, length))
        named = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return {name: tensor.to(options.device) for name, tensor in named.items()}


def mean_loss(model: Any, inputs: dict[str, Any]) -> Any:
    """Return the loss that is trained on, a number for each learned token or picture."""
    from san_llm.train.loss import token_losses

    if "pixel_values" in inputs:
        return model(**inputs).loss
    return token_losses(model, inputs) / inputs["labels"].numel()


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
    from san_llm.train.run import short_factors

    torch.manual_seed(0)
    dtype, on_gpu = getattr(torch, options.dtype), options.device != "cpu"
    make = measured_model if options.measured else random_model if options.random else loaded
    targets = MEASURED[options.measured][2] if options.measured else TARGETS
    model: Any = make(options, dtype)
    keep_4bit_layout(model)
    model.requires_grad_(False)
    if options.method == "frozen":
        model.enable_input_require_grads()
    else:
        model = adapted(model, options.method, targets)
    if options.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
    inputs = inputs_of(model, options)
    cast = torch.autocast(torch.device(options.device).type, dtype=torch.bfloat16)
    walls, cpus, warm_up = [], [], 3 if on_gpu else 1
    for _ in range(options.steps + warm_up):
        wall, cpu = time.perf_counter(), time.process_time()
        with short_factors(options.dtype):
            with cast if options.method.endswith("-autocast") else nullcontext():
                loss = mean_loss(model, inputs)
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
    if options.measured:
        command += ["--measured", options.measured]
    if options.blocks is not None:
        command += ["--blocks", str(options.blocks)]
    return command + ["--checkpointing"] * options.checkpointing + ["--bits4"] * options.bits4


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every method in turn, ``rounds`` times; return a row a method."""
    if options.measured:
        import torch

        measured_model(options, getattr(torch, options.dtype))
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
    parser.add_argument("--measured", choices=MEASURED, help="a random model of no known family")
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
