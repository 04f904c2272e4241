"""Which Linear feeds which: SAN's propagation map, as one table and plain Python.

The synapse scale of a Linear (the posterior) is the neuron scale of another one (the anterior).
``LINKS`` is that map for a LLaMA block, and ``FAMILIES`` says for each ``model_type`` where it is
wired otherwise; everything else here looks names up in them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from san_llm.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

Kind = Literal["attention", "mlp", "residual"]
How = Literal["as is", "repeat kv heads"]


@dataclass(frozen=True)
class Link:
    """One row of the propagation table.

    Attributes:
        kind: What joins the two ends: attention, the gated MLP, or the residual stream.
        posterior: The Linear whose columns are scaled.
        anterior: The Linear whose neuron scale is carried there.
        blocks_back: 0 when both stand in the same block, 1 when the anterior is one block earlier.
        how: How gamma (d_out of the anterior) becomes s (d_in of the posterior).
        first: What feeds the posterior where there is no earlier block.
        part: Which rows of the anterior feed it, where one Linear computes several projections;
            None for all rows.
    """

    kind: Kind
    posterior: str
    anterior: str
    blocks_back: int = 0
    how: How = "as is"
    first: str | None = None
    part: str | None = None


EMBEDDING = "embed_tokens"

# Source: arXiv:2409.06706 states the principle; the LLaMA rows are our reading of it. "attention"
# and "mlp" are exact (attention mixes tokens, never channels; SwiGLU is linear in up), "residual"
# goes through the residual stream and an RMSNorm.
LINKS: tuple[Link, ...] = (
    Link("attention", posterior="o_proj", anterior="v_proj", how="repeat kv heads"),
    Link("mlp", posterior="down_proj", anterior="up_proj"),
    Link("residual", posterior="gate_proj", anterior="o_proj"),
    Link("residual", posterior="up_proj", anterior="o_proj"),
    Link("residual", posterior="q_proj", anterior="down_proj", blocks_back=1, first=EMBEDDING),
    Link("residual", posterior="k_proj", anterior="down_proj", blocks_back=1, first=EMBEDDING),
    Link("residual", posterior="v_proj", anterior="down_proj", blocks_back=1, first=EMBEDDING),
)

# Which Linears read the output of which RMSNorm of a block.
NORMS: dict[str, tuple[str, ...]] = {
    "input_layernorm": ("q_proj", "k_proj", "v_proj"),
    "post_attention_layernorm": ("gate_proj", "up_proj"),
}

# The seven projections of a LLaMA block, in its order.
TARGETS: tuple[str, ...] = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
)


class Family(NamedTuple):
    """How the blocks of one model type are wired; each default is LLaMA's way.

    Attributes:
        links: Its propagation table.
        norms: Which Linears read the output of which RMSNorm of a block.
        norm_offset: A norm multiplies by ``norm_offset + weight``.
        fused: Linears that compute several of the seven projections, in the order of their rows.
    """

    links: tuple[Link, ...] = LINKS
    norms: Mapping[str, tuple[str, ...]] = NORMS
    norm_offset: int = 0
    fused: Mapping[str, tuple[str, ...]] = {}

    @property
    def targets(self) -> tuple[str, ...]:
        """The Linears of a block that SAN adapts, in the order of the model."""
        return tuple(dict.fromkeys(self.linear_of(name) for name in TARGETS))

    def linear_of(self, projection: str) -> str:
        """Return the Linear that computes one of the seven projections: itself, or a fused one."""
        wholes = (whole for whole, parts in self.fused.items() if projection in parts)
        return next(wholes, projection)


# In Gemma 2 and 3 the features of o and down pass a norm of their own before they join the
# residual stream (post_attention_layernorm, post_feedforward_layernorm). A norm rescales a token
# and keeps its channels apart, so the residual links stand; what gate and up read is another norm.
_GEMMA2_NORMS = {
    "input_layernorm": NORMS["input_layernorm"],
    "pre_feedforward_layernorm": NORMS["post_attention_layernorm"],
}

FAMILIES: dict[str, Family] = {
    "llama": Family(),  # Llama 1, 2 and 3, SmolLM
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),  # q and k pass a norm per head, but feed nothing
    "gemma": Family(norm_offset=1),
    "gemma2": Family(norms=_GEMMA2_NORMS, norm_offset=1),
    "gemma3_text": Family(norms=_GEMMA2_NORMS, norm_offset=1),
    "phi3": Family(
        links=(
            Link("attention", "o_proj", "qkv_proj", how="repeat kv heads", part="v_proj"),
            Link("mlp", "down_proj", "gate_up_proj", part="up_proj"),
            Link("residual", "gate_up_proj", "o_proj"),
            Link("residual", "qkv_proj", "down_proj", blocks_back=1, first=EMBEDDING),
        ),
        norms={"input_layernorm": ("qkv_proj",), "post_attention_layernorm": ("gate_up_proj",)},
        fused={
            "qkv_proj": ("q_proj", "k_proj", "v_proj"),
            "gate_up_proj": ("gate_proj", "up_proj"),
        },
    ),
}

# Families whose stock config can hold a bias on all their projections, so that a shift can merge:
# the config's flag, and the parent of the Linears that it gives a bias.
BIAS_FLAGS: dict[str, dict[str, str]] = {
    "llama": {"attention_bias": "self_attn", "mlp_bias": "mlp"},
}

PARENTS: dict[str, str] = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
    "qkv_proj": "self_attn",
    "gate_up_proj": "mlp",
}
CARRIERS: tuple[str, ...] = ("scale", "lora", "dora")
FORMS: tuple[str, ...] = ("lean", "plain")
MODES: tuple[str, ...] = ("both", "neuron", "synapse")
KINDS: tuple[Kind, ...] = ("attention", "mlp", "residual")

# The largest that a model's sizes may be; the largest models known have a hundredth of them.
SIZES = {"num_hidden_layers": 10_000, "hidden_size": 2**21, "intermediate_size": 2**24}
SIZES |= {"num_attention_heads": 2**14, "num_key_value_heads": 2**14, "head_dim": 2**16}
SIZES |= {"vocab_size": 2**26}

_LINEAR = re.compile(
    r"(?P<prefix>(?:.*\.)?)layers\.(?P<block>\d+)\.(?P<parent>self_attn|mlp)\.(?P<name>\w+_proj)"
)


def check_family(model_type: str | None) -> None:
    """Refuse a model that the propagation table does not describe.

    Raises:
        InputError: naming the supported families.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(
            f"model type {model_type!r} is not supported by SAN: its propagation map is known for "
            f"{', '.join(FAMILIES)}"
        )


