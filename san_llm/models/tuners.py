"""Any tuner of PEFT by its ``peft_type``: what a recipe says of one, checked and made its config.

PEFT's config classes take any value, and its models fail on some. So a tuner is also tried on a
model without numbers (``on_meta``), before any weights are read.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from san_llm.errors import InputError, did_you_mean, first_line, not_one_of
from san_llm.recipe.schema import PeftMethod
from san_llm.san.options import PEFT_NOTES

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

# Tuners that cannot run as all others do here, and why.
REFUSED = {
    "ADALORA": "it wants to be told of every step, to take ranks away; lora keeps its own",
    "LILY": "what it answers to a row depends on the other rows of the batch",
    "POLY": "it wants the number of a task with every row",
    "SAN": "write method.name: san",
    "SHADOW": "its own network reads packed rows as one text",
    "XLORA": "it mixes adapters that were trained before",
}
# Those that compute over weights in 4 and 8 bits what they do over the numbers that these stand
# for, as a test holds. Others fail there, or take the codes for numbers without a word.
OVER_BITS = {
    *("BEFT", "BOFT", "C3A", "FOURIERFT", "GRALORA", "HIRA", "IA3", "LN_TUNING", "LORA", "MISS"),
    *("PVERA", "RANDLORA", "ROAD", "SHIRA", "TRAINABLE_TOKENS", "VBLORA", "VERA", "WAVEFT"),
}
# Tuners that PEFT merges on some models only.
PARTLY_MERGED = {"BEFT": "`merge` refuses it where a Linear that it is on has no bias"}


def tuner_config(method: PeftMethod, model_type: str = "llama") -> PeftConfig:
    """Return the config of a recipe's ``method.config``, on a model of this family.

    Raises:
        InputError: when PEFT has no such tuner or option, refuses a value, or the tuner cannot run
            here.
    """
    made = _class(method)
    options = method.options
    known = sorted({field.name for field in fields(made)} - PEFT_NOTES)
    for key in options:
        if key not in known:
            near = did_you_mean(key, known) or f": known are {', '.join(known)}"
            raise InputError(f"method.config.{key}: no option of {method.peft_type}{near}")
    if method.target_modules is not None:
        if "target_modules" not in known:
            raise InputError(f"method.target_modules: {method.peft_type} has none")
        if targets := method.targets(model_type):
            options["target_modules"] = targets
    try:
        config: PeftConfig = made(task_type="CAUSAL_LM", **options)
    except Exception as error:  # of whatever kind: values are looked at by nobody else
        raise _refusal(method, error) from error
    return config


def _class(method: PeftMethod) -> Any:
    """Return PEFT's config class of a tuner that can run here."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    name = method.peft_type
    tuners = {
        kind.value
        for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()
        if hasattr(tuner, "merge_and_unload")  # the others put tokens of their own before a text
    }
    usable = sorted(tuners - REFUSED.keys())
    if name in REFUSED:
        raise InputError(f"method.config.peft_type {name}: {REFUSED[name]}")
    if name not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise InputError(f"method.config.peft_type: {not_one_of(name, usable)}")
    if name not in usable:
        raise InputError(
            f"method.config.peft_type {name}: it puts a prompt of its own before a text, and rows "
            "are packed behind one another here; use a tuner of weights or features"
        )
    return PEFT_TYPE_TO_CONFIG_MAPPING[name]


def check_bits(method: PeftMethod, bits: str | None) -> None:
    """Refuse a tuner that does not read the weights of a quantized base for what they are.

    Args:
        method: The tuner.
        bits: In which bits the base is trained over, or None.

    Raises:
        InputError: naming those that do.
    """
    if bits is not None and method.peft_type not in OVER_BITS:
        raise InputError(
            f"method.config.peft_type {method.peft_type}: does not read a base in {bits}; those "
            f"that do are {', '.join(sorted(OVER_BITS))}"
        )


def _refusal(method: PeftMethod, error: Exception) -> InputError:
    return InputError(
        f"method.config: PEFT does not take it as {method.peft_type}: {first_line(error)}"
    )


def put_on(model: Any, method: PeftMethod, **how: Any) -> PeftModel:
    """Return a base with a fresh adapter of a tuner on it.

    Args:
        model: The base.
        method: The tuner.
        how: Goes to PEFT's ``get_peft_model``.

    Raises:
        InputError: when the tuner does not fit, trains nothing, or would train in 16 bits.
    """
    from peft import get_peft_model

    config = tuner_config(method, model.config.model_type)
    try:
        adapted: PeftModel = get_peft_model(model, config, **how)
    except Exception as error:  # as in tuner_config
        if isinstance(error, InputError) or _needs_numbers(error, model):
            raise
        raise _refusal(method, error) from error
    trained = {p.dtype for p in adapted.parameters() if p.requires_grad}
    if not trained:
        raise InputError(f"method.config: {method.peft_type} trains nothing so")
    if any(dtype.itemsize < 4 for dtype in trained):
        raise InputError(
            f"method.config: {method.peft_type} trains numbers in the base's 16 bits, where small "
            "steps of AdamW are lost: set base.dtype to float32"
        )
    return adapted


def _needs_numbers(error: Exception, model: Any) -> bool:
    """Whether a tuner has failed on a model without numbers, and only on that."""
    without = model.device.type == "meta"
    return without and (isinstance(error, NotImplementedError) or "meta" in str(error))


def on_meta(method: PeftMethod, config: Any, dtype: str) -> PeftModel | None:
    """Return a model of this config without numbers, with a tuner on it.

    Args:
        method: The tuner.
        config: As transformers has it.
        dtype: That of the base.

    Returns:
        None of a tuner that wants the base's numbers.

    Raises:
        InputError: as :func:`put_on`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.requires_grad_(False)
    try:
        return put_on(model, method, low_cpu_mem_usage=True)
    except InputError:
        raise
    except Exception:
        return None
