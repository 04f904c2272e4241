"""What training changed: which channels an adapter strengthens, and which it weakens.

A neuron scale above 1 is long-term potentiation (LTP), one below 1 long-term depression (LTD), in
the words of the paper. The ``scale`` carrier holds the scales themselves; those of the low-rank
carriers are ratios of row norms, and take the base's weights, some rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from san_llm.errors import InputError, SanError
from san_llm.locate import base_folder
from san_llm.model_diff import compare
from san_llm.recipe import Base
from san_llm.record import adapter_of, last_run, read_json, recipe_of, run_of
from san_llm.san.graph import EMBEDDING, PARENTS, check_options, propagation_graph
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
        relative: In a merged model, the norm of the weight's change in units of the base's. Where
            that change is no scaling of rows and columns the shares and the mean are None.
    """

    module: str
    block: int | None
    channels: int
    potentiated: float | None
    depressed: float | None
    mean_change: float | None
    largest: list[tuple[int, float]]
    relative: float | None = None


@dataclass(frozen=True)
class DiffResult:
    """What an adapter changes.

    Attributes:
        adapter: The adapter's folder, or the merged model's.
        base: The base that it names, or that was given.
        carrier: What holds its scales; ``merged`` where they were found in the weights.
        mode: Where they act; of a merged model ``weights``.
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
    """Return what an adapter changes, or a merged model.

    Args:
        where: The folder of an adapter, of a finished run or of a merged model; default: the last
            run.
        base: The model it was trained on; default: the one it names. Read for the low-rank
            carriers, and for a check of sizes if it is given.

    Raises:
        InputError: when there is no SAN adapter, or it does not fit the base.
        SanError: when its numbers are not finite.
    """
    if where is not None and _is_model(where):
        return _of_model(where, base)
    adapter = adapter_of(last_run()) if where is None else where
    if (adapter / "recipe.yaml").is_file():
        adapter = adapter_of(adapter)
    options = san_options(adapter)
    carrier = str(options.get("carrier") or "scale")
    source = None
    if base is not None or carrier != "scale":
        named = find_subject(base, adapter).base
        source, base = base_folder(named), named.model
    gammas = neuron_scales(adapter, options, source)
    blocks: list[Change] = []
    kinds: dict[str, list[Numbers]] = {}
    for name, gamma in gammas.items():
        block, module = place_of(name)
        blocks.append(_change(module, block, gamma, LARGEST))
        kinds.setdefault(module, []).append(gamma)
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


def san_options(adapter: Path) -> dict[str, Any]:
    """Return the ``adapter_config.json`` of a SAN adapter.

    Raises:
        InputError: when it is another method's, or has options that are none.
    """
    options = read_json(adapter / "adapter_config.json")
    if options.get("peft_type") != "SAN":
        raise InputError(
            f"{adapter}: a {options.get('peft_type')} adapter: only SAN's have neuron scales"
        )
    check_options(options)
    return options


def neuron_scales(
    adapter: Path, options: Mapping[str, Any], base: Path | None
) -> dict[str, Numbers]:
    """Return every neuron scale of an adapter (d_out,), by module, in the model's order.

    Args:
        adapter: Its folder.
        options: What :func:`san_options` says of it.
        base: Its base's folder, which the low-rank carriers need; with None the ``scale`` carrier's
            are returned as they are held.

    Raises:
        InputError: when there is none, or they do not fit the base.
        SanError: when one is not finite.
    """
    gammas = _scales(adapter) if base is None else _against_base(base, adapter, options)
    for name, gamma in gammas.items():
        if not np.isfinite(gamma).all():
            raise SanError(f"{adapter}: the scale of {name} has numbers that are not finite")
    if not gammas:
        raise InputError(f"{adapter}: has no neuron scale in it")
    return gammas


def place_of(name: str) -> tuple[int | None, str]:
    """Return a module's block, None where it is in none, and its short name: ``up_proj``."""
    parts = name.split(".")
    return (int(parts[-3]) if parts[-1] in PARENTS else None), parts[-1]


def _is_model(where: Path) -> bool:
    return (where / "config.json").is_file() and not (where / "adapter_config.json").is_file()


def _of_model(model: Path, base: str | None) -> DiffResult:
    """Return what is different in a merged model."""
    run = run_of(model)
    if base is None and run is None:
        raise InputError(f"{model}: a model; name its base, too: san-llm diff {model} BASE")
    named = Base(model=base) if base is not None else recipe_of(run or model).base
    blocks: list[Change] = []
    kinds: dict[str, list[Numbers]] = {}
    for name, relative, gamma in compare(model, base_folder(named)):
        parts = name.split(".")
        block = next((int(part) for part in parts if part.isdigit()), None)
        if gamma is None:
            blocks.append(Change(parts[-1], block, 0, None, None, None, [], relative))
        else:
            blocks.append(replace(_change(parts[-1], block, gamma, LARGEST), relative=relative))
            kinds.setdefault(parts[-1], []).append(gamma)
    every = [gamma for gammas in kinds.values() for gamma in gammas]
    return DiffResult(
        adapter=str(model),
        base=named.model,
        carrier="merged",
        mode="weights",
        total=_change("all", None, np.concatenate(every), 0)
        if every
        else Change("all", None, 0, None, None, None, []),
        modules=[_change(kind, None, np.concatenate(kinds[kind]), 0) for kind in kinds],
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

    weights = any(change.relative is not None for change in changes)
    table = Table(box=None, pad_edge=False)
    for column in (*(("block",) if blocks else ()), "module", "channels", "LTP %", "LTD %", "mean"):
        table.add_column(column, justify="left" if column == "module" else "right")
    if weights:
        table.add_column("change %", justify="right")
    if blocks:
        table.add_column("channel:gamma", no_wrap=True)
    for change in changes:
        row = [f"{change.channels:,}" if change.channels else "-"]
        for share in (change.potentiated, change.depressed):
            row.append("-" if share is None else f"{100 * share:.1f}")
        row.append("-" if change.mean_change is None else f"{change.mean_change:.4f}")
        if weights:
            row.append("-" if change.relative is None else f"{100 * change.relative:.2f}")
        if blocks:
            place = "-" if change.block is None else str(change.block)
            named = " ".join(f"{channel}:{gamma:.3f}" for channel, gamma in change.largest)
            table.add_row(place, change.module, *row, named)
        else:
            table.add_row(f"[bold]{change.module}[/]", *row)
    return table