def check_sizes(config: Any) -> None:
    """Refuse a config whose sizes are no sizes, before anything is counted up to them.

    Args:
        config: A ``PretrainedConfig`` or the dictionary of a ``config.json``.

    Raises:
        InputError: naming the key.
    """
    for key, largest in SIZES.items():
        value = _get(config, key)
        if value is None and key in ("num_key_value_heads", "head_dim"):
            continue
        if type(value) is not int or not 0 < value <= largest:
            raise InputError(
                f"config.json: {key}: expected a whole number from 1 to {largest:,}, found "
                f"{value!r}"
            )


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse an ``adapter_config.json`` with SAN options that are none, as ``SanConfig`` does.

    Raises:
        InputError: naming the key.
    """
    targets, links = options.get("target_modules"), options.get("links")
    named = [("carrier", CARRIERS, [options.get("carrier") or "scale"])]
    named += [("mode", MODES, [options.get("mode") or "both"])]
    for key, value in (("target_modules", targets), ("links", links)):
        if not isinstance(
            value, (list, tuple, str if key == "target_modules" else list, type(None))
        ):
            raise InputError(f"adapter_config.json: {key}: expected a list, found {value!r}")
    named += [("links", KINDS, list(links or ()))]
    for key, known, values in named:
        for value in values:
            if value not in known:
                raise InputError(
                    f"adapter_config.json: {key}: {value!r} is not one of {', '.join(known)}"
                )
    for key, kinds in (("r", (int,)), ("lora_alpha", (int, float))):
        number = options.get(key, 1)
        if type(number) not in kinds or not 0 < number <= 2**20:
            raise InputError(
                f"adapter_config.json: {key}: expected a number from 0 to {2**20:,}, found "
                f"{number!r}"
            )


def check_targets(targets: Collection[str]) -> None:
    """Refuse a target whose last name part is not a projection of any family.

    Raises:
        InputError: naming the unknown target and the nearest known one.
    """
    if not targets:
        raise InputError(f"target_modules is empty: name at least one of {', '.join(TARGETS)}")
    for target in targets:
        if not isinstance(target, str):
            raise InputError(f"target_modules: expected module names, found {target!r}")
        if target.rsplit(".", 1)[-1] not in PARENTS:
            raise InputError(
                f"target module {target!r} is not one of {', '.join(PARENTS)}"
                f"{did_you_mean(target.rsplit('.', 1)[-1], PARENTS)}"
            )


def family_targets(targets: Any, model_type: str) -> Any:
    """Return ``target_modules`` in the names of a family.

    Args:
        targets: A list of names, one regular expression, or None for all projections.
        model_type: A supported family.

    Returns:
        A regular expression as it is, or a list. Where a Linear computes several projections, it
        stands for their names if all of them are there.

    Raises:
        InputError: when only some of them are: a Linear is adapted whole.
    """
    family = FAMILIES[model_type]
    if targets is None:
        return list(family.targets)
    if isinstance(targets, str):
        return targets
    for whole, parts in family.fused.items():
        there = [part for part in parts if part in targets]
        if there and len(there) < len(parts):
            raise InputError(
                f"target module {there[0]!r} is a part of {whole!r} in a {model_type} model: name "
                f"that, or all of {', '.join(parts)}"
            )
    return list(dict.fromkeys(family.linear_of(name) for name in targets))


def check_combination(carrier: str, mode: str, shift: bool, links: Sequence[str]) -> None:
    """Refuse options that are each known but make no adapter together.

    Raises:
        InputError: saying which option to change.
    """
    if mode == "synapse" and not links:
        raise InputError("mode 'synapse' without links trains nothing: switch a link kind on")
    if shift and carrier != "scale":
        raise InputError(
            f"shift: the {carrier} carrier has no neuron shift; the scale carrier does"
        )


def link_into(
    posterior: str, kinds: tuple[str, ...] = KINDS, model_type: str = "llama"
) -> tuple[str, Link] | None:
    """Return the full name of the module that feeds ``posterior``, and the table's row.

    Args:
        posterior: A module name such as ``model.layers.3.mlp.down_proj``, with any prefix.
        kinds: The link kinds that are switched on.
        model_type: The family, whose table is read.

    Returns:
        ``(anterior name, row)``, or None where nothing feeds it or its kind is off.
    """
    match = _LINEAR.fullmatch(posterior)
    if match is None:
        return None
    for link in FAMILIES[model_type].links:
        if link.posterior != match["name"] or link.kind not in kinds:
            continue
        block = int(match["block"]) - link.blocks_back
        if block >= 0:
            parent = PARENTS[link.anterior]
            return f"{match['prefix']}layers.{block}.{parent}.{link.anterior}", link
        if link.first is not None:
            return f"{match['prefix']}{link.first}", link
    return None


class Carry(NamedTuple):
    """How gamma (d_out of the anterior) becomes s (d_in of the posterior).

    Attributes:
        start: The first row of the anterior that feeds the posterior.
        stop: The row after the last one.
        groups: How often the channels of each head are repeated: query heads per kv head, or 1.
        head_dim: Channels of one head, which are repeated together.
    """

    start: int
    stop: int
    groups: int
    head_dim: int


@dataclass(frozen=True)
class Node:
    """One adapted module: its shape, the vectors it trains and what feeds its columns.

    Attributes:
        name: The module's name in the base model.
        d_out: Rows of the weight: the size of gamma.
        d_in: Columns of the weight: the size of s (0 for the embedding).
        gamma: Whether it trains a neuron scale.
        beta: Whether it trains a neuron shift.
        anterior: The name of the module whose gamma is its synapse scale, or None for s = 1.
        link: The table's row behind ``anterior``.
        carry: How its gamma becomes the synapse scale of this one.
        carrier: What holds gamma: ``scale``, ``lora`` or ``dora``.
        rank: Of the two matrices of a low-rank carrier, else 0.
    """

    name: str
    d_out: int
    d_in: int
    gamma: bool
    beta: bool
    anterior: str | None
    link: Link | None
    carry: Carry | None = None
    carrier: str = "scale"
    rank: int = 0

    @property
    def trained(self) -> int:
        """How many numbers this module trains."""
        # Gamma is a vector of its own, or dora's magnitude; with lora it is in the matrices.
        vectors = int(self.gamma and self.carrier != "lora") + int(self.beta)
        return self.d_out * vectors + self.rank * (self.d_out + self.d_in)


@dataclass(frozen=True)
class PropagationGraph:
    """Every adapted module in order, with who feeds whom. Printing it with rich draws a tree."""

    nodes: tuple[Node, ...]

    @property
    def trained(self) -> int:
        """How many numbers the adapter trains in all."""
        return sum(node.trained for node in self.nodes)

    def __iter__(self) -> Iterator[Node]:
        """Iterate over the nodes in model order."""
        return iter(self.nodes)

    def readers(self, name: str) -> list[Node]:
        """Return the nodes whose synapse scale is the gamma of ``name``."""
        return [node for node in self.nodes if node.anterior == name]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the graph as a tree, one branch a block; blocks wired alike are drawn once."""
        from rich.tree import Tree

        tree = Tree(
            f"[bold]SAN propagation[/]  {self.trained:,} trained numbers; "
            "x [green]<- y[/]: s of x is gamma of y"
        )
        runs: list[tuple[list[str], list[str]]] = []
        for title, nodes in self._by_block().items():
            lines = [self._line(node) for node in nodes]
            if runs and runs[-1][1] == lines:
                runs[-1][0].append(title)
            else:
                runs.append(([title], lines))
        for titles, lines in runs:
            first, last = titles[0], titles[-1]
            label = first if first == last else f"{first} ... {last}  ({len(titles)} alike)"
            branch = tree.add(f"[bold]{label}[/]")
            for line in lines:
                branch.add(line)
        yield tree

    def _by_block(self) -> dict[str, list[Node]]:
        blocks: dict[str, list[Node]] = {}
        for node in self.nodes:
            match = _LINEAR.fullmatch(node.name)
            title = f"block {match['block']}" if match else node.name.rsplit(".", 1)[-1]
            blocks.setdefault(title, []).append(node)
        return blocks

    def _line(self, node: Node) -> str:
        short = node.name.rsplit(".", 1)[-1]
        shape = f"({node.d_out} x {node.d_in})" if node.d_in else f"({node.d_out})"
        own = " + ".join(
            symbol
            for symbol, there in (
                (f"{node.carrier} rank {node.rank}", node.rank),
                ("gamma", node.gamma and not node.rank),
                ("beta", node.beta),
            )
            if there
        )
        text = f"[cyan]{short}[/] [dim]{shape}[/] {own or 'reads only'}"
        if node.anterior is None or node.link is None:
            return text
        where = ", block before" if node.link.blocks_back and "layers." in node.anterior else ""
        part = f", {node.link.part.removesuffix('_proj')}" if node.link.part else ""
        repeat = ", per kv head" if node.link.how != "as is" else ""
        source = node.anterior.rsplit(".", 1)[-1]
        # A line stays within the 80 columns that a pipe is taken to have.
        return f"{text} [green]<- {source}[/] [dim]({node.link.kind}{where}{part}{repeat})[/]"


