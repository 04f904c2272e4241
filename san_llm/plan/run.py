"""What a recipe will train, in how many steps and how much memory: told before anything is loaded.

Config files and rows are read, no weights, and torch is not imported unless the rows are to be
tokenized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, Any

from san_llm.architectures.lookup import is_known
from san_llm.architectures.sizes import shape_of
from san_llm.data.split import count_rows, refuse_no_rows
from san_llm.errors import InputError
from san_llm.launch.engine import check_engine
from san_llm.models.locate import Bits, stored_bits
from san_llm.plan.bases import config_of
from san_llm.plan.memory import (
    Device,
    Setting,
    full_batch,
    graph_of,
    memory,
    traffic,
)
from san_llm.plan.planned import Plan, Seen, fits
from san_llm.plan.request import PlanRequest, bytes_of, find_device
from san_llm.recipe.doubts import doubts
from san_llm.recipe.read import given_keys, load_recipe
from san_llm.recipe.schema import (
    AdapterMethod,
    Base,
    FullMethod,
    LoraMethod,
    PeftMethod,
    Recipe,
    SanMethod,
    Training,
    check_learnable,
    micro_batch,
    refuse_bits,
)
from san_llm.recipe.shipped import find_recipe
from san_llm.recipe.steps import steps_of
from san_llm.san.measured import form_of, measured_graph

if TYPE_CHECKING:
    from san_llm.data.inspect import Inspection


FULL = "full fine-tuning"


@dataclass(frozen=True)
class Planned:
    """What a request came to.

    Attributes:
        plan: The run as it would be.
        limit: Bytes that a device has, if that was asked.
        inspected: What tokenizing the rows has shown, if that was asked.
    """

    plan: Plan
    limit: int | None
    inspected: Inspection | None

    @property
    def fits(self) -> bool:
        """Whether the recipe's method needs no more than the limit."""
        return self.limit is None or fits(self.plan, self.limit)


def plan(request: PlanRequest) -> Planned:
    """Return what a request comes to.

    Raises:
        InputError: when a recipe, a size, a device or a row cannot be right; see :func:`make_plan`.
    """
    limit = None if request.memory is None else bytes_of(request.memory)
    device = find_device(request.device)
    file, overrides = find_recipe(request.recipe), list(request.overrides)
    recipe = load_recipe(file, overrides)
    check_learnable(recipe)
    inspected = seen = None
    if request.data:
        at_once = micro_batch(recipe.training, request.devices)
        refuse_no_rows(recipe.data)  # before torch is loaded
        from san_llm.data.inspect import inspect_recipe
        from san_llm.plan.largest import look_at

        inspected = inspect_recipe(recipe)
        seen = look_at(recipe, at_once)
    given = given_keys(file, overrides)
    run_plan = make_plan(recipe, given, device, request.devices, request.sharded, seen)
    return Planned(run_plan, limit, inspected)


