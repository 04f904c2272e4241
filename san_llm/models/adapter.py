"""An adapter: opened as files, put on a base, saved, loaded. Only here are PEFT's names known."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from san_llm.architectures.decoders import EMBEDDING
from san_llm.errors import InputError, SanError, did_you_mean, nearest_file
from san_llm.files import read_json
from san_llm.models.tuners import put_on, tuner_config
from san_llm.models.weights import Stored, read_header
from san_llm.recipe.schema import (
    DoraMethod,
    Ia3Method,
    LoraMethod,
    Method,
    PeftMethod,
    SanMethod,
)
from san_llm.runs.record import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from san_llm.san.node import unmatched
from san_llm.san.options import SAVED_KEYS, saved_options
from san_llm.san.renamed import renamed

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

PREFIX = "base_model.model."  # PEFT's, before a module's name in the base
_SHARED = "base_model."
_EMBEDDING, _HEAD = f"model.{EMBEDDING}", "lm_head"
# A module that is trained whole is there as such; once resized, PEFT writes it two times more.
_AGAIN = re.compile(r"\.(original_module|modules_to_save)\.")


@dataclass(frozen=True)
class Adapter:
    """A saved adapter, by its files.

    Attributes:
        folder: The adapter's folder.
        options: What its ``adapter_config.json`` says.
        method: PEFT's name of the method: ``SAN``, ``LORA``, ``IA3``, ...
        tensors: What it holds, by the names in the base: ``model.layers.0.mlp.up_proj.san_gamma``.
    """

    folder: Path
    options: Mapping[str, Any]
    method: str
    tensors: Mapping[str, Stored]

    @property
    def measured(self) -> bool:
        """Whether it brings its own graph along, of a model that no table knows."""
        return bool(self.options.get("graph"))

    @property
    def weights(self) -> Path:
        """The file with its tensors."""
        return self.folder / ADAPTER_WEIGHTS


def open_adapter(folder: Path) -> Adapter:
    """Return what an adapter's files say; its tensors' numbers are not read yet.

    Raises:
        InputError: when the folder holds no adapter in safetensors, or one of a method or with
            options that are unknown here.
    """
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: not an adapter: no {name} in it")
    options = read_json(folder / ADAPTER_CONFIG)
    method = str(options.get("peft_type"))
    _check_known(folder / ADAPTER_CONFIG, method, options)
    if method == "SAN":
        saved_options(options)
    header = read_header(folder / ADAPTER_WEIGHTS)
    tensors = {tensor.name.removeprefix(PREFIX): tensor for tensor in header}
    for name in [name for name in tensors if _AGAIN.search(name)]:
        if _AGAIN.sub(".", name) in tensors:
            del tensors[name]
    return Adapter(folder, options, method, tensors)


def check_askable(adapter: Adapter) -> None:
    """Refuse an adapter that learned a prompt: prompts answered together share a beginning.

    Raises:
        InputError: naming its method.
    """
    if adapter.method == "SAN":  # known without importing PEFT, which takes seconds
        return
    from peft import PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[adapter.method], PromptLearningConfig):
        raise InputError(
            f"{adapter.folder / ADAPTER_CONFIG}: peft_type {adapter.method} puts a prompt that was "
            "learned before what a model reads, which answers here have no place for: use it with "
            "PEFT, beside its base"
        )


def embedding_rows(adapter: Adapter, rows: int, tied: bool = True) -> int:
    """Return how many tokens a model knows with an adapter, whose training may have added some.

    Args:
        adapter: The adapter.
        rows: How many the base knows.
        tied: Whether the base's output head is its embedding.

    Raises:
        InputError: when it was trained with more or fewer, and has not all rows of the embedding
            and the head.
    """
    whole: dict[str, int] = {}
    asked = {rows}
    for name, tensor in adapter.tensors.items():
        module = next((m for m in (_EMBEDDING, _HEAD) if name.startswith(f"{m}.")), None)
        if module is None or len(tensor.shape) != 2:
            continue
        if name.endswith("lora_embedding_A"):
            asked.add(tensor.shape[1])
        elif module == _HEAD and name.endswith("lora_B.weight"):
            asked.add(tensor.shape[0])
        elif name.endswith(".weight") and "lora_" not in name:
            whole[module] = tensor.shape[0]
    asked |= set(whole.values())
    if asked == {rows}:
        return rows
    size = max(asked - {rows})
    for module in (_EMBEDDING,) if tied else (_EMBEDDING, _HEAD):
        if whole.get(module) != size:
            raise InputError(
                f"{adapter.folder}: was trained with {size:,} tokens where this base has {rows:,}, "
                f"and does not bring {module} of that size: save it with "
                "save_embedding_layers=True, or name the base that has them with --model"
            )
    return size


def _check_known(path: Path, method: str, options: Mapping[str, Any]) -> None:
    """Refuse what PEFT would fail on without a word of it, or pass over and compute otherwise.

    Forks of PEFT write methods of their own, newer versions of it new options. One that is off,
    as most are in every file that a newer version writes, changes nothing.
    """
    used = {key for key, value in options.items() if not _is_off(value)}
    if method == "SAN" and used <= SAVED_KEYS:  # known without importing PEFT, which takes seconds
        return
    from peft import __version__
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    elsewhere = "merge it with the code that trained it, and name that model with --model"
    if method not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise InputError(
            f"{path}: peft_type: {options.get('peft_type')!r}: PEFT {__version__} knows no such "
            f"method: {elsewhere}"
        )
    known = {field.name for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[method])}
    for key in sorted(used - known):
        by = options.get("peft_version")
        wrote = f" (PEFT {by} wrote the file)" if by not in (None, __version__) else ""
        raise InputError(
            f"{path}: {key}: {options[key]!r}: PEFT {__version__} knows no such option of a "
            f"{method} adapter{wrote} and would compute without it: {elsewhere}; or take the key "
            "out if it changes no number"
        )


def _is_off(value: object) -> bool:
    return value is None or value is False or value in ("", [], {})


def named_base(folder: Path) -> str:
    """Return the base model that an adapter's config names.

    Raises:
        InputError: when the folder holds no adapter, or it names no base.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        near = "" if folder.exists() else nearest_file(folder)
        raise InputError(f"{folder}: not an adapter: no {ADAPTER_CONFIG} in it{near}")
    name = read_json(path).get("base_model_name_or_path")
    if not name:
        raise InputError(f"{folder}: does not name its base model; give it with --model")
    return str(name)