def _get(config: Any, key: str, default: Any = None) -> Any:
    if isinstance(config, Mapping):
        return config.get(key, default)
    return getattr(config, key, default)


def _projection_shapes(config: Any) -> dict[str, tuple[int, int]]:
    hidden, inter = _get(config, "hidden_size"), _get(config, "intermediate_size")
    heads = _get(config, "num_attention_heads")
    kv_heads = _get(config, "num_key_value_heads") or heads
    head_dim = _get(config, "head_dim") or hidden // heads
    return {
        "q_proj": (heads * head_dim, hidden),
        "k_proj": (kv_heads * head_dim, hidden),
        "v_proj": (kv_heads * head_dim, hidden),
        "o_proj": (hidden, heads * head_dim),
        "gate_proj": (inter, hidden),
        "up_proj": (inter, hidden),
        "down_proj": (hidden, inter),
    }


def linear_shapes(config: Any) -> dict[str, tuple[int, int]]:
    """Return ``(d_out, d_in)`` of each Linear of a block that SAN adapts, from a model config.

    Args:
        config: A ``PretrainedConfig`` or the dictionary of a ``config.json``.
    """
    family = FAMILIES[_get(config, "model_type")]
    shapes: dict[str, tuple[int, int]] = {}
    for projection, (d_out, d_in) in _projection_shapes(config).items():
        name = family.linear_of(projection)
        above = shapes[name][0] if name in shapes else 0
        shapes[name] = (above + d_out, d_in)
    return shapes


