"""What a checkpoint holds, against what this very training would have written.

Checksums show that a checkpoint is what somebody wrote, not who: a run that was handed on may have
been sealed anew. What training goes on from is looked at here, before anything is written.
"""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load_file
from transformers import TrainerState

from san_llm.errors import InputError, first_line, first_mistake
from san_llm.launch.engine import Engine
from san_llm.models.adapter import adapter_state
from san_llm.models.weights import SINGLE, read_header
from san_llm.train.checkpoint import SEAL, best_of, checkpoint_of, step_of

STATE, ADAPTER = "trainer_state.json", "adapter_model.safetensors"
OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"
_GO_BACK = "take this checkpoint away to go on from the one before"
# Of a parameter group what a recipe says, and not the device.
_SETTINGS = (
    *("params", "initial_lr", "betas", "eps", "weight_decay", "decoupled_weight_decay"),
    *("amsgrad", "maximize"),
)


class _Entry(BaseModel):
    """A line of the log. A skipped batch's loss may be anything."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, float | str]
    step: int = Field(ge=0)
    epoch: float = 0.0
    loss: float = 0.0
    eval_loss: float = 0.0
    grad_norm: float = 0.0
    learning_rate: float = 0.0


class _State(BaseModel):
    """Of Trainer's state what a run goes on by."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    global_step: int
    epoch: float
    log_history: list[_Entry]
    best_global_step: int | None
    best_metric: float | None
    best_model_checkpoint: str | None
    max_steps: int
    num_train_epochs: int
    num_input_tokens_seen: int
    train_batch_size: int
    total_flos: float


def check_content(folder: Path, model: Any, engine: Engine) -> None:
    """Refuse a checkpoint that is sealed, but that no training of ``model`` has written.

    Its optimizer is looked at by :func:`check_optimizer`.

    Raises:
        InputError: naming the file, and what is wrong in it.
    """
    _check_state(folder)
    if engine == "DeepSpeed":  # which reads files of its own
        return
    if not (folder / OPTIMIZER).is_file():
        raise InputError(
            f"{folder}: has no {OPTIMIZER}, so nothing can go on from it; what DeepSpeed wrote "
            "goes on with DeepSpeed"
        )
    step, best = step_of(folder), best_of(folder)
    for kept_step in {step, best or step}:
        _check_files(checkpoint_of(folder.parent, kept_step))
        _check_adapter(checkpoint_of(folder.parent, kept_step), model)


def _check_state(folder: Path) -> None:
    """Refuse a checkpoint whose log, step or best step no training has written.

    Raises:
        InputError: naming the file and the key.
    """
    path, step = folder / STATE, step_of(folder)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not JSON") from None
    if not isinstance(values, dict) or values.get("global_step") != step:
        raise InputError(f"{path}: expected the state of step {step}")
    try:
        state = _State.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{path}: {first_mistake(error)}; {_GO_BACK}") from None
    for name in values.keys() - {field.name for field in fields(TrainerState)}:
        raise InputError(f"{path}: {name!r}: Trainer's state has no such key; {_GO_BACK}")
    logged = [entry.step for entry in state.log_history if "loss" in entry.model_fields_set]
    last = max((entry.step for entry in state.log_history), default=0)
    if logged != list(range(1, step + 1)) or last > step:
        raise InputError(f"{path}: log_history: expected the steps 1 to {step}; {_GO_BACK}")
    best = best_of(folder)
    if (state.best_global_step or None) != best or (best is None) != (state.best_metric is None):
        raise InputError(f"{path}: best_global_step: expected {best}, as in {SEAL}; {_GO_BACK}")


def _check_files(folder: Path) -> None:
    """Refuse what no training puts into a checkpoint, and libraries would load from there.

    Raises:
        InputError: naming the file.
    """
    known = {STATE, ADAPTER, OPTIMIZER, SCHEDULER, SEAL, "adapter_config.json", "README.md"}
    known |= {SINGLE, "config.json"}
    for path in sorted(folder.iterdir()):
        if path.name not in known and not path.name.startswith("."):
            raise InputError(f"{path}: is no part of a checkpoint; take it away")


def _check_adapter(folder: Path, model: Any) -> None:
    """Refuse weights that are not this model's, by name and shape and type, or are not finite.

    Raises:
        InputError: naming the file and the tensor.
    """
    whole = not isinstance(model, PeftModel)
    path = folder / (SINGLE if whole else ADAPTER)
    if not path.is_file():
        raise InputError(f"{folder}: has no {path.name}")
    read_header(path)
    if whole:
        # Of weights that two modules share one name is kept, as the model saves them.
        wanted = {name: p.detach() for name, p in model.named_parameters()}
    else:
        wanted = get_peft_model_state_dict(
            model, state_dict=adapter_state(model), save_embedding_layers=False
        )
    tensors = load_file(path)
    other = "model" if whole else "adapter"
    for name in sorted(wanted.keys() ^ tensors.keys()):
        what = "has no" if name in wanted else f"belongs to another {other}: it has"
        raise InputError(f"{path}: {what} {name}; {_GO_BACK}")
    for name, numbers in tensors.items():
        _check_numbers(f"{path}: {name}", numbers, wanted[name])


