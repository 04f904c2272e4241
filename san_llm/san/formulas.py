"""The formulas of every carrier, written once; the layer and the merge both call them.

A carrier holds the neuron scale. ``scale`` is a vector of its own. ``lora`` and ``dora`` hold it in
the row norms of ``V = W + c B A`` (c = alpha / r), from which the paper's decomposition takes it:

    carrier   features in mode both      gamma that is propagated
    scale     gamma * (W (s x) + b)      gamma
    lora      V (s x) + b                norm(V) / norm(W)
    dora      m / norm(V) * V (s x) + b  m / norm(W)

Mode ``neuron`` propagates nothing. Mode ``synapse`` takes gamma out of the features, so that it
acts only where it is propagated to: W for ``scale`` and ``norm(W) / norm(V) * V`` for the others.
Source: arXiv:2409.06706; the norm over d_in and the synapse row of ``lora`` and ``dora`` are our
reading. Arrays may be torch tensors or numpy arrays.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeVar

from san_llm.architectures.decoders import DOWN, GATE_UP
from san_llm.architectures.entry import Carry

Array = TypeVar("Array")


def scales(carrier: str, mode: str, own: Any, norms: Callable[[], tuple[Any, Any]]) -> Any:
    """Return ``(row scale, gamma)``, each (d_out,) or None for 1; gamma is what is propagated.

    Args:
        carrier: ``scale``, ``lora`` or ``dora``.
        mode: ``both``, ``neuron`` or ``synapse``.
        own: The vector that the carrier trains: gamma of ``scale``, m of ``dora``, or None.
        norms: Computes what :func:`row_norms` returns; called where it is needed.
    """
    if carrier == "scale":
        return (None if mode == "synapse" else own), own
    if carrier == "lora" and mode == "neuron":
        return None, None
    norm, adapted = norms()
    if carrier == "lora":
        gamma = adapted / norm
        return (1 / gamma if mode == "synapse" else None), gamma
    gamma = None if own is None else own / norm
    return (norm if own is None or mode == "synapse" else own) / adapted, gamma


def merged_weight(
    weight: Array,
    row_scale: Array | None,
    delta: Array | None,
    s: Array | None,
    in_place: bool = False,
    axes: tuple[int, int] = (0, 1),
) -> Array:
    """Return ``W* = diag(row_scale) (W + delta) diag(s)``.

    Args:
        weight: W, (d_out, d_in), in the precision to compute in; or with further axes behind, as a
            convolution has.
        row_scale: What the features are multiplied by, (d_out,), or None for 1.
        delta: ``c B A``, (d_out, d_in), or None for 0.
        s: Synapse scale (d_in,), or None for 1.
        in_place: Whether to overwrite W.
        axes: Where the weight has its rows and its columns; (1, 0) in a table of tokens, whose
            features are its columns, and in GPT-2's transposed Linears.
    """
    plus: Any = operator.iadd if in_place else operator.add
    times: Any = operator.imul if in_place else operator.mul
    if delta is not None:
        weight = plus(weight, delta)
    if row_scale is not None:
        weight = times(weight, along(row_scale, axes[0], weight.ndim))  # type: ignore[attr-defined]
    if s is not None:
        weight = times(weight, along(s, axes[1], weight.ndim))  # type: ignore[attr-defined]
    return weight


def along(vector: Any, axis: int, axes: int) -> Any:
    """Return a vector so that it multiplies a weight of so many axes along one; None as it is."""
    if vector is None:
        return None
    shape = [1] * axes
    shape[axis] = -1
    return vector.reshape(shape)


def inner_scale(gamma: Any, d_in: int, mode: str, kinds: tuple[str, ...]) -> Any:
    """Return s of each expert's down, (E, i), which is the gamma of its up; or None for 1.

    Args:
        gamma: Of the experts, (E, 2 i + d): each one's gate, up and down; or None.
        d_in: d.
        mode: ``both``, ``neuron`` or ``synapse``.
        kinds: The kinds of links that are on.
    """
    if gamma is None or mode == "neuron" or "mlp" not in kinds:
        return None
    inside = (gamma.shape[1] - d_in) // 2
    return gamma[:, inside : 2 * inside]


def expert_factors(rows: Any, columns: Any, inner: Any, d_in: int) -> dict[str, tuple[Any, Any]]:
    """Return by name what the two weights of experts are multiplied by, one after the other.

    Args:
        rows: What each expert's features are multiplied by, (E, 2 i + d), or None for 1.
        columns: What all experts' inputs are, (d,), or None for 1.
        inner: What down's are, (E, i), or None for 1.
        d_in: d.

    Returns:
        Of gate and up, (E, 2 i, d), and of down, (E, d, i): each with axes of size 1, or None.
    """
    wide, narrow = (None, None) if rows is None else (rows[:, :-d_in, None], rows[:, -d_in:, None])
    return {
        GATE_UP: (wide, along(columns, 2, 3)),
        DOWN: (narrow, None if inner is None else inner[:, None]),
    }


def merged_bias(bias: Array | None, gamma: Array | None, beta: Array | None) -> Array | None:
    """Return ``b* = gamma * b + beta``, or None where neither a bias nor a shift exists.

    Args:
        bias: b, (d_out,), or None.
        gamma: Neuron scale (d_out,), or None for 1 (the bias of ``lora`` and ``dora`` stays).
        beta: Neuron shift (d_out,), or None for 0.
    """
    if bias is not None and gamma is not None:
        bias = gamma * bias  # type: ignore[operator]
    if beta is not None:
        bias = beta if bias is None else bias + beta  # type: ignore[operator]
    return bias


def squared_row_norms(weight_squared: Any, projected: Any, a: Any, b: Any, c: float) -> Any:
    """Return the squared row norms of ``W + c B A`` (d_out,), without forming it.

    ``|W_i|^2 + 2 c <(W A^T)_i, B_i> + c^2 B_i (A A^T) B_i^T`` costs rank / tokens of the layer's
    own product, and no (d_out, d_in) temporary.

    Args:
        weight_squared: ``|W_i|^2``, (d_out,).
        projected: ``W A^T``, (d_out, rank).
        a: A, (rank, d_in).
        b: B, (d_out, rank).
        c: alpha / rank.
    """
    cross = (projected * b).sum(-1)
    square = ((b @ (a @ a.T)) * b).sum(-1)
    return weight_squared + 2 * c * cross + c * c * square


def row_norms(weight_squared: Any, adapted_squared: Any) -> tuple[Any, Any]:
    """Return ``(norm(W), norm(V))`` of each row, (d_out,).

    A row of zeros in W, pruned or never used, has no norm to compare with. Both count as 1 there:
    its gamma starts at 1 as all do, where it would be 0 / 0, and with ``lora`` it stays there.

    Args:
        weight_squared: ``|W_i|^2``, (d_out,).
        adapted_squared: ``|V_i|^2``, (d_out,).
    """
    zeros = weight_squared == 0
    # Before the root, whose derivative at 0 is none.
    norm, adapted = ((s * ~zeros + zeros) ** 0.5 for s in (weight_squared, adapted_squared))
    return norm, adapted


STILL = 1e-6  # a scale this near to 1 did not move: norms in fp32 are not known better


def carried(gamma: Any, carry: Carry) -> Any:
    """Return the synapse scale s (d_in,) that a gamma (d_out,) becomes: some rows, or all heads.

    Args:
        gamma: Of the anterior, or any vector over its rows.
        carry: Which of its channels go where; the channels of a key and value head are repeated
            together, once for each query head that shares it.
    """
    start, stop, groups, head_dim, parts, tile = carry
    if parts > 1:
        gamma = gamma.reshape(parts, -1)[:, start:stop].reshape(-1)
    elif stop - start < len(gamma):
        gamma = gamma[start:stop]
    return _repeated(_repeated(gamma, groups, head_dim), tile, 0)


def _repeated(vector: Any, times: int, length: int) -> Any:
    """Return a vector whose stretches of a length, 0: all of it, each stand some times in a row."""
    if times == 1:
        return vector
    stretches = vector.reshape(-1, length or len(vector))
    repeat = getattr(stretches, "repeat_interleave", stretches.repeat)  # torch's word, numpy's
    return repeat(times, 0).reshape(-1)
