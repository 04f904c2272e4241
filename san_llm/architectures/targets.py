"""Which projections a method adapts, by a word instead of a list of names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from san_llm.architectures.decoders import DOWN, TARGETS, UP, K, Q, V
from san_llm.architectures.lookup import family_targets, is_known
from san_llm.errors import InputError

TargetWord = Literal["all", "published", "peft"]

# LoRA and DoRA in five, as LLM-Adapters (arXiv:2304.01933) and DoRA (arXiv:2402.09353) ran this
# protocol; IA3 in all seven, as RoAd (arXiv:2409.00119) ran it.
_FIVE = (Q, K, V, UP, DOWN)
PUBLISHED: Mapping[str, tuple[str, ...]] = {
    "san": TARGETS,
    "lora": _FIVE,
    "dora": _FIVE,
    "ia3": TARGETS,
}
ALL_LINEAR = "all-linear"  # PEFT's word for every Linear but the output head
# What PEFT takes unless told, which a test holds against PEFT's own tables. It has none for phi3.
PEFT_FEEDFORWARD = (DOWN,)  # of IA3
_PEFT_IA3 = {"llama": (K, V, DOWN), "mistral": (K, V, DOWN)}


def targets_of(
    method: str, targets: tuple[str, ...] | TargetWord, model_type: str = "llama"
) -> list[str] | str | None:
    """Return the names of the Linears of a family that a method adapts.

    Args:
        method: ``san``, ``lora``, ``dora`` or ``ia3``.
        targets: Names of projections, or a word that stands for some.
        model_type: The family. In one that the table does not know, all are PEFT's word for that,
            and those that PEFT takes are None.

    Raises:
        InputError: when a name is none of a projection, only some of the projections of one Linear
            are named, or PEFT has no choice of its own for the family.
    """
    if not is_known(model_type):
        if targets == "peft" and method != "san":
            return None
        if targets in ("all", "peft") or (targets == "published" and PUBLISHED[method] == TARGETS):
            return ALL_LINEAR
        return list(_names(method, targets, model_type))
    if targets == "peft" and method != "san" and model_type == "phi3":
        raise InputError(
            f"method.target_modules peft: PEFT has no choice of its own for a {model_type} model: "
            "take all, or a list of names"
        )
    try:
        names: list[str] = family_targets(_names(method, targets, model_type), model_type)
    except InputError as error:
        raise InputError(f"method.target_modules: {error}") from None
    return names


def _names(method: str, targets: tuple[str, ...] | TargetWord, model_type: str) -> tuple[str, ...]:
    match targets:
        case "all":
            return TARGETS
        case "published":
            return PUBLISHED[method]
        case "peft":
            if method == "ia3":
                return _PEFT_IA3.get(model_type, (Q, V, DOWN))
            return TARGETS if method == "san" else (Q, V)
        case _:
            return targets