def check_optimizer(
    folder: Path, optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LambdaLR
) -> None:
    """Refuse moments and rates that are not those of this training after the checkpoint's steps.

    Args:
        folder: The checkpoint.
        optimizer: The AdamW that is to go on, as it begins.
        scheduler: Its learning rates, as they begin.

    Raises:
        InputError: naming the file and what is wrong in it.
    """
    step, path = step_of(folder), folder / SCHEDULER
    rates = [
        base * rate(step)
        for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    wanted = {"base_lrs": scheduler.base_lrs, "last_epoch": step, "_step_count": step + 1}
    wanted |= {"_last_lr": rates, "lr_lambdas": [{}] * len(rates)}
    _check_settings(str(path), _load(path), wanted)

    path = folder / OPTIMIZER
    fresh, stored = optimizer.state_dict()["param_groups"], _load(path)
    groups, moments = stored.get("param_groups"), stored.get("state")
    if not isinstance(groups, list) or len(groups) != len(fresh) or not isinstance(moments, dict):
        raise InputError(f"{path}: is not this training's optimizer; {_GO_BACK}")
    for group, own, rate in zip(groups, fresh, rates, strict=True):
        _check_settings(str(path), group, {key: own[key] for key in _SETTINGS} | {"lr": rate})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in moments.items():
        if type(index) is not int or index not in range(len(parameters)):
            raise InputError(f"{path}: state {index}: belongs to no parameter; {_GO_BACK}")
        if not isinstance(values, dict) or values.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise InputError(f"{path}: state {index}: is not AdamW's; {_GO_BACK}")
        number, where = parameters[index], f"{path}: state {index}"
        _check_numbers(f"{where}: step", values["step"], torch.tensor(0.0))
        if not 1 <= values["step"] <= step:
            raise InputError(f"{where}: step: expected 1 to {step}; {_GO_BACK}")
        for name in ("exp_avg", "exp_avg_sq"):
            _check_numbers(f"{where}: {name}", values[name], number)
        if bool((values["exp_avg_sq"] < 0).any()):
            raise InputError(f"{where}: exp_avg_sq: squares below 0; {_GO_BACK}")


def _load(path: Path) -> dict[str, Any]:
    """Return what a file of numbers and settings holds, without running any code in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > path.stat().st_size:  # torch packs nothing
            raise InputError(f"{path}: is a packed file, which torch does not write; {_GO_BACK}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: is missing, so nothing can go on from it; {_GO_BACK}") from None
    except zipfile.BadZipFile:
        raise InputError(f"{path}: not a file that torch wrote; {_GO_BACK}") from None
    except pickle.UnpicklingError:
        raise InputError(
            f"{path}: is more than numbers, and was not loaded: it could have run code; {_GO_BACK}"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read: {first_line(error)}; {_GO_BACK}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a table; {_GO_BACK}")
    return content


def _check_settings(where: str, stored: Any, wanted: dict[str, Any]) -> None:
    """Refuse a table in which a value is not the wanted one; another libm may round otherwise."""
    for key, value in wanted.items():
        if not _same(stored.get(key) if isinstance(stored, dict) else None, value):
            raise InputError(f"{where}: {key}: expected {value}; {_GO_BACK}")


def _same(stored: Any, wanted: Any) -> bool:
    if type(stored) is not type(wanted):
        return False
    if isinstance(wanted, list | tuple):
        return len(stored) == len(wanted) and all(map(_same, stored, wanted))
    return math.isclose(stored, wanted) if isinstance(wanted, float) else bool(stored == wanted)


def _check_numbers(where: str, stored: Any, wanted: torch.Tensor) -> None:
    """Refuse what is not a plain tensor like another one, or is not finite."""
    if type(stored) is not torch.Tensor or stored.layout != torch.strided or stored.is_quantized:
        raise InputError(f"{where}: expected a tensor; {_GO_BACK}")
    if stored.shape != wanted.shape or stored.dtype != wanted.dtype or stored.is_meta:
        raise InputError(
            f"{where}: {_described(stored)} found, {_described(wanted)} expected; {_GO_BACK}"
        )
    if not bool(torch.isfinite(stored).all()):
        raise InputError(f"{where}: has numbers that are not finite; {_GO_BACK}")


def _described(numbers: torch.Tensor) -> str:
    return f"{str(numbers.dtype).removeprefix('torch.')} {list(numbers.shape)}"
