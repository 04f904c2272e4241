"""SanConfig: the options of a SAN adapter, as PEFT saves them in ``adapter_config.json``."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from peft import PeftConfig
from peft.utils import PeftType

from san_llm.errors import InputError, check_one_of
from san_llm.san.graph import (
    CARRIERS,
    EMBEDDING,
    FORMS,
    KINDS,
    MODES,
    PARENTS,
    TARGETS,
    check_combination,
    check_targets,
)


def _extend_peft_type() -> None:
    # PeftType is a closed enum, and PEFT's registry takes only its members.
    if "SAN" in PeftType.__members__:
        return
    member = str.__new__(PeftType, "SAN")
    member._name_ = member._value_ = "SAN"
    PeftType._member_map_["SAN"] = PeftType._value2member_map_["SAN"] = member
    PeftType._member_names_.append("SAN")
    type.__setattr__(PeftType, "SAN", member)


_extend_peft_type()


def _number(found: object) -> bool:
    return isinstance(found, (int, float)) and not isinstance(found, bool)


@dataclass
class SanConfig(PeftConfig):
    """The options of a SAN adapter (arXiv:2409.06706).

    Every target Linear computes ``y = gamma * (W @ (s * x) + b) + beta`` where ``gamma`` (d_out,)
    is trained and ``s`` (d_in,) is the gamma of the Linear that feeds it.

    Attributes:
        target_modules: Names of the projections to adapt, such as the seven of a LLaMA block; or
            one regular expression over full module names. None or ``"all-linear"``: all of the
            model's, which are then listed here.
        carrier: What holds the neuron scale. ``scale``: a vector of its own; ``lora``, ``dora``:
            the row norms of a low-rank adapted weight, see ``san.carriers``.
        mode: ``both`` (the paper's method), ``neuron`` (features only) or ``synapse`` (the scale
            acts only through the columns of the next projection).
        shift: Also train a neuron shift beta (d_out,), starting at 0.
        links: The kinds of propagation to switch on: ``attention``, ``mlp``, ``residual``.
        adapt_embedding: Also train a scale on the token embedding's features; it feeds q, k and v
            of the first block.
        modules_to_save: Names of modules to train and save whole beside the adapter, as in PEFT.
        r: Rank of the ``lora`` and ``dora`` carriers.
        lora_alpha: Their numerator: the low-rank product counts ``lora_alpha / r``.
        lora_dropout: Dropout on the input of their low-rank path.
        form: How it is computed, never what. ``lean``: in about the memory of the frozen base, see
            ``san.fold``; ``plain``: as the formula stands.

    Raises:
        InputError: on an unknown option, naming the known ones.
    """

    target_modules: list[str] | str | None = field(default=None)
    carrier: str = field(default="scale")
    mode: str = field(default="both")
    shift: bool = field(default=False)
    links: tuple[str, ...] | list[str] = field(default=KINDS)
    adapt_embedding: bool = field(default=False)
    modules_to_save: list[str] | None = field(default=None)
    r: int = field(default=8)
    lora_alpha: float = field(default=16.0)
    lora_dropout: float = field(default=0.0)
    form: str = field(default="lean")

    def __post_init__(self) -> None:
        """Check every option and set PEFT's type."""
        super().__post_init__()
        self.peft_type = PeftType["SAN"]
        self._check_targets()
        self._check_saved()
        check_one_of("carrier", self.carrier, CARRIERS)
        check_one_of("mode", self.mode, MODES)
        check_one_of("form", self.form, FORMS)
        if not isinstance(self.r, int) or self.r < 1:
            raise InputError(f"r: expected a rank of 1 or more, found {self.r!r}")
        if not _number(self.lora_alpha) or self.lora_alpha <= 0:
            raise InputError(f"lora_alpha: expected a number above 0, found {self.lora_alpha!r}")
        if not _number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise InputError(f"lora_dropout: expected 0 <= p < 1, found {self.lora_dropout!r}")
        for name in ("shift", "adapt_embedding"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}: expected true or false, found {getattr(self, name)!r}")
        if not isinstance(self.links, (list, tuple, set, frozenset)):
            raise InputError(f"links: expected a list such as {list(KINDS)}, found {self.links!r}")
        for kind in self.links:
            check_one_of("links", kind, KINDS)
        self.links = [kind for kind in KINDS if kind in self.links]
        check_combination(self.carrier, self.mode, self.shift, self.links)

    def _check_targets(self) -> None:
        targets = self.target_modules
        if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
            self.target_modules = None
            return
        if isinstance(targets, str):
            if targets in PARENTS:
                raise InputError(
                    f"target_modules: a string is a regular expression over full module names; "
                    f"write [{targets!r}] for the name of a projection"
                )
            try:
                re.compile(targets)
            except re.error as error:
                raise InputError(
                    f"target_modules: {targets!r} is not a regular expression: {error}"
                ) from None
        elif isinstance(targets, (list, tuple, set, frozenset)):
            check_targets(targets)
            # A set has no order of its own, and the saved file should not depend on a hash seed.
            targets = sorted(targets) if isinstance(targets, (set, frozenset)) else list(targets)
        else:
            raise InputError(
                f"target_modules: expected a list such as {list(TARGETS[:2])}, found {targets!r}"
            )
        self.target_modules = targets

    def _check_saved(self) -> None:
        saved = self.modules_to_save
        if saved is not None and not isinstance(saved, (list, tuple, set, frozenset)):
            raise InputError(
                f"modules_to_save: expected a list such as ['lm_head'], found {saved!r}"
            )
        targets = list(PARENTS) if self.target_modules is None else self.target_modules
        adapted = [] if isinstance(targets, str) else list(targets)
        adapted += [EMBEDDING] if self.adapt_embedding else []
        for name in adapted:
            if name in (saved or ()):
                raise InputError(
                    f"modules_to_save: {name!r} is also adapted; a module is either scaled or "
                    "trained and saved whole"
                )
