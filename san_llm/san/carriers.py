"""The weight formula of each carrier, written once; the layer and the merge both call it.

Arrays may be torch tensors or numpy arrays: only ``*``, ``+`` and indexing are used.
"""

from __future__ import annotations

from typing import TypeVar

Array = TypeVar("Array")


def merged_weight(weight: Array, gamma: Array | None, s: Array | None) -> Array:
    """Return ``W* = diag(gamma) W diag(s)`` for the ``scale`` carrier.

    Args:
        weight: W, (d_out, d_in), in the precision to compute in.
        gamma: Neuron scale (d_out,), or None for 1.
        s: Synapse scale (d_in,), or None for 1.
    """
    if gamma is not None:
        weight = gamma[:, None] * weight  # type: ignore[index]
    if s is not None:
        weight = weight * s  # type: ignore[operator]
    return weight


def merged_bias(bias: Array | None, gamma: Array | None, beta: Array | None) -> Array | None:
    """Return ``b* = gamma * b + beta``, or None where neither a bias nor a shift exists.

    Args:
        bias: b, (d_out,), or None.
        gamma: Neuron scale (d_out,), or None for 1.
        beta: Neuron shift (d_out,), or None for 0.
    """
    if bias is not None and gamma is not None:
        bias = gamma * bias  # type: ignore[operator]
    if beta is not None:
        bias = beta if bias is None else bias + beta  # type: ignore[operator]
    return bias
