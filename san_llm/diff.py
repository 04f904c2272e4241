"""What training changed: which channels an adapter strengthens, and which it weakens.

A neuron scale above 1 is long-term potentiation (LTP), one below 1 long-term depression (LTD), in
the words of the paper. The ``scale`` carrier holds the scales themselves; those of the low-rank
carriers are ratios of row norms, and take the base's weights, some rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from san_llm.errors import InputError, SanError
from san_llm.locate import base_folder
from san_llm.record import adapter_of, last_run, read_json
from san_llm.san.graph import EMBEDDING, PARENTS, propagation_graph
from san_llm.shards import Numbers, read_header, read_rows
from san_llm.subject import find_subject
from san_llm.weight_check import Expected, stored_rows

if TYPE_CHECKING:
    from rich.table import Table

STILL = 1e-6  # a scale this near to 1 did not move: norms in fp32 are not known better
LARGEST = 3  # channels that are named


@dataclass(frozen=True)
class Change:
    """What happened to the channels of one module, or to those of its kind in all blocks.

    Attributes:
        module: The projection: ``up_proj``.
        block: Its block; None for all blocks, or where there is none.
        channels: How many channels.
        potentiated: Share of them with gamma > 1.
        depressed: Share of them with gamma < 1.
        mean_change: Mean of ``|gamma - 1|``.
        largest: The channels that moved furthest, each with its gamma.
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
        carrier: What holds its scales.
        mode: Where they act.
        total: All channels together; its largest are not named.
        modules: Each projection, over all blocks; nor are theirs.
        blocks: Each module of each block, in the model's order.
    """

    adapter: str
    base: str
    carrier: str
    mode: str
    total: Change
    modules: list[Change]
    blocks: list[Change]


def diff(where: Path | None = None, base: str | None = None) -> DiffResult:
    """Return what an adapter changes.

    Args:
        where: An adapter's folder, or that of a finished run; default: the last run.
        base: The model it was trained on; default: the one it names. Read for the low-rank
            carriers, and for a check of sizes if it is given.

    Raises:
        InputError: when there is no SAN adapter, or it does not fit the base.
        SanError: when its numbers are not finite.
    """
    adapter = adapter_of(last_run()) if where is None else where
    if (adapter / "recipe.yaml").is_file():
        adapter = adapter_of(adapter)
    options = read_json(adapter / "adapter_config.json")
    if options.get("peft_type") != "SAN":
        raise InputError(
            f"{adapter}: a {options.get('peft_type')} adapter: only SAN's have neuron scales"
        )
    carrier = str(options.get("carrier") or "scale")
    if base is not None or carrier != "scale":
        named = find_subject(base, adapter).base
        gammas = _against_base(base_folder(named), adapter, options)
        base = named.model
    else:
        gammas = _scales(adapter)
    blocks: list[Change] = []
    kinds: dict[str, list[Numbers]] = {}
    for name, gamma in gammas.items():
        if not np.isfinite(gamma).all():
            raise SanError(f"{adapter}: the scale of {name} has numbers that are not finite")
        parts = name.split(".")
        block = int(parts[-3]) if parts[-1] in PARENTS else None
        blocks.append(_change(parts[-1], block, gamma, LARGEST))
        kinds.setdefault(parts[-1], []).append(gamma)
    if not blocks:
        raise InputError(f"{adapter}: has no neuron scale in it")
    known = [EMBEDDING, *PARENTS]
    return DiffResult(
        adapter=str(adapter),
        base=str(base or options.get("base_model_name_or_path")),
        carrier=carrier,
        mode=str(options.get("mode") or "both"),
        total=_change("all", None, np.concatenate(list(gammas.values())), 0),
        modules=[
            _change(kind, None, np.concatenate(kinds[kind]), 0)
            for kind in sorted(kinds, key=known.index)
        ],
        blocks=blocks,
    )


def _in_order(vectors: Iterable[str]) -> list[str]:
    """Sort module names as a model has them: the embedding, then block by block."""
    known = list(PARENTS)

    def place(name: str) -> tuple[int, int]:
        parts = name.split(".")
        return (int(parts[-3]), known.index(parts[-1])) if parts[-1] in PARENTS else (-1, 0)

    return sorted(vectors, key=place)


def _scales(adapter: Path) -> dict[str, Numbers]:
    """Return the neuron scales that an adapter's file holds as they are, by module."""
    ending = ".san_gamma"
    found = {
        tensor.name.removeprefix("base_model.model.").removesuffix(ending): tensor
        for tensor in read_header(adapter / "adapter_model.safetensors")
        if tensor.name.endswith(ending)
    }
    return {name: read_rows(found[name]).astype(np.float64) for name in _in_order(found)}


def _against_base(source: Path, adapter: Path, options: Mapping[str, Any]) -> dict[str, Numbers]:
    """Return the neuron scales of an adapter on its base, by module."""
    config = read_json(source / "config.json")
    vectors = {tensor.name for tensor in read_header(adapter / "adapter_model.safetensors")}
    expected = Expected(stored_rows(source), config, adapter, options)
    gammas = {}
    for node in propagation_graph(config, options):
        key = f"base_model.model.{node.name}.san_"
        vectors -= {f"{key}{kind}" for kind in ("gamma", "beta", "magnitude", "lora_A", "lora_B")}
        try:
            gamma = expected.gamma(node)
        except InputError:
            raise
        except ValueError:  # numpy's word for shapes that do not go together
            gamma = np.empty(0)
        if gamma is None and node.gamma:
            raise InputError(f"{adapter}: has no scale for {node.name} of {source}")
        if gamma is not None and gamma.shape != (node.d_out,):
            raise InputError(f"{adapter}: {node.name} has another shape than in {source}")
        if gamma is not None:
            gammas[node.name] = gamma
    stray = sorted(name for name in vectors if ".san_" in name)
    if stray:
        raise InputError(f"{adapter}: {stray[0]} belongs to nothing in {source}")
    return gammas


def _change(module: str, block: int | None, gamma: Numbers, named: int) -> Change:
    moved = gamma - 1
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
    """Return the result as two tables: over all blocks, and block by block."""
    yield _table([*result.modules, result.total], blocks=False)
    yield _table(result.blocks, blocks=True)


def _table(changes: list[Change], blocks: bool) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in (*(("block",) if blocks else ()), "module", "channels", "LTP %", "LTD %", "mean"):
        table.add_column(column, justify="left" if column == "module" else "right")
    if blocks:
        table.add_column("channel:gamma", no_wrap=True)
    for change in changes:
        row = [f"{change.channels:,}"]
        row += [f"{100 * share:.1f}" for share in (change.potentiated, change.depressed)]
        row.append(f"{change.mean_change:.4f}")
        if blocks:
            place = "-" if change.block is None else str(change.block)
            named = " ".join(f"{channel}:{gamma:.3f}" for channel, gamma in change.largest)
            table.add_row(place, change.module, *row, named)
        else:
            table.add_row(f"[bold]{change.module}[/]", *row)
    return table
