"""What a plan says, as a value: for a person as lines, for a program as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from san_llm.plan.memory import WIDE, Batch, Device, Memory
from san_llm.recipe.schema import Method, Recipe, leaves
from san_llm.san.graph import PropagationGraph


@dataclass(frozen=True)
class Seen:
    """What the rows come to.

    Attributes:
        rows: Those that are trained on; None where they are not here.
        sharing: The largest micro-batch, where rows share what they begin alike.
        apart: The same without sharing: dropout must differ between rows.
    """

    rows: int | None
    sharing: Batch
    apart: Batch

    def batch_for(self, method: Method | None) -> Batch:
        """Return the largest micro-batch that a method is trained on."""
        return self.apart if getattr(method, "dropout", None) else self.sharing


@dataclass(frozen=True)
class Plan:
    """What a run would be.

    Attributes:
        recipe: The recipe, with all defaults.
        given: The dotted keys that its file or arguments give; all others are defaults.
        config_from: Where the base's sizes are from.
        graph: Who feeds whom; None unless the method is SAN.
        form: How SAN is computed, and of a measured model what takes its scales over; None of
            another method.
        trained: Trained numbers by module, over all blocks.
        rows: Rows that are trained on; None where a file of them is not here.
        missing: The file that is not here.
        steps: Optimizer steps; None where the rows are not known and the recipe does not say.
        epochs: What the steps come to in epochs; None likewise.
        micro_batch: Rows at once on a device.
        batch: The largest that a device computes at once.
        looked: Whether the batch is the rows' own, not what the cutoff allows.
        device: The kind of device that the memory is told for.
        devices: How many devices, each with a process.
        sharded: Whether the base is spread over them.
        memory: What a step takes at its peak on each device, by method; the recipe's is first.
        traffic: Bytes that each device sends in a step, and as many that it receives.
        doubts: What should be looked at before it is run.
    """

    recipe: Recipe
    given: frozenset[str]
    config_from: str
    graph: PropagationGraph | None
    form: str | None
    trained: dict[str, int]
    rows: int | None
    missing: str | None
    steps: int | None
    epochs: float | None
    micro_batch: int
    batch: Batch
    looked: bool
    device: Device
    devices: int
    sharded: bool
    memory: dict[str, Memory]
    traffic: int
    doubts: tuple[str, ...]

    @property
    def adapter_bytes(self) -> int:
        """The adapter's file, or the whole model's, in fp32, without some kilobytes of headers."""
        return sum(self.trained.values()) * WIDE


def marked_recipe(plan: Plan) -> list[tuple[str, bool]]:
    """Return the resolved recipe's lines, as YAML, and whether each is a default."""
    lines: list[tuple[str, bool]] = []
    for section, value in plan.recipe.model_dump(mode="json").items():
        if not isinstance(value, dict):
            lines.append((f"{section}: {_flow(value)}", section not in plan.given))
            continue
        lines.append((f"{section}:", False))
        for key, item in value.items():
            place = f"{section}.{key}"
            given = any(name == place or name.startswith(f"{place}.") for name in plan.given)
            lines.append((f"  {key}: {_flow(item)}", not given))
    return lines


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=56, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...").replace("\n", "\n  ")


def fits(plan: Plan, limit: int) -> bool:
    """Return whether what the recipe's method needs is within ``limit``, in bytes."""
    return next(iter(plan.memory.values())).total <= limit


def as_values(plan: Plan, limit: int | None) -> dict[str, Any]:
    """Return a plan as values of JSON."""
    recipe = plan.recipe.model_dump(mode="json")
    return {
        "recipe": recipe,
        "defaults": sorted(set(leaves(recipe)) - plan.given),
        "config_from": plan.config_from,
        "links": None
        if plan.graph is None
        else [{"module": n.name, "anterior": n.anterior} for n in plan.graph],
        "form": plan.form,
        "trained": plan.trained,
        "trained_numbers": sum(plan.trained.values()),
        "adapter_bytes": plan.adapter_bytes,
        "rows": plan.rows,
        "missing": plan.missing,
        "steps": plan.steps,
        "epochs": plan.epochs,
        "micro_batch": plan.micro_batch,
        "batch": vars(plan.batch),
        "looked": plan.looked,
        "device": plan.device,
        "devices": plan.devices,
        "sharded": plan.sharded,
        "memory": {name: {**vars(need), "total": need.total} for name, need in plan.memory.items()},
        "traffic": plan.traffic,
        "warnings": list(plan.doubts),
        "limit": limit,
        "fits": None if limit is None else fits(plan, limit),
    }