def carry(link: Link, config: Any) -> Carry:
    """Return how a row of the propagation table maps its vector in a model of this config."""
    sizes = {name: d_out for name, (d_out, _) in _projection_shapes(config).items()}
    heads = _get(config, "num_attention_heads")
    groups, head_dim = 1, sizes["q_proj"] // heads
    if link.how == "repeat kv heads":
        groups = sizes["q_proj"] // sizes["v_proj"]
    if link.part is None:
        return Carry(0, sizes[link.anterior], groups, head_dim)
    parts = FAMILIES[_get(config, "model_type")].fused[link.anterior]
    start = sum(sizes[part] for part in parts[: parts.index(link.part)])
    return Carry(start, start + sizes[link.part], groups, head_dim)


def trains_gamma(name: str, mode: str, anteriors: set[str]) -> bool:
    """Whether a target trains a neuron scale: always, but in ``synapse`` mode only if it is read.

    A gamma that nothing reads would be inert in ``synapse`` mode: no gradient, never saved.
    """
    return mode != "synapse" or name in anteriors


def matches(target_modules: Any, name: str) -> bool:
    """Whether PEFT's ``target_modules`` (a list of names, or one regular expression) names it."""
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in target_modules)


def check_matched(targets: Any, names: list[str]) -> None:
    """Refuse ``target_modules`` (a list of names, or one regular expression) that find no module.

    Raises:
        InputError: naming the target that is none of ``names``, and the nearest of them.
    """
    for target in [targets] if isinstance(targets, str) else targets:
        wanted = target if isinstance(targets, str) else [target]
        if not any(matches(wanted, name) for name in names):
            raise InputError(
                f"target_modules: {target!r} matches no module of this model"
                f"{did_you_mean(target, names)}"
            )


