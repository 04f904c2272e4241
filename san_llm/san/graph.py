"""Which Linear feeds which: SAN's propagation graph of a model, in plain Python.

The synapse scale of a Linear (the posterior) is the neuron scale of another one (the anterior).
``architectures.decoders`` has that map as data, for a LLaMA block and each family that is
wired otherwise; here it becomes the graph of one model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from san_llm.architectures.decoders import EMBEDDING, PARENTS
from san_llm.architectures.entry import Family, Link
from san_llm.architectures.lookup import (
    carry,
    family_of,
    family_targets,
    is_known,
    link_into,
)
from san_llm.architectures.sizes import check_sizes, linear_shapes, norm_sizes, setting
from san_llm.errors import InputError, did_you_mean
from san_llm.measure.units import path_of
from san_llm.san.node import Node, Norm, matches, trained_by, trains_gamma, unmatched
from san_llm.san.options import Options, check_wiring, options_of, saved_options

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass(frozen=True)
class PropagationGraph:
    """Every adapted module in order, with who feeds whom. Printing it with rich draws a tree.

    Attributes:
        nodes: The adapted modules.
        norms: The norms that are trained beside them.
    """

    nodes: tuple[Node, ...]
    norms: tuple[Norm, ...] = ()

    @property
    def trained(self) -> int:
        """How many numbers the adapter trains in all."""
        return trained_by(self.nodes, self.norms)

    def __iter__(self) -> Iterator[Node]:
        """Iterate over the nodes in model order."""
        return iter(self.nodes)

    def readers(self, name: str) -> list[Node]:
        """Return the nodes whose synapse scale is the gamma of ``name``."""
        return [node for node in self.nodes if node.anterior == name]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the graph as a tree, one branch a block; blocks wired alike are drawn once."""
        from san_llm.san.tree import tree_of

        yield tree_of(self.nodes, self.norms, options.max_width)


def check_matched(targets: Any, names: list[str]) -> None:
    """Refuse ``target_modules`` (a list of names, or one regular expression) that find no module.

    Raises:
        InputError: naming the target that is none of ``names``, and the nearest of them.
    """
    for target in unmatched(targets, names):
        raise InputError(
            f"target_modules: {target!r} matches no module of this model"
            f"{did_you_mean(target, names)}"
        )


def wire(
    names: list[str], kinds: tuple[str, ...], mode: str, family: Family
) -> tuple[dict[str, tuple[str, Link]], set[str]]:
    """Return how targets are joined: a link exists only if both of its ends are targets.

    Args:
        names: The full names of the adapted modules (the embedding included, if adapted).
        kinds: The link kinds that are switched on.
        mode: ``both``, ``neuron`` (no links at all) or ``synapse``.
        family: The family, whose table is read.

    Returns:
        ``(links, anteriors)``: the feeding module and table row for each linked posterior, and the
        set of modules that feed another.
    """
    present = set(names)
    links: dict[str, tuple[str, Link]] = {}
    if mode != "neuron":
        for name in names:
            link = link_into(name, kinds, family)
            if link is not None and link[0] in present:
                links[name] = link
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
    config = setting(model, "config", None)
    config = model if config is None else config
    if san_config is None:
        adapters = setting(model, "peft_config", None)
        if isinstance(adapters, Mapping):
            active = model.active_adapters  # a list of PEFT's, a method of transformers'
            san_config = adapters.get((active() if callable(active) else active)[0])
    model_type = setting(config, "model_type")
    options = _options(san_config)
    check_wiring(options, model_type)
    if options.graph is not None or not is_known(model_type):
        from san_llm.san.measured import measured_graph, measured_norms, nodes

        found = nodes(measured_graph(model, options), options)
        return PropagationGraph(found, measured_norms(model, found, options))
    check_sizes(config)
    targets = family_targets(options.target_modules, model_type)

    shapes = {}
    if options.adapt_embedding:
        shapes[f"model.{EMBEDDING}"] = (setting(config, "hidden_size"), 0)
    for block in range(setting(config, "num_hidden_layers")):
        for target, shape in linear_shapes(config).items():
            name = f"model.layers.{block}.{PARENTS[target]}.{target}"
            if matches(targets, name):
                shapes[name] = shape
    check_matched(targets, list(shapes))
    family = family_of(model_type, options.table)
    links, anteriors = wire(list(shapes), options.kinds, options.mode, family)
    return PropagationGraph(
        tuple(
            Node(
                name,
                d_out,
                d_in,
                gamma=trains_gamma(name, options.mode, anteriors),
                beta=options.shift and d_in > 0,
                anterior=links[name][0] if name in links else None,
                link=links[name][1] if name in links else None,
                carry=carry(links[name][1], config, family) if name in links else None,
                carrier=options.carrier if d_in else "scale",
                rank=options.rank if d_in and options.carrier != "scale" else 0,
                sigma=options.free and d_in > 0,
            )
            for name, (d_out, d_in) in shapes.items()
        ),
        _norms(list(shapes), config) if options.train_norms else (),
    )


def _norms(names: list[str], config: Any) -> tuple[Norm, ...]:
    """Return the norms of the blocks of some modules, and the last one, as the table has them."""
    blocks = dict.fromkeys(path_of(name) for name in names if path_of(name))
    sizes = norm_sizes(config)
    inside = (Norm(block + name, size) for block in blocks for name, size in sizes.items())
    return (*inside, Norm("model.norm", setting(config, "hidden_size")))


def _options(source: Any) -> Options:
    if source is None or isinstance(source, Options):
        return source or Options()
    return saved_options(source) if isinstance(source, Mapping) else options_of(source)
