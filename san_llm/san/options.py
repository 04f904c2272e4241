"""The options of a SAN adapter, and what cannot be one: checked here, wherever they come from.

A recipe, PEFT's config object and an ``adapter_config.json`` each make one :class:`Options`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from san_llm.architectures.decoders import EMBEDDING, PARENTS, TARGETS
from san_llm.architectures.entry import KINDS
from san_llm.errors import InputError, check_one_of

CARRIERS: tuple[str, ...] = ("scale", "lora", "dora")
FORMS: tuple[str, ...] = ("lean", "plain")
MODES: tuple[str, ...] = ("both", "neuron", "synapse")
WIRINGS: tuple[str, ...] = ("carried", "authors")
FREE = "free"  # instead of kinds of links: no link, a column scale of its own for every target
# The plain ViTs: blocks in one row behind a convolution over patches, as in the authors' code.
AUTHORS: tuple[str, ...] = ("vit", "deit", "dinov2")
MOST = 2**20  # ranks, or the numerator of a low-rank product: more than any model is wide
# PEFT's names of fields, where they are not ours.
PEFT_NAMES = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}


@dataclass(frozen=True)
class Options:
    """What kind of adapter is put on a model.

    Attributes:
        target_modules: Names of the modules to adapt; or one regular expression over full names;
            None for all projections of the model.
        carrier: What holds the neuron scale: ``scale``, ``lora`` or ``dora``.
        mode: Where the scale acts: ``both``, ``neuron`` or ``synapse``.
        shift: Whether a neuron shift is trained, too.
        links: The kinds of propagation that are switched on; or the word ``free``: none is, and
            every target trains a column scale of its own.
        adapt_embedding: Whether the embedding's features get a scale, too.
        wiring: Who feeds whom: ``carried`` as in a LLaMA, or as in the ``authors``' code for ViT:
            the patches' scale feeds q, k and v of every block, and nothing the attention's output.
        train_norms: Whether the norms of the adapted blocks, and those outside of all blocks, are
            trained, too.
        modules_to_save: Names of modules that are trained and saved whole.
        rank: The rank of the low-rank carriers.
        alpha: The numerator of their factor: ``c = alpha / rank``.
        dropout: The dropout on the input of their low-rank path.
        form: ``lean`` lets neighbours take over scaling where they can, see ``san.lean``; or
            ``plain``.
        graph: The measured propagation graph that the adapter was made with, as JSON; None where
            the family's table says who feeds whom.
        table: That table's rows, as the adapter was made with them; None: this version's.

    Raises:
        InputError: naming the option that is none, or which do not go together.
    """

    target_modules: tuple[str, ...] | str | None = None
    carrier: str = "scale"
    mode: str = "both"
    shift: bool = False
    links: tuple[str, ...] | str = KINDS
    adapt_embedding: bool = False
    wiring: str = "carried"
    train_norms: bool = False
    modules_to_save: tuple[str, ...] | None = None
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    form: str = "lean"
    graph: Mapping[str, Any] | None = None
    table: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Check every option, and bring targets and links into one order."""
        self._set("target_modules", _targets(self.target_modules))
        self._set("modules_to_save", _names("modules_to_save", self.modules_to_save, "lm_head"))
        check_one_of("carrier", self.carrier, CARRIERS)
        check_one_of("mode", self.mode, MODES)
        check_one_of("form", self.form, FORMS)
        check_one_of("wiring", self.wiring, WIRINGS)
        if type(self.rank) is not int or not 1 <= self.rank <= MOST:
            raise InputError(f"r: expected a rank from 1 to {MOST:,}, found {self.rank!r}")
        if not _is_number(self.alpha) or not 0 < self.alpha <= MOST:
            raise InputError(
                f"lora_alpha: expected a number above 0, up to {MOST:,}, found {self.alpha!r}"
            )
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise InputError(f"lora_dropout: expected 0 <= p < 1, found {self.dropout!r}")
        for name in ("shift", "adapt_embedding", "train_norms"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}: expected true or false, found {getattr(self, name)!r}")
        try:
            check_links(self.links)
        except InputError as error:
            raise InputError(f"links: {error}") from None
        for kind in self.kinds:
            check_one_of("links", kind, KINDS)
        if not self.free:
            self._set("links", tuple(kind for kind in KINDS if kind in self.links))
        self._check_together()
        if self.wiring == "authors":
            self._set("adapt_embedding", True)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # as dataclasses do where they are frozen

    def _check_together(self) -> None:
        if self.free and self.mode != "both":
            raise InputError(
                f"links: {FREE} trains a row and a column scale of each target, which is mode "
                f"'both'; mode {self.mode!r} has only one of them"
            )
        if self.free and self.wiring != "carried":
            raise InputError(f"links: {FREE} propagates nothing, so that it has no wiring")
        if self.mode == "synapse" and not self.links:
            raise InputError("mode 'synapse' without links trains nothing: switch a link kind on")
        if self.shift and self.carrier != "scale":
            raise InputError(
                f"shift: the {self.carrier} carrier has no neuron shift; the scale carrier does"
            )
        if self.carrier == "scale":
            self._tell_unused()
        targets = PARENTS if self.target_modules is None else self.target_modules
        adapted = [] if isinstance(targets, str) else list(targets)
        adapted += [EMBEDDING] if self.adapt_embedding else []
        for name in adapted:
            if name in (self.modules_to_save or ()):
                raise InputError(
                    f"modules_to_save: {name!r} is also adapted; a module is either scaled or "
                    "trained and saved whole"
                )

    def _tell_unused(self) -> None:
        # Not refused: an adapter that was saved so is as good as any.
        for field in fields(self):
            given = getattr(self, field.name)
            if field.name in PEFT_NAMES and given != field.default:
                warnings.warn(
                    f"{PEFT_NAMES[field.name]}={given}: does nothing, as the scale carrier has no "
                    "matrices; carrier='lora' and carrier='dora' do",
                    stacklevel=2,
                )

    @property
    def scaling(self) -> float:
        """The factor c of the low-rank product."""
        return self.alpha / self.rank

    @property
    def free(self) -> bool:
        """Whether every target trains a column scale of its own, and nothing is propagated."""
        return self.links == FREE

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of propagation that are switched on."""
        return () if isinstance(self.links, str) else tuple(self.links)

    @property
    def lean(self) -> bool:
        """Whether neighbours take over scaling where they can."""
        return self.form == "lean"


# Of a saved adapter, where PEFT alone says no more than KeyError: 'SAN'.
HOW_TO_LOAD = "pip install san-llm; then, in Python, before PEFT loads this: import san_llm"
# What PEFT notes in an adapter_config.json beside a tuner's options.
PEFT_NOTES = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version"),
    *("revision", "task_type"),
}
# What an adapter_config.json of SAN may hold: PEFT's own keys, and the options.
SAVED_KEYS = {
    *PEFT_NOTES,
    "how_to_load",
    *(PEFT_NAMES.get(field.name, field.name) for field in fields(Options)),
}


def options_of(source: Any) -> Options:
    """Return the options that an object has under PEFT's names or ours, or a mapping.

    What is absent, or None in a mapping, as in an ``adapter_config.json`` of an older version, is
    at its default.

    Raises:
        InputError: naming the option that is none.
    """
    values = {}
    for field in fields(Options):
        names = (PEFT_NAMES.get(field.name, field.name), field.name)
        if isinstance(source, Mapping):
            given = next((source[name] for name in names if source.get(name) is not None), None)
            if given is not None:
                values[field.name] = given
        else:
            name = next((name for name in names if hasattr(source, name)), None)
            if name is not None:
                values[field.name] = getattr(source, name)
    return Options(**values)


def check_wiring(options: Options, model_type: object) -> None:
    """Refuse the authors' wiring for a model that their code does not know.

    Args:
        options: Of the adapter; one that has its graph has its wiring in it.
        model_type: The model's type.

    Raises:
        InputError: naming it and those that are known.
    """
    if options.wiring == "authors" and options.graph is None and model_type not in AUTHORS:
        raise InputError(
            f"wiring 'authors': is that of the authors' code for {', '.join(AUTHORS)}, and a "
            f"{model_type} has another block: take wiring 'carried'"
        )


def saved_options(values: Mapping[str, Any]) -> Options:
    """Return the options that an ``adapter_config.json`` holds.

    Raises:
        InputError: naming the file and the key.
    """
    try:
        return options_of(values)
    except InputError as error:
        raise InputError(f"adapter_config.json: {error}") from None


def check_targets(targets: Collection[str]) -> None:
    """Refuse targets that are no names; whether a model has them is for the model to say.

    Raises:
        InputError: when there is none, or one is no text.
    """
    if not targets:
        raise InputError(f"target_modules is empty: name at least one of {', '.join(TARGETS)}")
    for target in targets:
        if not isinstance(target, str) or not target:
            raise InputError(f"target_modules: expected module names, found {target!r}")


def check_links(links: Any) -> None:
    """Refuse what is neither a list for kinds of links nor the word ``free``.

    Raises:
        InputError: saying what would be right.
    """
    if isinstance(links, (list, tuple, set, frozenset)):
        if FREE in links:
            raise InputError(f"{FREE!r} is not a kind for a list: write the word alone")
    elif links != FREE:
        found = "nothing" if links is None else repr(links)
        raise InputError(
            f"expected a list of {', '.join(KINDS)}, or the word {FREE}, found {found}"
        )


def _targets(targets: Any) -> tuple[str, ...] | str | None:
    if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
        return None
    if not isinstance(targets, str):
        names = _names("target_modules", targets, TARGETS[0])
        check_targets(names or ())
        return names
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
    return targets


def _names(option: str, value: Any, example: str) -> tuple[Any, ...] | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise InputError(f"{option}: expected a list, found {value!r}; such as [{example!r}]")
    # A set has no order of its own, and the saved file should not depend on a hash seed.
    return tuple(sorted(value) if isinstance(value, (set, frozenset)) else value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
