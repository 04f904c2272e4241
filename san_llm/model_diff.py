"""A merged model against its base: the neuron scales found again in the weights alone.

A merge of the ``scale`` carrier is ``W* = diag(r) W diag(s)``. Rows and columns are fitted in
turns, some rows at a time, each the least-squares answer to the other. That leaves one common
factor open, which the propagation table closes: columns follow the rows of the anterior, or stand
at 1. Where no scaling explains the merged weight, only the size of the change is told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from san_llm.errors import InputError
from san_llm.record import read_json
from san_llm.san.graph import EMBEDDING, carry, check_family, link_into
from san_llm.shards import Numbers, Stored, read_checkpoint, read_rows, row_blocks

TURNS = 12  # of the fit at most: wide weights take three or four
# What a scaling may leave over, relative to the weight: some more than each dtype's rounding does,
# and at most half of the change, which would else be lost in that rounding.
LEFT = {"F32": 1e-5, "BF16": 2.0**-9, "F16": 2.0**-12}
SETTLED = 1e-7  # what columns move by when the fit has come to its end
ORDER = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"),
    *("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
)
ALIKE = 0.01  # spread of a ratio that counts as one number


class Found(NamedTuple):
    """What became of one tensor.

    Attributes:
        name: Its name.
        relative: Norm of the change in units of the base's.
        gamma: The neuron scale (d_out,), or None where the change is no scaling.
    """

    name: str
    relative: float
    gamma: Numbers | None


def compare(model: Path, base: Path) -> Iterator[Found]:
    """Iterate over what changed, in the model's order; a Linear that stayed has gamma 1.

    Args:
        model: The merged checkpoint, in full precision.
        base: The folder of its base.

    Raises:
        InputError: when the two are not of one shape, or one cannot be read.
    """
    config = read_json(base / "config.json")
    check_family(config.get("model_type"))
    before = {tensor.name: tensor for tensor in read_checkpoint(base)}
    gammas: dict[str, Numbers] = {}
    tensors = sorted(read_checkpoint(model), key=lambda tensor: _place(tensor.name))
    for tensor in tensors:
        old = before.get(tensor.name)
        if old is None and tensor.name == "lm_head.weight":  # tied in the base
            old = before.get(f"model.{EMBEDDING}.weight")
        if old is None or old.shape != tensor.shape:
            raise InputError(f"{model}: {tensor.name} has no counterpart of its shape in {base}")
        module = tensor.name.removesuffix(".weight")
        relative = _relative(tensor, old)
        gamma = None
        if module.endswith("_proj"):
            gamma = np.ones(tensor.shape[0])
            if relative:
                expected = _expected(module, gammas, config)
                gamma = _gamma(tensor, old, expected, relative)
            if gamma is not None:
                gammas[module] = gamma
        if gamma is not None or relative:
            yield Found(module, relative, gamma)


def _place(name: str) -> tuple[int, int, str]:
    """Sort a block's v before o before gate and down, so that each finds its anterior known."""
    parts = name.split(".")
    block = next((int(part) for part in parts if part.isdigit()), -1)
    return block, next((i for i, one in enumerate(ORDER) if one in parts), -1), name


def _expected(
    module: str, gammas: Mapping[str, Numbers], config: Mapping[str, Any]
) -> Numbers | None:
    """Return the column scale (d_in,) that the table expects of a module, or None for 1."""
    found = link_into(module, model_type=config["model_type"])
    if found is None or found[0] not in gammas:
        return None
    start, stop, groups, head_dim = carry(found[1], config)
    gamma = gammas[found[0]][start:stop]
    if groups == 1:
        return gamma
    return np.repeat(gamma.reshape(-1, head_dim), groups, axis=0).reshape(-1)


def _blocks(new: Stored, old: Stored) -> Iterator[tuple[slice, Numbers, Numbers]]:
    for first, last in row_blocks(new):
        rows = (read_rows(tensor, first, last).astype(np.float64) for tensor in (new, old))
        yield slice(first, last), *rows  # type: ignore[misc]


def _relative(new: Stored, old: Stored) -> float:
    change = size = 0.0
    for _, after, before in _blocks(new, old):
        change += float(np.square(after - before).sum())
        size += float(np.square(before).sum())
    return float(np.sqrt(change / size)) if size else float(change > 0)


def _gamma(new: Stored, old: Stored, expected: Numbers | None, relative: float) -> Numbers | None:
    """Return the row scale of a Linear, or None where its change is no scaling."""
    d_out, d_in = new.shape
    r, s = np.ones(d_out), np.ones(d_in)
    for _ in range(TURNS):
        above, below = np.zeros(d_in), np.zeros(d_in)
        for rows, after, before in _blocks(new, old):
            scaled = before * s
            part = r[rows] = _ratio((after * scaled).sum(1), np.square(scaled).sum(1))
            own = before * part[:, None]
            above += (after * own).sum(0)
            below += np.square(own).sum(0)
        last, s = s, _ratio(above, below)
        if np.abs(s - last).max() < SETTLED:
            break
    left = size = 0.0
    for rows, after, before in _blocks(new, old):
        left += float(np.square(after - r[rows, None] * before * s).sum())
        size += float(np.square(after).sum())
    if not left <= size * min(LEFT[new.dtype], relative / 2) ** 2:
        return None
    # One factor is free between rows and columns: columns follow the anterior, or stand at 1.
    common = float(np.median(s))
    if expected is not None:
        ratios = _ratio(s, expected)
        middle = float(np.median(ratios))
        if middle and np.abs(ratios / middle - 1).max() < ALIKE < np.ptp(s / common):
            common = middle
    return r * common


def _ratio(above: Numbers, below: Numbers) -> Numbers:
    """Return a ratio, 1 where nothing is divided."""
    return np.divide(above, below, out=np.ones_like(above), where=below != 0)
