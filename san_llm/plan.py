"""What a recipe will train, in how many steps and how much memory: told before anything is loaded.

Config files and rows are read, no weights, and torch is not imported unless the rows are to be
tokenized.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any, get_args

import yaml

from san_llm.data.rows import stream_rows, training_files
from san_llm.download import PINNED, model_folder
from san_llm.engine import check_engine
from san_llm.errors import InputError, check_one_of
from san_llm.estimate import (
    WIDE,
    Batch,
    Device,
    Memory,
    Setting,
    full_batch,
    graph_of,
    memory,
    shape_of,
    traffic,
    trained_numbers,
)
from san_llm.locate import locate, stored_bits
from san_llm.recipe import (
    Base,
    LoraMethod,
    Method,
    Recipe,
    SanMethod,
    check_held_out,
    leaves,
    micro_batch,
)
from san_llm.record import read_json
from san_llm.san.graph import PropagationGraph, check_family, check_sizes
from san_llm.size import parse_size

DEVICES: tuple[Device, ...] = get_args(Device)
_7B = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "tie_word_embeddings": False,
}
_13B = _7B | {"hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 40}
_13B |= {"num_attention_heads": 40, "num_key_value_heads": 40}
_8B = _7B | {"vocab_size": 128_256, "intermediate_size": 14_336, "num_key_value_heads": 8}
_70B = _8B | {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80}
_70B |= {"num_attention_heads": 64}
_405B = _70B | {"hidden_size": 16_384, "intermediate_size": 53_248, "num_hidden_layers": 126}
_405B |= {"num_attention_heads": 128}
_135M = _7B | {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536}
_135M |= {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
_135M |= {"tie_word_embeddings": True}
# What the config.json of these bases says, for a plan before 15 GB are fetched.
KNOWN: dict[str, dict[str, Any]] = {
    "smollm2-135m": _135M,
    "huggyllama/llama-7b": _7B,
    "meta-llama/Llama-2-7b-hf": _7B,
    "huggyllama/llama-13b": _13B,
    "meta-llama/Meta-Llama-3-8B": _8B,
    "meta-llama/Llama-3.1-70B": _70B,
    "meta-llama/Llama-3.1-405B": _405B,
}


@dataclass(frozen=True)
class Seen:
    """What the rows come to.

    Attributes:
        rows: Those that are trained on; None where they are not here.
        sharing: The largest micro-batch, where rows share what they begin alike.
        apart: The same without that: dropout must differ between rows.
    """

    rows: int | None
    sharing: Batch
    apart: Batch

    def batch_for(self, method: Method | None) -> Batch:
        """Return the largest micro-batch that a method is trained on."""
        return self.apart if getattr(method, "dropout", None) else self.sharing


@dataclass(frozen=True)
class Plan:
    """What a run would be.

    Attributes:
        recipe: Resolved.
        given: The dotted keys that its file or arguments give; all others are defaults.
        config_from: Where the base's sizes are from.
        graph: Who feeds whom; None unless the method is SAN.
        trained: Trained numbers by module, over all blocks.
        rows: Rows that are trained on; None where a file of them is not here.
        missing: That file.
        steps: Optimizer steps; None where the rows are not known and the recipe does not say.
        epochs: What they come to in epochs; None likewise.
        micro_batch: Rows at once on a device.
        batch: The largest that a device computes at once.
        looked: Whether that is the rows' own, not what the cutoff allows.
        device: What the memory is told for.
        devices: How many, each with a process.
        sharded: Whether the base is spread over them.
        memory: Of a step at its peak on each device, by method; the recipe's is the first.
        traffic: Bytes that each device sends in a step, and as many that it receives.
    """

    recipe: Recipe
    given: frozenset[str]
    config_from: str
    graph: PropagationGraph | None
    trained: dict[str, int]
    rows: int | None
    missing: str | None
    steps: int | None
    epochs: float | None
    micro_batch: int
    batch: Batch
    looked: bool
    device: Device
    devices: int
    sharded: bool
    memory: dict[str, Memory]
    traffic: int

    @property
    def adapter_bytes(self) -> int:
        """The adapter's file, in fp32, without its header of some kilobytes."""
        return sum(self.trained.values()) * WIDE


