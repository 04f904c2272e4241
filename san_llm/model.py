"""The model of a recipe: the base, its tokenizer, and the adapter on top."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from san_llm.errors import InputError, SanError
from san_llm.locate import base_folder, stored_bits
from san_llm.processes import world_size
from san_llm.quantize import quantization_config
from san_llm.recipe import Base, DoraMethod, Ia3Method, LoraMethod, Method, SanMethod
from san_llm.record import read_json
from san_llm.san.config import SanConfig
from san_llm.san.graph import (
    PARENTS,
    check_family,
    check_options,
    check_sizes,
    family_targets,
    linear_shapes,
)
from san_llm.san.model import keep_4bit_layout
from san_llm.shards import read_checkpoint, read_header
from san_llm.subject import Subject

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def _read(what: str, name: str, load: Any, **how: Any) -> Any:
    """Load from a folder or the hub, turning what went wrong into one line."""
    try:
        return load(name, **how)
    except Exception as error:  # files of others, read by several libraries: anything can break
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # torch's first line on weights that do not fit says nothing: the second says which.
        first = lines[1] if len(lines) > 1 and lines[0].endswith(":") else "".join(lines[:1])
        if isinstance(error, RecursionError):
            raise InputError(f"{name}: its {what} cannot be loaded: nested too deeply") from error
        if isinstance(error, KeyError):
            first = f"the key {first} is missing"
        # A library that trips over a file's content says so with any of Python's errors.
        failed = isinstance(error, (RuntimeError, MemoryError, ImportError))
        kind = SanError if failed else InputError
        raise kind(
            f"{name}: its {what} cannot be loaded: {first or type(error).__name__}"
        ) from error


def load_config(base: Base) -> Any:
    """Load a base's config, and refuse what cannot be trained over.

    Raises:
        InputError: for a family that SAN's propagation table does not know, a checkpoint that is
            quantized by another library, or would be a second time, and weights that are damaged
            or another model's.
    """
    from transformers import AutoConfig

    folder = base_folder(base)
    read_json(folder / "config.json")  # whose messages are plainer
    config = _read(
        "config",
        str(folder),
        AutoConfig.from_pretrained,
        trust_remote_code=base.trust_remote_code,
    )
    check_family(config.model_type)
    stored = stored_bits(base.model, vars(config))
    if stored and base.quantization:
        raise InputError(f"base.quantization: {base.model} is stored in {stored}: leave it out")
    check_sizes(config)
    _check_weights(folder, config, quantized=stored is not None)
    return config


def _check_weights(folder: Path, config: Any, quantized: bool) -> None:
    """Compare a checkpoint with its config by the headers of its files, which takes no time."""
    stored = {tensor.name: tensor.shape for tensor in read_checkpoint(folder)}
    numbers = {
        int(name.split(".")[2]) for name in stored if re.match(r"model\.layers\.\d+\.", name)
    }
    if numbers and numbers != set(range(config.num_hidden_layers)):
        raise InputError(
            f"{folder}: its config.json has num_hidden_layers {config.num_hidden_layers}, its "
            f"weights have {len(numbers)} blocks"
        )
    shapes = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    if not quantized:
        for target, shape in linear_shapes(config).items():
            for block in numbers:
                shapes[f"model.layers.{block}.{PARENTS[target]}.{target}.weight"] = shape
    for name, shape in shapes.items():
        if stored.get(name, shape) != shape:
            raise InputError(
                f"{folder}: {name} has the shape {stored[name]}, by its config.json it is {shape}"
            )


def load_tokenizer(base: Base) -> PreTrainedTokenizerFast:
    """Load a base's tokenizer.

    Raises:
        InputError: when there is none that can be used.
    """
    from transformers import AutoTokenizer

    folder = base_folder(base)
    read_json(folder / "config.json")
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise InputError(f"{folder}: no tokenizer in it: none of {', '.join(TOKENIZERS)}")
    tokenizer: PreTrainedTokenizerFast = _read(
        "tokenizer",
        str(folder),
        AutoTokenizer.from_pretrained,
        trust_remote_code=base.trust_remote_code,
    )
    return tokenizer


def device() -> torch.device:
    """Return the device of this process: its own GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def load_base(
    base: Base, dtype: torch.dtype | None = None, sharded: bool = False
) -> PreTrainedModel:
    """Load the frozen base model onto this process's device.

    Args:
        base: The recipe's section.
        dtype: Instead of the section's, and without its quantization: for merging.
        sharded: Load this process's share only, by FSDP2; what the base computes with is gathered
            block by block. Adapters that are put on later are whole in every process.

    Raises:
        InputError: when it cannot be loaded or its family is not supported.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(base)
    chosen = dtype or getattr(torch, base.dtype)
    how: dict[str, Any] = {"dtype": chosen}
    stored = getattr(config, "quantization_config", None)
    if sharded:
        from transformers.distributed import DistributedConfig

        if stored:
            raise InputError(
                f"base.model: {base.model} is stored quantized, which FSDP2 cannot shard; use DDP"
            )
        how["distributed_config"] = DistributedConfig(fsdp_size=world_size())
    if stored:
        # What the arithmetic is done in is the reader's choice, not the checkpoint's.
        stored["bnb_4bit_compute_dtype"] = str(chosen).removeprefix("torch.")
    elif base.quantization is not None and dtype is None:
        how["quantization_config"] = quantization_config(base)
    if stored or "quantization_config" in how:
        how["device_map"] = {"": device()}
    model, loading = _read(
        "weights",
        str(base_folder(base)),
        AutoModelForCausalLM.from_pretrained,
        trust_remote_code=base.trust_remote_code,
        config=config,
        use_safetensors=True,
        output_loading_info=True,
        **how,
    )
    for name in sorted(loading["missing_keys"]):  # transformers fills in random numbers
        raise InputError(f"{base.model}: its weights have no {name}")
    keep_4bit_layout(model)
    if stored:  # transformers leaves what is not quantized as it is stored
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(chosen)
    if "device_map" not in how and dtype is None and not sharded:
        model.to(device())
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not _is_finite(parameter):
            raise InputError(f"{base.model}: {name} has numbers that are not finite")
    return model


def _is_finite(numbers: torch.Tensor) -> bool:
    if isinstance(numbers, DTensor):
        numbers = numbers.to_local()
    # Smallest and largest: a NaN is both, and no mask of the weight's size is made.
    return not numbers.numel() or bool(torch.isfinite(torch.stack(numbers.aminmax())).all())


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


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Save the adapter that is trained; of a base that is sharded nothing is gathered for it."""
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(str(folder), state_dict=state)


def load_adapter(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """Put a saved adapter on a base.

    Raises:
        InputError: when the folder has no adapter in safetensors, or one of another base's shape.
    """
    from peft import PeftModel, get_peft_model_state_dict

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / name).is_file():
            raise InputError(f"{adapter}: not an adapter: no {name} in it")
    options = read_json(adapter / "adapter_config.json")
    if options.get("peft_type") == "SAN":
        check_options(options)
    held = {tensor.name for tensor in read_header(adapter / "adapter_model.safetensors")}
    adapted: PeftModel = _read(
        "adapter", str(adapter), lambda name: PeftModel.from_pretrained(model, name)
    )
    # PEFT warns of what is missing, and goes on with the numbers that an adapter begins with.
    tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    wanted = set(tensors)
    for name in sorted(wanted - held):
        raise InputError(f"{adapter}: has no {name}: it is cut, or was trained on another base")
    for name in sorted(held - wanted):
        if f".{adapted.base_model.prefix}" in name:
            raise InputError(f"{adapter}: {name} belongs to nothing in this base")
    for name, numbers in tensors.items():
        if not _is_finite(numbers):
            raise SanError(f"{adapter}: {name} has numbers that are not finite")
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