def wire(
    names: list[str], kinds: tuple[str, ...], mode: str, model_type: str
) -> tuple[dict[str, tuple[str, Link]], set[str]]:
    """Join targets to each other: a link exists only if both of its ends are targets.

    Args:
        names: The full names of the adapted modules (the embedding included, if adapted).
        kinds: The link kinds that are switched on.
        mode: ``both``, ``neuron`` (no links at all) or ``synapse``.
        model_type: The family, whose table is read.

    Returns:
        ``(links, anteriors)``: the feeding module and table row for each linked posterior, and the
        set of modules that feed another.
    """
    present = set(names)
    links: dict[str, tuple[str, Link]] = {}
    if mode != "neuron":
        for name in names:
            found = link_into(name, kinds, model_type)
            if found is not None and found[0] in present:
                links[name] = found
    return links, {anterior for anterior, _ in links.values()}


def propagation_graph(model: Any, san_config: Any = None) -> PropagationGraph:
    """Return who feeds whom when ``model`` is adapted with ``san_config``.

    Args:
        model: A model config (``LlamaConfig`` or the dictionary of its ``config.json``), a plain
            model, or a model that already carries a SAN adapter (its active config is then used).
        san_config: A ``SanConfig`` or any object with its fields; None means the adapter's own
            config, or the defaults on a plain model.

    Returns:
        The graph; ``rich.print`` draws it as a tree.

    Raises:
        InputError: when the family is not supported or a target is unknown.
    """
    config = _get(model, "config", None)
    config = model if config is None else config
    if san_config is None:
        adapters = _get(model, "peft_config", None)
        if isinstance(adapters, Mapping):
            active = model.active_adapters  # a list of PEFT's, a method of transformers'
            san_config = adapters.get((active() if callable(active) else active)[0])
    model_type = _get(config, "model_type")
    check_family(model_type)
    check_sizes(config)
    if isinstance(san_config, Mapping):
        check_options(san_config)
    targets = _get(san_config, "target_modules") or None
    if targets is not None and not isinstance(targets, str):
        check_targets(targets)
    targets = family_targets(None if targets == "all-linear" else targets, model_type)
    mode = _get(san_config, "mode") or "both"
    kinds = _get(san_config, "links")
    kinds = KINDS if kinds is None else tuple(kinds)
    shift = bool(_get(san_config, "shift"))
    carrier = _get(san_config, "carrier") or "scale"

    shapes = {}
    if _get(san_config, "adapt_embedding"):
        shapes[f"model.{EMBEDDING}"] = (_get(config, "hidden_size"), 0)
    for block in range(_get(config, "num_hidden_layers")):
        for target, shape in linear_shapes(config).items():
            name = f"model.layers.{block}.{PARENTS[target]}.{target}"
            if matches(targets, name):
                shapes[name] = shape
    check_matched(targets, list(shapes))
    links, anteriors = wire(list(shapes), kinds, mode, model_type)
    return PropagationGraph(
        tuple(
            Node(
                name,
                d_out,
                d_in,
                gamma=trains_gamma(name, mode, anteriors),
                beta=shift and d_in > 0,
                anterior=links[name][0] if name in links else None,
                link=links[name][1] if name in links else None,
                carry=carry(links[name][1], config) if name in links else None,
                carrier=carrier if d_in else "scale",
                rank=_get(san_config, "r") if d_in and carrier != "scale" else 0,
            )
            for name, (d_out, d_in) in shapes.items()
        )
    )
