"""What training changed: which channels an adapter strengthens, and which it weakens.

A neuron scale above 1 is long-term potentiation (LTP), one below 1 long-term depression (LTD), in
the words of the paper. The ``scale`` carrier holds the scales themselves; those of the low-rank
carriers are ratios of row norms, and take the base's weights, some rows at a time. To norms that
are trained beside the scales something is added.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from san_llm.architectures.lookup import in_order, place_of
from san_llm.models.adapter import open_adapter
from san_llm.models.locate import find_base
from san_llm.models.scales import column_scales, neuron_scales, norm_changes
from san_llm.models.subject import find_subject
from san_llm.models.weights import Numbers
from san_llm.runs.folder import adapter_of, last_run
from san_llm.san.formulas import STILL

if TYPE_CHECKING:
    from rich.table import Table


LARGEST = 3  # channels that are named


@dataclass(frozen=True)
class Change:
    """What happened to the channels of one module, or to those of its kind in all blocks.

    Attributes:
        module: The projection: ``up_proj``; of a norm its parameter: ``input_layernorm.weight``.
        block: The module's block; None for all blocks, or where there is none.
        channels: How many channels.
        potentiated: Share of the channels with gamma > 1, or that something is added to.
        depressed: Share of the channels with gamma < 1, or that something is taken from.
        mean_change: Mean of ``|gamma - 1|``, or of what is added, without its sign.
        largest: The channels that moved furthest, each with its gamma, or what is added.
    """

    module: str
    block: int | None
    channels: int
    potentiated: float
    depressed: float
    mean_change: float
    largest: list[tuple[int, float]]


@dataclass(frozen=True)
class DiffResult:
    """What an adapter changes.

    Attributes:
        adapter: The adapter's folder.
        base: The base that it names, or that was given.
        carrier: What holds the adapter's scales.
        mode: Where the scales act.
        total: All channels together; its largest are not named.
        modules: Each projection, over all blocks; its largest are not named, either.
        blocks: Each module of each block, in the model's order.
        norms: Each weight and bias of the norms that are trained beside the scales; empty where
            none are. Their numbers are what is added, whose start is 0.
        columns: The column scales that each projection has of its own, over all blocks, and those
            of all together; empty but for ``links: free``.
    """

    adapter: str
    base: str
    carrier: str
    mode: str
    total: Change
    modules: list[Change]
    blocks: list[Change]
    columns: list[Change]
    norms: list[Change]


def diff(where: Path | None = None, base: str | None = None) -> DiffResult:
    """Return what an adapter changes.

    Args:
        where: The folder of an adapter or of a finished run; default: the last run.
        base: The model it was trained on; default: the one it names. Read for the low-rank
            carriers, and for a check of sizes if it is given.

    Raises:
        InputError: when there is no SAN adapter, or it does not fit the base.
        SanError: when its numbers are not finite.
    """
    adapter = adapter_of(last_run()) if where is None else where
    if (adapter / "recipe.yaml").is_file():
        adapter = adapter_of(adapter)
    opened = open_adapter(adapter)
    options, carrier = opened.options, str(opened.options.get("carrier") or "scale")
    source = None
    if base is not None or carrier != "scale":
        named = find_subject(base, adapter).base
        source, base = find_base(named).folder, named.model
    gammas = neuron_scales(opened, source)
    sigmas, norms = column_scales(opened), norm_changes(opened)
    return DiffResult(
        adapter=str(adapter),
        base=str(base or options.get("base_model_name_or_path")),
        carrier=carrier,
        mode=str(options.get("mode") or "both"),
        total=_over_all(gammas),
        modules=_by_module(gammas),
        blocks=[
            _change(module, block, gamma, LARGEST)
            for (block, module), gamma in zip(map(place_of, gammas), gammas.values(), strict=True)
        ],
        columns=[*_by_module(sigmas), _over_all(sigmas)] if sigmas else [],
        norms=[_norm(name, added) for name, added in norms.items()],
    )


def _over_all(scales: Mapping[str, Numbers]) -> Change:
    return _change("all", None, np.concatenate(list(scales.values())), 0)


def _by_module(scales: Mapping[str, Numbers]) -> list[Change]:
    """Return what happened to each projection's scales over all blocks."""
    modules: dict[str, list[Numbers]] = {}
    for name, scale in scales.items():
        modules.setdefault(place_of(name)[1], []).append(scale)
    return [
        _change(module, None, np.concatenate(modules[module]), 0) for module in in_order(modules)
    ]


def _norm(name: str, added: Numbers) -> Change:
    block, parameter = place_of(name)
    if block is None:
        parameter = ".".join(name.split(".")[-2:])  # norm.weight
    return _change(parameter, block, added, LARGEST, start=0)


def _change(module: str, block: int | None, gamma: Numbers, named: int, start: float = 1) -> Change:
    moved = gamma - start
    size = np.abs(moved)
    furthest = np.argsort(-size, kind="stable")[:named]
    return Change(
        module=module,
        block=block,
        channels=len(gamma),
        potentiated=float((moved > STILL).mean()),
        depressed=float((moved < -STILL).mean()),
        mean_change=float(size.mean()),
        largest=[(int(channel), float(gamma[channel])) for channel in furthest],
    )


def tables(result: DiffResult) -> Iterator[Table]:
    """Return the result as tables: over all blocks, and block by block."""
    yield _table([*result.modules, result.total], blocks=False)
    if result.columns:
        yield _table(result.columns, blocks=False, module="columns of")
    yield _table(result.blocks, blocks=True)
    if result.norms:
        yield _table(result.norms, blocks=True, module="norm", shown=("up %", "down %", "added"))


def _table(
    changes: list[Change],
    blocks: bool,
    module: str = "module",
    shown: tuple[str, str, str] = ("LTP %", "LTD %", "gamma"),
) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in (*(("block",) if blocks else ()), module, "channels", *shown[:2], "mean"):
        justify: Literal["left", "right"] = "left" if column == module else "right"
        table.add_column(column, justify=justify, no_wrap=True)
    if blocks:
        table.add_column(f"channel:{shown[2]}")
    for change in changes:
        shares = (f"{100 * share:.1f}" for share in (change.potentiated, change.depressed))
        row = [f"{change.channels:,}", *shares, f"{change.mean_change:.4f}"]
        if blocks:
            place = "-" if change.block is None else str(change.block)
            named = " ".join(f"{channel}:{gamma:.3f}" for channel, gamma in change.largest)
            table.add_row(place, change.module, *row, named)
        else:
            table.add_row(f"[bold]{change.module}[/]", *row)
    return table
