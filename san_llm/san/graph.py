"""Which Linear feeds which: SAN's propagation map, as one table and plain Python.

The synapse scale of a Linear (the posterior) is the neuron scale of another one (the anterior).
``LINKS`` is that map for a LLaMA block; everything else here looks names up in it. A family that
is wired like LLaMA joins by its ``model_type`` in ``FAMILIES``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

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
    """

    kind: Kind
    posterior: str
    anterior: str
    blocks_back: int = 0
    how: How = "as is"
    first: str | None = None


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

FAMILIES: tuple[str, ...] = ("llama", "mistral", "qwen2")

PARENTS: dict[str, str] = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}
TARGETS: tuple[str, ...] = tuple(PARENTS)
CARRIERS: tuple[str, ...] = ("scale", "lora", "dora")
FORMS: tuple[str, ...] = ("lean", "plain")
MODES: tuple[str, ...] = ("both", "neuron", "synapse")
KINDS: tuple[Kind, ...] = ("attention", "mlp", "residual")

_LINEAR = re.compile(
    r"(?P<prefix>(?:.*\.)?)layers\.(?P<block>\d+)\.(?P<parent>self_attn|mlp)\.(?P<name>\w+_proj)"
)


def check_family(model_type: str | None) -> None:
    """Refuse a model that the propagation table does not describe.

    Raises:
        InputError: naming the supported families.
    """
    if model_type not in FAMILIES:
        raise InputError(
            f"model type {model_type!r} is not supported by SAN: its propagation map is known for "
            f"{', '.join(FAMILIES)}"
        )


def check_targets(targets: Collection[str]) -> None:
    """Refuse a target whose last name part is not one of the seven projections.

    Raises:
        InputError: naming the unknown target and the nearest known one.
    """
    if not targets:
        raise InputError(f"target_modules is empty: name at least one of {', '.join(TARGETS)}")
    for target in targets:
        if not isinstance(target, str):
            raise InputError(f"target_modules: expected module names, found {target!r}")
        if target.rsplit(".", 1)[-1] not in TARGETS:
            raise InputError(
                f"target module {target!r} is not one of {', '.join(TARGETS)}"
                f"{did_you_mean(target.rsplit('.', 1)[-1], TARGETS)}"
            )


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


def link_into(posterior: str, kinds: tuple[str, ...] = KINDS) -> tuple[str, Link] | None:
    """Return the full name of the module that feeds ``posterior``, and the table's row.

    Args:
        posterior: A module name such as ``model.layers.3.mlp.down_proj``, with any prefix.
        kinds: The link kinds that are switched on.

    Returns:
        ``(anterior name, row)``, or None where nothing feeds it or its kind is off.
    """
    match = _LINEAR.fullmatch(posterior)
    if match is None:
        return None
    for link in LINKS:
        if link.posterior != match["name"] or link.kind not in kinds:
            continue
        block = int(match["block"]) - link.blocks_back
        if block >= 0:
            parent = PARENTS[link.anterior]
            return f"{match['prefix']}layers.{block}.{parent}.{link.anterior}", link
        if link.first is not None:
            return f"{match['prefix']}{link.first}", link
    return None


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
        repeat = ", per kv head" if node.link.how != "as is" else ""
        source = node.anterior.rsplit(".", 1)[-1]
        # A line stays within the 80 columns that a pipe is taken to have.
        return f"{text} [green]<- {source}[/] [dim]({node.link.kind}{where}{repeat})[/]"


def _get(config: Any, key: str, default: Any = None) -> Any:
    if isinstance(config, Mapping):
        return config.get(key, default)
    return getattr(config, key, default)


def linear_shapes(config: Any) -> dict[str, tuple[int, int]]:
    """Return ``(d_out, d_in)`` of each of the seven projections, from a model config.

    Args:
        config: A ``PretrainedConfig`` or the dictionary of a ``config.json``.
    """
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
    names: list[str], kinds: tuple[str, ...], mode: str
) -> tuple[dict[str, tuple[str, Link]], set[str]]:
    """Join targets to each other: a link exists only if both of its ends are targets.

    Args:
        names: The full names of the adapted modules (the embedding included, if adapted).
        kinds: The link kinds that are switched on.
        mode: ``both``, ``neuron`` (no links at all) or ``synapse``.

    Returns:
        ``(links, anteriors)``: the feeding module and table row for each linked posterior, and the
        set of modules that feed another.
    """
    present = set(names)
    links: dict[str, tuple[str, Link]] = {}
    if mode != "neuron":
        for name in names:
            found = link_into(name, kinds)
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
    check_family(_get(config, "model_type"))
    targets = _get(san_config, "target_modules") or TARGETS
    if targets == "all-linear":
        targets = TARGETS
    if not isinstance(targets, str):
        check_targets(targets)
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
    links, anteriors = wire(list(shapes), kinds, mode)
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
                carrier=carrier if d_in else "scale",
                rank=_get(san_config, "r") if d_in and carrier != "scale" else 0,
            )
            for name, (d_out, d_in) in shapes.items()
        )
    )