def make_plan(
    recipe: Recipe,
    given: set[str],
    device: Device,
    devices: int = 1,
    sharded: bool = False,
    seen: Seen | None = None,
) -> Plan:
    """Plan a run.

    Args:
        recipe: What would be run.
        given: The keys that are no defaults.
        device: Where it would run.
        devices: On how many.
        sharded: Whether they share the base (FSDP2).
        seen: What tokenizing the rows has found (``data.largest``); else they are counted, and
            taken to be as long as the cutoff and to share nothing.

    Raises:
        InputError: when the base is not known or not supported, a row is wrong, or devices cannot
            work together as asked.
    """
    config, config_from = config_of(recipe.base)
    bits = recipe.base.quantization or stored_bits(recipe.base.model, config)
    if sharded:
        check_engine("FSDP2", recipe)
        if devices == 1:
            raise InputError("--sharded: one device has nobody to share with; add --devices N")
        if bits is not None:
            raise InputError(
                f"base.model: {recipe.base.model} is stored quantized, which FSDP2 cannot shard; "
                "leave --sharded out"
            )
    shape = shape_of(config)
    method, training = recipe.method, recipe.training
    at_once = micro_batch(training, devices)
    looked = seen is not None
    if seen is None:
        rows, missing = _count_rows(recipe)
        full = full_batch(at_once, recipe.data.cutoff, training.packing)
        seen = Seen(rows, full, full)
    else:
        rows, missing = seen.rows, None
    steps, epochs = training.max_steps, None
    if rows is not None:
        an_epoch = ceil(rows / training.batch_size)
        steps = steps or ceil(training.epochs * an_epoch)
        epochs = steps / an_epoch
    double = bool(recipe.base.double_quant)
    if recipe.base.quantization is None and bits:
        double = bool(config["quantization_config"].get("bnb_4bit_use_double_quant"))
    setting = Setting(
        shape=shape,
        dtype=recipe.base.dtype,
        bits=bits,
        double_quant=double,
        method=method,
        batch=seen.batch_for(method),
        checkpointing=training.gradient_checkpointing,
        device=device,
        devices=devices,
        sharded=sharded,
    )
    lora = LoraMethod(name="lora")
    beside = {_title(method): method, _title(lora): lora, "full fine-tuning": None}
    return Plan(
        recipe=recipe,
        given=frozenset(given),
        config_from=config_from,
        graph=graph_of(shape, method) if isinstance(method, SanMethod) else None,
        trained=trained_numbers(shape, method),
        rows=rows,
        missing=missing,
        steps=steps,
        epochs=epochs,
        micro_batch=at_once,
        batch=setting.batch,
        looked=looked,
        device=device,
        devices=devices,
        sharded=sharded,
        memory={
            name: memory(replace(setting, method=one, batch=seen.batch_for(one)))
            for name, one in beside.items()
        },
        traffic=traffic(setting, training.batch_size // (at_once * devices)),
    )


def _title(method: Any) -> str:
    carrier = getattr(method, "carrier", "scale")
    names = {"san": "SAN", "lora": "LoRA", "dora": "DoRA", "ia3": "IA3"}
    name = names[method.name] + ("" if carrier == "scale" else f" {carrier}")
    rank = getattr(method, "rank", None)
    return name if rank is None else f"{name} r{rank}"


def config_of(base: Base) -> tuple[dict[str, Any], str]:
    """Return a base's ``config.json``, and where it is from; weights are not fetched.

    Raises:
        InputError: when it cannot be had, or names a family or sizes that are not supported.
    """
    config, found = _config_of(base)
    check_family(config.get("model_type"))
    check_sizes(config)
    return config, found


def _config_of(base: Base) -> tuple[dict[str, Any], str]:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    name = base.model
    folder = model_folder(name)
    if name in KNOWN and not Path(name).exists():
        here = folder is not None and (folder / "config.json").is_file()
        if not here and (name in PINNED or not try_to_load_from_cache(name, "config.json")):
            return KNOWN[name], "its sizes are known; it is not here yet"
    found = locate(name)
    path: Any = Path(found) / "config.json"
    if not path.is_file():
        path = try_to_load_from_cache(found, "config.json", revision=base.revision)
        if not isinstance(path, str):
            try:
                path = hf_hub_download(found, "config.json", revision=base.revision)
            except Exception:  # of several HTTP libraries, by the hub client's version
                raise InputError(
                    f"{name}: no such folder, and its config.json is not in the hub's cache; the "
                    "hub cannot be reached, or has no such model that is open to you"
                ) from None
    return read_json(Path(path)), str(path)


def _count_rows(recipe: Recipe) -> tuple[int | None, str | None]:
    """Return the rows that are trained on, or the file that is not here to count them."""
    data = recipe.data
    files = training_files(data.train)
    for file in files:
        if not file.exists():
            return None, str(file)
    rows = sum(1 for _ in chain.from_iterable(map(stream_rows, files)))
    rows = min(rows, data.limit or rows)
    if isinstance(data.held_out, int):
        check_held_out(data.held_out, rows)
        rows -= data.held_out
    return rows, None


def marked_recipe(plan: Plan) -> list[tuple[str, bool]]:
    """Return the resolved recipe's lines, as YAML, and whether each is a default."""
    lines: list[tuple[str, bool]] = []
    for section, value in plan.recipe.model_dump(mode="json").items():
        if not isinstance(value, dict):
            lines.append((f"{section}: {_flow(value)}", section not in plan.given))
            continue
        lines.append((f"{section}:", False))
        for key, item in value.items():
            lines.append((f"  {key}: {_flow(item)}", f"{section}.{key}" not in plan.given))
    return lines


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=56, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...").replace("\n", "\n  ")


def find_device(name: str | None) -> Device:
    """Return a device by its name; without one what this machine has, by its driver.

    Raises:
        InputError: when there is no such name.
    """
    if name is not None:
        check_one_of("--device", name, DEVICES)
        return "cuda" if name == "cuda" else "cpu"
    return "cuda" if Path("/proc/driver/nvidia/version").exists() else "cpu"


def bytes_of(memory: str) -> int:
    """Return the bytes of what a device has, such as ``24GB``, ``24GiB`` or ``24G``.

    Raises:
        InputError: when it is no size.
    """
    text = memory.strip()
    try:
        return parse_size(text if text.upper().endswith("B") else f"{text}B")
    except InputError:
        raise InputError(
            f"--memory: expected a size such as 24GB or 24GiB, found {memory!r}"
        ) from None


def fits(plan: Plan, limit: int) -> bool:
    """Return whether what the recipe's method needs is within ``limit``, in bytes."""
    return next(iter(plan.memory.values())).total <= limit


def as_values(plan: Plan, limit: int | None) -> dict[str, Any]:
    """Return a plan as values of JSON."""
    recipe = plan.recipe.model_dump(mode="json")
    return {
        "recipe": recipe,
        "defaults": sorted(set(leaves(recipe)) - plan.given),
        "config_from": plan.config_from,
        "links": None
        if plan.graph is None
        else [{"module": n.name, "anterior": n.anterior} for n in plan.graph],
        "trained": plan.trained,
        "trained_numbers": sum(plan.trained.values()),
        "adapter_bytes": plan.adapter_bytes,
        "rows": plan.rows,
        "missing": plan.missing,
        "steps": plan.steps,
        "epochs": plan.epochs,
        "micro_batch": plan.micro_batch,
        "batch": vars(plan.batch),
        "looked": plan.looked,
        "device": plan.device,
        "devices": plan.devices,
        "sharded": plan.sharded,
        "memory": {name: {**vars(one), "total": one.total} for name, one in plan.memory.items()},
        "traffic": plan.traffic,
        "limit": limit,
        "fits": None if limit is None else fits(plan, limit),
    }