def make_plan(
    recipe: Recipe,
    given: set[str],
    device: Device,
    devices: int = 1,
    sharded: bool = False,
    seen: Seen | None = None,
) -> Plan:
    """Return the plan of a run.

    Args:
        recipe: What would be run.
        given: The keys that are no defaults.
        device: The kind of device it would run on.
        devices: On how many of them.
        sharded: Whether they share the base (FSDP2).
        seen: What tokenizing the rows has found (``plan.largest``); else they are counted, and
            taken to be as long as the cutoff and to share nothing.

    Raises:
        InputError: when the base is not known or not supported, a row is wrong, or devices cannot
            work together as asked.
    """
    config, config_from = config_of(recipe.base)
    known = is_known(config["model_type"])
    if known:
        shape = shape_of(config)
    else:
        from san_llm.plan.faked import fake, faked_shape

        shape = faked_shape(config)
    method, training = recipe.method, recipe.training
    method.targets(config["model_type"])  # refuses what no such model has
    bits, double_quant = _bits(recipe.base, config)
    if sharded:
        _check_sharded(recipe, devices, bits)
    at_once, looked = micro_batch(training, devices), seen is not None
    rows, missing = count_rows(recipe.data, training.seed) if seen is None else (seen.rows, None)
    if seen is None:
        full = full_batch(at_once, recipe.data.cutoff, training.packing and known)
        seen = Seen(rows, full, full)
    steps, epochs = _steps(training, rows)
    if isinstance(method, FullMethod):
        refuse_bits(bits, recipe.base.model)
    adapting = None if isinstance(method, FullMethod) else method
    measured = None
    if isinstance(method, PeftMethod):
        from san_llm.models.tuners import check_bits
        from san_llm.plan.measured import measure

        check_bits(method, bits)
        measured = measure(method, config, recipe.base.dtype) if known else None
    setting = Setting(
        shape=shape,
        dtype=recipe.base.dtype,
        bits=bits,
        double_quant=double_quant,
        method=adapting,
        batch=seen.batch_for(adapting),
        checkpointing=training.gradient_checkpointing,
        device=device,
        devices=devices,
        sharded=sharded,
        measured=measured,
    )
    lora = LoraMethod(name="lora")
    beside: dict[str, AdapterMethod | None] = {_title(method): adapting}
    beside.setdefault(_title(lora), lora)  # the recipe's own is of other modules, perhaps
    beside.setdefault(FULL, None)
    settings = {}
    for name, compared in beside.items():
        batch = seen.batch_for(compared)
        own = compared is adapting
        faked = None
        if not known:
            try:
                faked = fake(config, compared, recipe.base.dtype, batch)
            except InputError:
                if own:
                    raise
                continue  # a method that was not asked for need not fit
        settings[name] = replace(
            setting,
            method=compared,
            batch=batch,
            measured=measured if own else None,
            faked=faked,
        )
    setting = settings[_title(method)]
    return Plan(
        recipe=recipe,
        given=frozenset(given),
        config_from=config_from,
        graph=graph_of(shape, method) if isinstance(method, SanMethod) else None,
        form=_form(method, config) if isinstance(method, SanMethod) else None,
        trained=setting.trained,
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
        memory={name: memory(compared) for name, compared in settings.items()},
        traffic=traffic(setting, training.batch_size // (at_once * devices)),
        doubts=(*doubts(recipe, rows), *(() if looked else _of_the_context(recipe, config))),
    )


def _form(method: SanMethod, config: Mapping[str, Any]) -> str:
    """Return in which form SAN is computed on a base."""
    if is_known(config["model_type"]):
        return method.form
    return form_of(measured_graph(config, method.options), method.options)


def _bits(base: Base, config: Mapping[str, Any]) -> tuple[Bits | None, bool]:
    """Return in which bits a base is trained over, and whether their scales are quantized, too."""
    bits = base.quantization or stored_bits(base.model, config)
    if base.quantization is None and bits:
        return bits, bool(config["quantization_config"].get("bnb_4bit_use_double_quant"))
    return bits, bool(base.double_quant)


def _check_sharded(recipe: Recipe, devices: int, bits: Bits | None) -> None:
    check_engine("FSDP2", recipe)
    if devices == 1:
        raise InputError("--sharded: one device has nobody to share with; add --devices N")
    if bits is not None:
        raise InputError(
            f"base.model: {recipe.base.model} is stored quantized, which FSDP2 cannot shard; "
            "leave --sharded out"
        )


def _steps(training: Training, rows: int | None) -> tuple[int | None, float | None]:
    """Return the optimizer steps, and the epochs that they come to, where they are known."""
    if rows is None:
        return training.max_steps, None
    an_epoch = ceil(rows / training.batch_size)
    steps = steps_of(training, rows)
    return steps, steps / an_epoch


def _of_the_context(recipe: Recipe, config: Mapping[str, Any]) -> list[str]:
    """Return what a cutoff beyond the model's context lets in."""
    context, cutoff = config.get("max_position_embeddings"), recipe.data.cutoff
    if not isinstance(context, int) or cutoff <= context:
        return []
    return [
        f"data.cutoff is {cutoff:,}, the model's context {context:,}: train refuses longer rows; "
        "--data counts them"
    ]


def _title(method: Any) -> str:
    carrier = getattr(method, "carrier", "scale")
    if method.name == "full":
        return FULL
    names = {"san": "SAN", "lora": "LoRA", "dora": "DoRA", "ia3": "IA3"}
    name = names.get(method.name, method.kind.upper())
    name += "" if carrier == "scale" else f" {carrier}"
    rank = getattr(method, "rank", None)
    return name if rank is None else f"{name} r{rank}"
