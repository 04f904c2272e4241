"""A merge looked at as it ends, so cheaply that every merge is; ``verify`` is the whole proof.

A merge that streams SAN's scales is held against the method's formula in some rows of every tensor.
One that goes through a model in memory is asked the same tokens before and after it is merged.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from san_llm.errors import SanError
from san_llm.merge.expected import check_errors, stored_rows, weight_errors
from san_llm.models.adapter import Adapter
from san_llm.models.locate import FoundBase
from san_llm.models.weights import Stored
from san_llm.runs.record import Checked

if TYPE_CHECKING:
    from torch import Tensor

LOW_RANK_TENSORS = 8  # of a low-rank carrier: each row of them may take the norms of a whole weight
SEQUENCES, TOKENS = 2, 24
ALLOWED = 1e-3  # of the logits' spread: what fp32 sums in another order do, with a margin


def sampled_rows(tensor: Stored) -> list[tuple[int, int]]:
    """Return the first row of a tensor, its last, and one between that its name decides."""
    rows = tensor.shape[0]
    chosen = {0, rows - 1, zlib.crc32(tensor.name.encode()) % rows}
    return [(row, row + 1) for row in sorted(chosen)]


def check_rows(found: FoundBase, adapter: Adapter, merged: Path, dtype: str) -> Checked:
    """Hold some rows of a merged model against the formula.

    Args:
        found: The base.
        adapter: A SAN adapter.
        merged: The merged model's folder.
        dtype: The dtype of its weights.

    Raises:
        SanError: naming the weight that rounding does not explain.
    """
    low_rank = adapter.options.get("carrier") not in (None, "scale")
    rows = 0

    def blocks(tensor: Stored) -> list[tuple[int, int]]:
        nonlocal rows
        chosen = sampled_rows(tensor)
        rows += len(chosen)
        return chosen

    errors = weight_errors(
        stored_rows(found.folder),
        found.config,
        adapter,
        merged,
        dtype,
        blocks=blocks,
        most=LOW_RANK_TENSORS if low_rank else None,
    )
    check_errors(merged, errors, dtype)
    return Checked(f"{rows:,} rows of {len(errors):,} weights", max(errors.values()))


def answered(model: Any) -> Tensor:
    """Return the logits (sequences, tokens, vocabulary) of some tokens drawn by a seed."""
    import torch

    drawn = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (SEQUENCES, TOKENS), generator=drawn)
    with torch.no_grad():
        logits: Tensor = model.eval()(tokens.to(model.device)).logits
    return logits.float().cpu()


def check_answers(adapter: Path, before: Tensor, after: Tensor) -> Checked:
    """Compare what base + adapter answered with what the merged model in memory does.

    Raises:
        SanError: when they are further apart than fp32 explains.
    """
    apart = float((after - before).abs().max() / before.std())
    if not apart <= ALLOWED:
        raise SanError(
            f"{adapter}: merged, it answers otherwise than on its base: logits are {apart:.3g} of "
            f"their spread apart where {ALLOWED:g} is allowed; nothing is written"
        )
    return Checked(f"the logits of {before.shape[0] * before.shape[1]} tokens", apart)
