"""The engine of several processes: DDP, FSDP2, or DeepSpeed.

Accelerate names it in its config file, and tells its processes by the environment. What it would
then leave out without a word is refused here: on a CPU it uses DDP where FSDP was asked for, and an
engine's settings may say something else than the recipe does.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml

from san_llm.errors import InputError
from san_llm.recipe.schema import Recipe
from san_llm.recipe.shipped import config_name, shipped_configs

Engine = Literal["DDP", "FSDP2", "DeepSpeed"]

# What a file of Accelerate's may say of FSDP, and what each word would change. All other settings
# of FSDP leave the result and the memory as they are: only the adapter is trained and saved, and it
# is whole in every process.
_FSDP = {
    "fsdp_version": (("2",), "FSDP1 would shard SAN's vectors; set it to 2"),
    "fsdp_auto_wrap_policy": (("TRANSFORMER_BASED_WRAP",), "a block is what is sharded"),
    "fsdp_reshard_after_forward": (
        ("true", "FULL_SHARD"),
        "the whole base would stay on every device, which is DDP: MULTI_GPU",
    ),
    "fsdp_offload_params": (("false",), "not supported"),
    "fsdp_activation_checkpointing": (
        ("false",),
        "the recipe's training.gradient_checkpointing says that",
    ),
    "fsdp_ignored_modules": ((), "not supported"),
}


def find_config(text: Path | None) -> Path | None:
    """Return the config file that is meant: one that is there, or a shipped one by its name."""
    if text is None or text.exists():
        return text
    return shipped_configs().get(config_name(str(text)), text)


def read_config(config: Path) -> dict[str, Any]:
    """Return what a config file of Accelerate's says.

    Raises:
        InputError: when it is none.
    """
    if not config.is_file():
        names = ", ".join(shipped_configs())
        raise InputError(
            f"{config}: no such file; `accelerate config` writes one, and shipped are {names}"
        )
    try:
        values: Any = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{config}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or "distributed_type" not in values:
        raise InputError(
            f"{config}: no distributed_type in it; `accelerate config` writes a file that has one"
        )
    return values


def engine_of(config: Path) -> Engine:
    """Return the engine that a config file of Accelerate's asks for.

    Raises:
        InputError: when it asks for none that can be used.
    """
    values = read_config(config)
    kind = values["distributed_type"]
    if str(kind).startswith("MULTI_"):
        return "DDP"
    if kind not in ("FSDP", "DEEPSPEED"):
        raise InputError(
            f"{config}: distributed_type {kind}: not supported; MULTI_GPU, MULTI_CPU, FSDP and "
            "DEEPSPEED are"
        )
    if values.get("parallelism_config"):
        raise InputError(f"{config}: parallelism_config: not supported; leave it out")
    section = values.get("fsdp_config" if kind == "FSDP" else "deepspeed_config")
    if not isinstance(section, dict):
        raise InputError(f"{config}: distributed_type {kind} without its {kind.lower()}_config")
    if kind == "FSDP":
        _check_fsdp(str(config), {"fsdp_version": 1, **section})
        return "FSDP2"
    return "DeepSpeed"


def _check_fsdp(where: str, settings: dict[str, Any]) -> None:
    for key, value in settings.items():
        # As `accelerate launch` writes it into the environment.
        text = str(value).lower() if isinstance(value, bool) else str(value)
        usable, why = _FSDP.get(key, ((text,), ""))
        if value is not None and text not in usable:
            raise InputError(f"{where}: {key} {text}: {why}")


def take_engine() -> Engine:
    """Return the engine that this process was launched for; Accelerate will not set up its own.

    Raises:
        InputError: when the launcher asked for settings that would be left out.
    """

    def is_set(name: str) -> bool:
        return os.environ.get(name, "").lower() in ("true", "1")

    if is_set("ACCELERATE_USE_DEEPSPEED"):
        return "DeepSpeed"
    if not is_set("ACCELERATE_USE_FSDP"):
        return "DDP"
    settings = {key.lower(): text for key, text in os.environ.items() if key.startswith("FSDP_")}
    _check_fsdp("accelerate launch", {"fsdp_version": "1", **settings})
    # Accelerate would shard the trained vectors too, and on a CPU nothing. See load_base in
    # models.load.
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    return "FSDP2"


def check_engine(engine: Engine, recipe: Recipe) -> None:
    """Refuse, before anything is loaded, what a recipe and an engine cannot do together.

    Raises:
        InputError: naming the key, and what would work.
    """
    if recipe.method.name == "full" and engine != "DDP":
        raise InputError(
            f"method.name full: not tried with {engine}; use DDP (MULTI_GPU), with the whole model "
            "on every device"
        )
    if engine == "FSDP2":
        if recipe.base.quantization is not None:
            raise InputError(
                f"base.quantization {recipe.base.quantization}: FSDP2 cannot shard a quantized "
                "base; use DDP (MULTI_GPU), or leave the quantization out"
            )
        if recipe.method.name == "peft":
            raise InputError(
                f"method.config.peft_type {recipe.method.peft_type}: not tried over a base that "
                "FSDP2 shards; use DDP (MULTI_GPU)"
            )
        if recipe.method.name == "dora":
            raise InputError(
                "method.name dora: PEFT's DoRA does not start over a base that FSDP2 shards; use "
                "DDP (MULTI_GPU), or SAN with method.carrier=dora"
            )
    elif engine == "DeepSpeed":
        if recipe.base.quantization is not None:
            raise InputError(
                f"base.quantization {recipe.base.quantization}: not tried with DeepSpeed; use DDP "
                "(MULTI_GPU), or leave the quantization out"
            )
        if recipe.method.name == "peft":
            raise InputError(
                f"method.config.peft_type {recipe.method.peft_type}: not tried with DeepSpeed; use "
                "DDP (MULTI_GPU)"
            )
        if recipe.training.bad_batches == "skip":
            raise InputError(
                "training.bad_batches skip: DeepSpeed moves the weights before the batch can be "
                "judged; use DDP or FSDP2, or set it to stop"
            )
        if find_spec("deepspeed") is None:
            raise InputError(
                "DeepSpeed is not installed: `pip install --no-build-isolation "
                "'san-llm[deepspeed]'`; or use FSDP2, which shards the base as ZeRO-3 does"
            )


def load_weights_only() -> None:
    """Let DeepSpeed's checkpoints, which are pickles, hold numbers and its own settings only."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address
    from torch.serialization import add_safe_globals

    add_safe_globals([LossScaler, ZeroStageEnum, fragment_address])
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # DeepSpeed asks for anything
