"""The model of a recipe: the base, its tokenizer, and the adapter on top."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from san_llm.errors import InputError, SanError
from san_llm.locate import base_folder, stored_bits
from san_llm.quantize import quantization_config
from san_llm.recipe import Base, DoraMethod, Ia3Method, LoraMethod, Method, SanMethod
from san_llm.san.config import SanConfig
from san_llm.san.graph import check_family, family_targets
from san_llm.san.model import keep_4bit_layout
from san_llm.subject import Subject

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def _read(what: str, name: str, load: Any, **how: Any) -> Any:
    """Load from a folder or the hub, turning what went wrong into one line."""
    try:
        return load(name, **how)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # torch's first line on weights that do not fit says nothing: the second says which.
        first = lines[1] if len(lines) > 1 and lines[0].endswith(":") else "".join(lines[:1])
        wrong_input = isinstance(error, (OSError, ValueError, SafetensorError))
        kind = InputError if wrong_input else SanError
        raise kind(
            f"{name}: its {what} cannot be loaded: {first or type(error).__name__}"
        ) from error


def load_config(base: Base) -> Any:
    """Load a base's config, and refuse what cannot be trained over.

    Raises:
        InputError: for a family that SAN's propagation table does not know, or a checkpoint that is
            quantized by another library, or would be a second time.
    """
    from transformers import AutoConfig

    config = _read(
        "config",
        str(base_folder(base)),
        AutoConfig.from_pretrained,
        trust_remote_code=base.trust_remote_code,
    )
    check_family(config.model_type)
    stored = stored_bits(base.model, vars(config))
    if stored and base.quantization:
        raise InputError(f"base.quantization: {base.model} is stored in {stored}: leave it out")
    return config


def load_tokenizer(base: Base) -> PreTrainedTokenizerFast:
    """Load a base's tokenizer.

    Raises:
        InputError: when there is none that can be used.
    """
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerFast = _read(
        "tokenizer",
        str(base_folder(base)),
        AutoTokenizer.from_pretrained,
        trust_remote_code=base.trust_remote_code,
    )
    return tokenizer


def device() -> torch.device:
    """Return the device of this process: its own GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def load_base(base: Base, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load the frozen base model onto this process's device.

    Args:
        base: The recipe's section.
        dtype: Instead of the section's, and without its quantization: for merging.

    Raises:
        InputError: when it cannot be loaded or its family is not supported.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(base)
    chosen = dtype or getattr(torch, base.dtype)
    how: dict[str, Any] = {"dtype": chosen}
    stored = getattr(config, "quantization_config", None)
    if stored:
        # What the arithmetic is done in is the reader's choice, not the checkpoint's.
        stored["bnb_4bit_compute_dtype"] = str(chosen).removeprefix("torch.")
    elif base.quantization is not None and dtype is None:
        how["quantization_config"] = quantization_config(base)
    if stored or "quantization_config" in how:
        how["device_map"] = {"": device()}
    model: PreTrainedModel = _read(
        "weights",
        str(base_folder(base)),
        AutoModelForCausalLM.from_pretrained,
        trust_remote_code=base.trust_remote_code,
        config=config,
        use_safetensors=True,
        **how,
    )
    keep_4bit_layout(model)
    if stored:  # transformers leaves what is not quantized as it is stored
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(chosen)
    if "device_map" not in how and dtype is None:
        model.to(device())
    model.requires_grad_(False)
    return model


def adapter_config(method: Method, model_type: str = "llama") -> PeftConfig:
    """Return the PEFT config of a recipe's method on a model of this family."""
    from peft import IA3Config, LoraConfig

    targets = family_targets(method.target_modules, model_type)
    match method:
        case SanMethod():
            low_rank: dict[str, Any] = {
                "r": method.rank,
                "lora_alpha": method.alpha,
                "lora_dropout": method.dropout,
            }
            return SanConfig(
                task_type="CAUSAL_LM",
                target_modules=targets,
                carrier=method.carrier,
                mode=method.mode,
                shift=method.shift,
                links=list(method.links),
                adapt_embedding=method.adapt_embedding,
                form=method.form,
                **({} if method.carrier == "scale" else low_rank),
            )
        case LoraMethod() | DoraMethod():
            return LoraConfig(
                task_type="CAUSAL_LM",
                target_modules=targets,
                r=method.rank,
                lora_alpha=method.alpha,
                lora_dropout=method.dropout,
                use_dora=isinstance(method, DoraMethod),
            )
        case Ia3Method():
            return IA3Config(
                task_type="CAUSAL_LM",
                target_modules=targets,
                feedforward_modules=list(method.feedforward_modules),
            )


def add_adapter(model: PreTrainedModel, method: Method) -> PeftModel:
    """Put a fresh adapter on a base.

    Raises:
        InputError: when a target matches nothing in the model.
    """
    from peft import get_peft_model

    try:
        adapted: PeftModel = get_peft_model(model, adapter_config(method, model.config.model_type))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"method {method.name}: {str(error).splitlines()[0]}") from error
    return adapted


def load_adapter(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """Put a saved adapter on a base.

    Raises:
        InputError: when the folder has no adapter in safetensors, or one of another base's shape.
    """
    from peft import PeftModel

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / name).is_file():
            raise InputError(f"{adapter}: not an adapter: no {name} in it")
    adapted: PeftModel = _read(
        "adapter", str(adapter), lambda name: PeftModel.from_pretrained(model, name)
    )
    return adapted.eval()


def load_subject(subject: Subject) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load what is evaluated, in eval mode, and its tokenizer.

    Raises:
        InputError: when a part cannot be loaded.
    """
    tokenizer = load_tokenizer(subject.base)
    model: Any = load_base(subject.base)
    if subject.adapter is not None:
        model = load_adapter(model, subject.adapter)
    return model.eval(), tokenizer


def trainable_parameters(model: torch.nn.Module) -> int:
    """Return how many numbers are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
