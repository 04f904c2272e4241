"""How well a model says texts itself: the negative log-likelihood of what is learned of rows.

Rows are packed into one forward as questions are, see ``ask.likelihood``, and what all begin with
is computed once. Of the logits there are never more than some rows at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from san_llm.ask.likelihood import FORWARD_TOKENS, Branches, Tree
from san_llm.ask.packed import can_pack, inner, packing, shared_prefix
from san_llm.data.encode import IGNORE
from san_llm.measure.behaviour import taken
from san_llm.ops.head_loss import Head, from_head, losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Row = tuple[list[int], list[int]]  # tokens, and the same where they are learned, elsewhere -100


def score_losses(model: PreTrainedModel, rows: Sequence[Row]) -> Iterator[float]:
    """Give the summed negative log-likelihood of each row's learned tokens, in nats.

    Args:
        model: A causal LM, in eval mode.
        rows: Each with one learned token at least, and none of them its first token.
    """
    longest = max((len(tokens) for tokens, _ in rows), default=0)
    packs = can_pack(model, longest)
    with packing(model) if packs else torch.inference_mode():
        yield from _packed(model, rows) if packs else _plain(model, rows)


def _learned(labels: list[int]) -> list[int]:
    return [place for place, label in enumerate(labels) if label != IGNORE]


def _plain(model: PreTrainedModel, rows: Sequence[Row]) -> Iterator[float]:
    """Give the losses by a forward a row, where a model cannot be packed."""
    for tokens, labels in rows:
        places = _learned(labels)
        made = _forward(model, tokens[: places[-1]], [place - 1 for place in places], labels)
        yield made.sum().item()


def _packed(model: PreTrainedModel, rows: Sequence[Row]) -> Iterator[float]:
    places = [_learned(labels) for _, labels in rows]
    prompts = [tokens[: of_row[0]] for (tokens, _), of_row in zip(rows, places, strict=True)]
    prefix = shared_prefix(model, prompts)
    waiting = deque(zip(rows, places, strict=True))
    while waiting:
        trees: list[Tree] = []
        wanted: list[int] = []
        targets: list[int] = []
        counts: list[int] = []
        total = 0
        while waiting and (not trees or total + waiting[0][1][-1] <= FORWARD_TOKENS):
            (tokens, labels), of_row = waiting.popleft()
            # Nothing is predicted from the last learned token.
            trees.append(Tree(tokens[prefix.length : of_row[-1]], ()))
            wanted += [total + place - 1 - prefix.length for place in of_row]
            targets += [labels[place] for place in of_row]
            counts.append(len(of_row))
            total += len(trees[-1].tokens)
        made = _forward(
            model,
            [token for tree in trees for token in tree.tokens],
            wanted,
            targets,
            [prefix.length + depth for tree in trees for depth in tree.depths],
            Branches(prefix, trees),
        )
        ends = list(accumulate(counts))
        yield from (made[end - n : end].sum().item() for end, n in zip(ends, counts, strict=True))


def _forward(
    model: PreTrainedModel,
    tokens: Sequence[int],
    wanted: Sequence[int],
    targets: Sequence[int],
    positions: Sequence[int] | None = None,
    past: Branches | None = None,
) -> Tensor:
    """Return the losses of targets (n,), each predicted from one of the wanted tokens.

    Args:
        model: Inside :func:`san_llm.ask.packed.packing` where tokens are packed.
        tokens: The tokens of all rows.
        wanted: The numbers of the tokens that predict.
        targets: What they predict; of a row's labels those that are learned.
        positions: Of packed tokens: the position of each in its own row.
        past: Of packed tokens: what each attends to.
    """
    device = model.device
    learned = torch.tensor([label for label in targets if label != IGNORE], device=device)
    rows = torch.tensor(wanted, dtype=torch.long, device=device)
    packed: dict[str, Any] = {}
    if positions is not None:
        packed = {"position_ids": torch.tensor([positions], device=device), "past": past}

    keep = taken(model, logits_to_keep=rows)

    def of_wanted(hidden: Tensor, head: Head, cap: float | None) -> Tensor:
        return losses(hidden[0] if keep else hidden[0, rows], head, cap, learned)

    return from_head(
        model,
        inner(model).config,
        of_wanted,
        input_ids=torch.tensor([tokens], device=device),
        use_cache=False,
        **keep,
        **packed,
    )
