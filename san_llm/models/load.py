"""A base in memory: its config, its tokenizer, its weights, and the adapter on top."""

from __future__ import annotations

import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from san_llm.architectures.lookup import is_known
from san_llm.errors import InputError
from san_llm.launch.processes import world_size
from san_llm.measure.behaviour import look_at
from san_llm.models.adapter import check_askable, load_adapter, open_adapter
from san_llm.models.agree import check_base
from san_llm.models.locate import FoundBase, refuse_other_tasks
from san_llm.models.quantize import quantization_config
from san_llm.models.reading import is_finite, load_or_refuse
from san_llm.models.rotary import rotate_by_row
from san_llm.models.tokenizer import embedded
from san_llm.models.weights import read_weights
from san_llm.san.model import keep_4bit_layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_config(found: FoundBase, adapter: Path | None = None) -> Any:
    """Return a base's config as transformers reads it; refuse what cannot be trained over.

    With an adapter it says how many tokens are known with that.

    Raises:
        InputError: for a family that SAN's propagation table does not know, quantized weights
            that would be quantized a second time, and weights that are damaged or another model's.
    """
    from transformers import AutoConfig

    base = found.base
    check_base(found)
    config = load_or_refuse(
        "config",
        str(found.folder),
        AutoConfig.from_pretrained,
        trust_remote_code=base.trust_remote_code,
    )
    if not is_known(found.config.get("model_type")):
        _check_writes(found, type(config))
    if found.bits and base.quantization:
        raise InputError(f"base.quantization: {base.model} is stored in {found.bits}: leave it out")
    config.vocab_size = embedded(found, adapter)
    return config


def _check_writes(found: FoundBase, kind: type[Any]) -> None:
    """Refuse a model that is none for text."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(
            f"{found.base.model}: a model of type {found.config['model_type']!r} goes on from no "
            "text: transformers has no causal LM of it"
        )
    refuse_other_tasks(found.config)


def device() -> torch.device:
    """Return the device of this process: its own GPU, or the CPU."""
    if torch.cuda.is_available():
        # The one that Accelerate takes; some launchers show each process only its own.
        number = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        return torch.device("cuda", number)
    return torch.device("cpu")


def load_base(
    found: FoundBase,
    dtype: torch.dtype | None = None,
    sharded: bool = False,
    place: torch.device | None = None,
) -> PreTrainedModel:
    """Return the frozen base model, on this process's device.

    Args:
        found: The base.
        dtype: Instead of the recipe's, and without its quantization: for merging.
        sharded: Load this process's share only, by FSDP2; what the base computes with is gathered
            block by block. Adapters that are put on later are whole in every process.
        place: The device; None: this process's own, and for merging the CPU.

    Raises:
        InputError: when it cannot be loaded or its family is not supported.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations import is_deepspeed_zero3_enabled

    base, config = found.base, load_config(found)
    chosen = dtype or getattr(torch, base.dtype)
    settings: dict[str, Any] = {"dtype": chosen}
    stored = getattr(config, "quantization_config", None)
    if getattr(config, "attn_logit_softcapping", None) is not None:
        # SDPA, which transformers before 5.22 chooses for Gemma 2 too, leaves its scores uncapped.
        settings["attn_implementation"] = "eager"
    if sharded:
        from transformers.distributed import DistributedConfig

        if stored:
            raise InputError(
                f"base.model: {base.model} is stored quantized, which FSDP2 cannot shard; use DDP"
            )
        settings["distributed_config"] = DistributedConfig(fsdp_size=world_size())
    if stored:
        # What the arithmetic is done in is the reader's choice, not that of the stored weights.
        stored["bnb_4bit_compute_dtype"] = str(chosen).removeprefix("torch.")
    elif base.quantization is not None and dtype is None:
        settings["quantization_config"] = quantization_config(base)
    quantized = stored or "quantization_config" in settings
    shared_out = sharded or is_deepspeed_zero3_enabled()
    place = place or (device() if quantized or dtype is None else torch.device("cpu"))
    # To the GPU tensor by tensor, from files that all processes share in memory; what a CPU reads
    # stays where it is.
    if quantized or (not shared_out and place.type != "cpu"):
        settings["device_map"] = {"": place}
    model, loading = load_or_refuse(
        "weights",
        str(found.folder),
        AutoModelForCausalLM.from_pretrained,
        trust_remote_code=base.trust_remote_code,
        config=config,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are told below
        **settings,
    )
    _check_loaded(found, loading)
    keep_4bit_layout(model)
    rotate_by_row(model)
    if stored:  # transformers leaves what is not quantized as it is stored
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(chosen)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not is_finite(parameter):
            raise InputError(f"{base.model}: {name} has numbers that are not finite")
    if not is_known(found.config.get("model_type")):
        look_at(model.eval(), base.model)
    return model


def _check_loaded(found: FoundBase, loading: Mapping[str, Any]) -> None:
    """Refuse weights that are not those of the model that its ``config.json`` says."""
    model = found.base.model
    for name, stored, made in sorted(loading["mismatched_keys"]):
        raise InputError(
            f"{model}: {name} has the shape {tuple(stored)}, by its config.json it is {tuple(made)}"
        )
    for name in sorted(loading["missing_keys"]):  # transformers fills in random numbers
        raise InputError(f"{model}: its weights have no {name}")
    blocks = found.config["num_hidden_layers"]
    for name in sorted(loading["unexpected_keys"]):  # what a class knows of is not told there
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        if numbers and type(blocks) is int and numbers[0] >= blocks:
            raise InputError(
                f"{model}: its config.json has num_hidden_layers {blocks}, its weights have {name}"
            )


def numbers_in(found: FoundBase) -> int:
    """Return how many numbers a base's weights have, by its files; two to a byte in 4 bits."""
    stored = sum(prod(tensor.shape) for tensor in read_weights(found.folder))
    return stored * (2 if found.bits == "4bit" else 1)


def load_model(found: FoundBase, adapter: Path | None) -> PreTrainedModel:
    """Return what is asked, a base with its adapter or a model alone, in eval mode.

    Raises:
        InputError: when a part cannot be loaded, or an adapter cannot be asked.
    """
    if adapter is not None:
        check_askable(open_adapter(adapter))  # before the base is loaded
    model: Any = load_base(found)
    if adapter is not None:
        model = load_adapter(model, adapter)
    model.eval()
    return cast("PreTrainedModel", model)
