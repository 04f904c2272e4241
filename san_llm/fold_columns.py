"""Column scales moved where they cost nothing: into row scales and norm weights, or refused.

A weight in 4 bits has one scale a block of its row, so its rows can be scaled exactly and its
columns cannot. Every column scale of the ``scale`` carrier has another place (docs/method.md, the
lean form): what v_proj sends through attention goes into its own rows once more, and so does what
up_proj sends through the gated MLP; what all readers of one RMSNorm share goes into its weight.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from san_llm.errors import InputError
from san_llm.san.graph import FAMILIES, PARENTS, PropagationGraph
from san_llm.shards import Numbers


def fold_columns(
    graph: PropagationGraph, model_type: str, mode: str, gammas: Mapping[str, Numbers]
) -> tuple[dict[str, Numbers], dict[str, Numbers]]:
    """Return ``(rows, norms)``: scales by module name that stand for the whole adapter.

    Args:
        graph: Who feeds whom.
        model_type: The family, which says who reads which norm.
        mode: ``both``, ``neuron`` or ``synapse``.
        gammas: The neuron scale (d_out,) of each module that trains one.

    Returns:
        Row scales (d_out,) of Linears (of the embedding: of its features), and factors (hidden,)
        of what a norm multiplies by. A module that is not there is not scaled.

    Raises:
        InputError: when a carrier has other parts than a scale, or a norm has other readers than
            those whose columns are scaled.
    """
    for node in graph:
        if node.carrier != "scale":
            raise InputError(
                f"the {node.carrier} carrier changes weights within their 4-bit blocks; only the "
                "scale carrier can keep them"
            )
        if node.beta:
            raise InputError("a shift needs biases, which the 4-bit layers of the base do not have")
    rows = {} if mode == "synapse" else {name: gamma.copy() for name, gamma in gammas.items()}
    into_norms = {}
    for node in graph:
        if node.anterior is None or node.link is None or node.carry is None:
            continue
        gamma, (start, stop, *_) = gammas[node.anterior], node.carry
        if node.link.kind == "residual":
            into_norms[node.name] = gamma
        else:
            scale = rows.setdefault(node.anterior, np.ones_like(gamma))
            with np.errstate(over="ignore"):  # told where the merged numbers are looked at
                scale[start:stop] *= gamma[start:stop]
    return rows, _shared_by_readers(into_norms, model_type)


def _shared_by_readers(columns: Mapping[str, Numbers], model_type: str) -> dict[str, Numbers]:
    """Return column scales (hidden,) by posterior as factors by norm."""
    norms: dict[str, Numbers] = {}
    for name, scale in columns.items():
        block, _, linear = name.rsplit(".", 2)
        norm, readers = next(
            (norm, readers)
            for norm, readers in FAMILIES[model_type].norms.items()
            if linear in readers
        )
        for reader in readers:
            if f"{block}.{PARENTS[reader]}.{reader}" not in columns:
                raise InputError(
                    f"{block}.{norm}: {reader} reads it and has no column scale, {linear} has one: "
                    "it can neither move into the norm nor stay in 4-bit columns"
                )
        norms[f"{block}.{norm}"] = scale  # one anterior feeds all readers of a norm
    return norms
