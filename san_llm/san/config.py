"""SanConfig: the options of a SAN adapter, as PEFT saves them in ``adapter_config.json``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from peft import PeftConfig
from peft.utils import PeftType

from san_llm.errors import InputError, did_you_mean
from san_llm.san.graph import CARRIERS, KINDS, MODES, TARGETS, check_targets


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


def _one_of(field_name: str, found: object, known: Iterable[str]) -> None:
    if found not in tuple(known):
        raise InputError(
            f"{field_name}: {found!r} is not one of {', '.join(known)}"
            f"{did_you_mean(str(found), known)}"
        )


@dataclass
class SanConfig(PeftConfig):
    """The options of a SAN adapter (arXiv:2409.06706).

    Every target Linear computes ``y = gamma * (W @ (s * x) + b) + beta`` where ``gamma`` (d_out,)
    is trained and ``s`` (d_in,) is the gamma of the Linear that feeds it.

    Attributes:
        target_modules: Names of the projections to adapt, out of the seven of a LLaMA block; or one
            regular expression over full module names; or ``"all-linear"``. Default: all seven.
        carrier: What holds the neuron scale. ``scale``: a vector of its own.
        mode: ``both`` (the paper's method), ``neuron`` (features only) or ``synapse`` (the scale
            acts only through the columns of the next projection).
        shift: Also train a neuron shift beta (d_out,), starting at 0.
        links: The kinds of propagation to switch on: ``attention``, ``mlp``, ``residual``.
        adapt_embedding: Also train a scale on the token embedding's features; it feeds q, k and v
            of the first block.

    Raises:
        InputError: on an unknown option, naming the known ones.
    """

    target_modules: list[str] | str | None = field(default=None)
    carrier: str = field(default="scale")
    mode: str = field(default="both")
    shift: bool = field(default=False)
    links: tuple[str, ...] | list[str] = field(default=KINDS)
    adapt_embedding: bool = field(default=False)

    def __post_init__(self) -> None:
        """Check every option and set PEFT's type."""
        super().__post_init__()
        self.peft_type = PeftType["SAN"]
        if self.target_modules is None:
            self.target_modules = list(TARGETS)
        elif not isinstance(self.target_modules, str):
            self.target_modules = list(self.target_modules)
            check_targets(self.target_modules)
        _one_of("carrier", self.carrier, CARRIERS)
        _one_of("mode", self.mode, MODES)
        if isinstance(self.links, str):
            raise InputError(f"links: expected a list such as {list(KINDS)}, found {self.links!r}")
        for kind in self.links:
            _one_of("links", kind, KINDS)
        self.links = [kind for kind in KINDS if kind in self.links]
        if self.mode == "synapse" and not self.links:
            raise InputError("mode 'synapse' without links trains nothing: switch a link kind on")
