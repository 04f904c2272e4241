"""A base in memory: its config, its tokenizer, its weights, and the adapter on top."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from san_llm.errors import InputError
from san_llm.launch.processes import world_size
from san_llm.models.adapter import load_adapter
from san_llm.models.agree import check_base, refuse_past_embedding
from san_llm.models.locate import FoundBase
from san_llm.models.quantize import quantization_config
from san_llm.models.reading import is_finite, load_or_refuse
from san_llm.san.model import keep_4bit_layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_config(found: FoundBase) -> Any:
    """Return a base's config as transformers reads it; refuse what cannot be trained over.

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
    if found.bits and base.quantization:
        raise InputError(f"base.quantization: {base.model} is stored in {found.bits}: leave it out")
    return config


def load_tokenizer(found: FoundBase) -> PreTrainedTokenizerFast:
    """Return a base's tokenizer.

    Raises:
        InputError: when there is none that can be used.
    """
    from transformers import AutoTokenizer

    if not any((found.folder / name).is_file() for name in TOKENIZERS):
        raise InputError(f"{found.folder}: no tokenizer in it: none of {', '.join(TOKENIZERS)}")
    tokenizer: PreTrainedTokenizerFast = load_or_refuse(
        "tokenizer",
        str(found.folder),
        AutoTokenizer.from_pretrained,
        trust_remote_code=found.base.trust_remote_code,
    )
    vocabulary = found.config["vocab_size"]
    for role in ("eos_token", "pad_token"):  # what every row ends with, or is filled up with
        number = getattr(tokenizer, f"{role}_id")
        if number is not None:
            where = f"{found.folder / 'tokenizer_config.json'}: {role}"
            refuse_past_embedding([number], vocabulary, where, tokenizer)
    return tokenizer


def device() -> torch.device:
    """Return the device of this process: its own GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def load_base(
    found: FoundBase, dtype: torch.dtype | None = None, sharded: bool = False
) -> PreTrainedModel:
    """Return the frozen base model, on this process's device.

    Args:
        found: The base.
        dtype: Instead of the recipe's, and without its quantization: for merging.
        sharded: Load this process's share only, by FSDP2; what the base computes with is gathered
            block by block. Adapters that are put on later are whole in every process.

    Raises:
        InputError: when it cannot be loaded or its family is not supported.
    """
    from transformers import AutoModelForCausalLM

    base, config = found.base, load_config(found)
    chosen = dtype or getattr(torch, base.dtype)
    settings: dict[str, Any] = {"dtype": chosen}
    stored = getattr(config, "quantization_config", None)
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
    if stored or "quantization_config" in settings:
        settings["device_map"] = {"": device()}
    model, loading = load_or_refuse(
        "weights",
        str(found.folder),
        AutoModelForCausalLM.from_pretrained,
        trust_remote_code=base.trust_remote_code,
        config=config,
        use_safetensors=True,
        output_loading_info=True,
        **settings,
    )
    for name in sorted(loading["missing_keys"]):  # transformers fills in random numbers
        raise InputError(f"{base.model}: its weights have no {name}")
    keep_4bit_layout(model)
    if stored:  # transformers leaves what is not quantized as it is stored
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(chosen)
    if "device_map" not in settings and dtype is None and not sharded:
        model.to(device())
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not is_finite(parameter):
            raise InputError(f"{base.model}: {name} has numbers that are not finite")
    return model


def load_model(found: FoundBase, adapter: Path | None) -> PreTrainedModel:
    """Return what is asked, a base with its adapter or a model alone, in eval mode.

    Raises:
        InputError: when a part cannot be loaded.
    """
    model: Any = load_base(found)
    if adapter is not None:
        model = load_adapter(model, adapter)
    model.eval()
    return cast("PreTrainedModel", model)