def adapter_config(method: Method, model_type: str = "llama") -> PeftConfig:
    """Return the PEFT config of a recipe's method on a model of this family."""
    from peft import IA3Config, LoraConfig

    if isinstance(method, PeftMethod):
        return tuner_config(method, model_type)
    targets = method.targets(model_type)
    match method:
        case SanMethod():
            from san_llm.san.config import SanConfig

            options = method.options
            return SanConfig(
                task_type="CAUSAL_LM",
                target_modules=targets,
                carrier=options.carrier,
                mode=options.mode,
                shift=options.shift,
                links=options.links,
                adapt_embedding=options.adapt_embedding,
                wiring=options.wiring,
                train_norms=options.train_norms,
                r=options.rank,
                lora_alpha=options.alpha,
                lora_dropout=options.dropout,
                form=options.form,
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
    """Return a base with a fresh adapter on it.

    Raises:
        InputError: when a target matches nothing in the model, or a tuner does not fit.
    """
    from peft import get_peft_model

    from san_llm.models.quantize import keep_dtype

    if isinstance(method, PeftMethod):
        return put_on(model, method)
    targets = method.targets(model.config.model_type)
    if not isinstance(method, SanMethod) and isinstance(targets, list):
        # PEFT passes over names that match nothing, as long as one does.
        model_type, names = model.config.model_type, [name for name, _ in model.named_modules()]
        for target in (missing := unmatched(targets, names)):
            now = renamed(missing, names, type(model).__name__, model_type)
            near = did_you_mean(target, [name.rsplit(".", 1)[-1] for name in names])
            raise InputError(
                f"method.target_modules: {target!r} is no module of a {model_type}{now or near}"
            )
    try:
        adapted: PeftModel = get_peft_model(model, adapter_config(method, model.config.model_type))
    except InputError:
        raise
    except ValueError as error:
        said = str(error).splitlines()[0]
        way = ": set method.dropout: 0" if "lora_dropout != 0" in said else ""  # PEFT's of experts
        raise InputError(f"method {method.name}: {said}{way}") from error
    keep_dtype(adapted)
    return adapted


def adapter_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return the tensors of a model that hold its adapter, and perhaps some of the base.

    What is trained is all there is to the methods that are named here. Other tuners have frozen
    tensors of their own beside it, such as VeRA's projections, which PEFT picks out.
    """
    if model.active_peft_config.peft_type in ("SAN", "LORA", "IA3"):
        # So that of a base that is sharded nothing is gathered.
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    state: dict[str, torch.Tensor] = model.state_dict()
    return state


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Save the adapter that is trained."""
    model.save_pretrained(str(folder), state_dict=adapter_state(model))


def load_adapter(model: PreTrainedModel, folder: Path, trainable: bool = False) -> PeftModel:
    """Return a base with a saved adapter on it.

    Args:
        model: The base.
        folder: The adapter's.
        trainable: Go on training what it holds.

    Raises:
        InputError: when the folder has no adapter in safetensors, or one of another base's shape.
        SanError: when a number of it is not finite.
    """
    from peft import PeftModel, get_peft_model_state_dict

    from san_llm.models.quantize import keep_dtype
    from san_llm.models.reading import is_finite, load_or_refuse

    adapter = open_adapter(folder)
    # What all modules of a tuner share lies above the base's own names.
    held = {name if name.startswith(_SHARED) else PREFIX + name for name in adapter.tensors}
    rows = model.get_input_embeddings().num_embeddings
    trained = embedding_rows(adapter, rows, bool(model.config.tie_word_embeddings))
    if trained != rows:  # every row comes from the adapter
        model.resize_token_embeddings(trained, mean_resizing=False)
    adapted: PeftModel = load_or_refuse(
        "adapter",
        str(folder),
        lambda name: PeftModel.from_pretrained(model, name, is_trainable=trainable),
    )
    keep_dtype(adapted)
    # PEFT warns of what is missing, and goes on with the numbers that an adapter begins with.
    tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    wanted = set(tensors)
    for name in sorted(wanted - held):
        raise InputError(f"{folder}: has no {name}: it is cut, or was trained on another base")
    for name in sorted(held - wanted):
        if f".{adapted.base_model.prefix}" in name:
            raise InputError(f"{folder}: {name} belongs to nothing in this base")
    for name, numbers in tensors.items():
        if not is_finite(numbers):
            raise SanError(f"{folder}: {name} has numbers that are not finite")
    return adapted.eval()


def base_parameters(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """Return the parameters of a base under an adapter, by their names in the base alone."""
    return {
        name.removeprefix(PREFIX).replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters()
    }


def trainable_parameters(model: torch.nn.Module) -> int:
    """Return how many numbers are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
