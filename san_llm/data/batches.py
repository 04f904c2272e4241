"""Collating without padding: rows behind one another, what they begin alike encoded once.

The rows of a batch are merged into a tree of prefixes. Every node is one token of the packed
sequence, and its position is its depth; a row is a path. In a causal model a token's features
depend on its path alone, so a shared node has the features that each row would have computed, and
its gradient is the sum of theirs. That is exact unless something is drawn at random for each row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from san_llm.data.encode import IGNORE
from san_llm.errors import SanError
from san_llm.ops.causal import Segment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Pack:
    """Collator: packs rows into one sequence.

    Attributes:
        share: Encode what rows begin alike once; off where dropout must differ between rows.
    """

    share: bool

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Any]:
        """Return a batch of N packed tokens and S learned ones from R rows.

        ``input_ids`` and ``position_ids`` are (1, N). ``sources`` (S,) are the packed tokens whose
        features predict ``labels`` (S,). ``layout`` tells attention how rows lie in the sequence: a
        segment for each row that has tokens of its own, which together are all tokens, in order.
        """
        tokens: list[int] = []
        positions: list[int] = []
        layout: list[Segment] = []
        sources: list[int] = []
        labels: list[int] = []
        children: dict[tuple[int, int], int] = {}  # (parent node, token) -> node
        for row in rows:
            path: list[int] = []
            start = len(tokens)
            node = -1
            learned = [i for i, label in enumerate(row["labels"]) if label != IGNORE and i]
            # The last learned token is predicted, but nothing is predicted from it.
            seen = row["input_ids"][: learned[-1] if learned else 1]
            for position, token in enumerate(seen):
                child = children.get((node, token)) if self.share else None
                if child is None:
                    child = len(tokens)
                    children[node, token] = child
                    tokens.append(token)
                    positions.append(position)
                node = child
                path.append(node)
            own = len(tokens) - start
            if own:
                layout.append(Segment(start, len(tokens), _spans(path[: len(path) - own])))
            sources += [path[i - 1] for i in learned]
            labels += [row["labels"][i] for i in learned]
        targets = torch.tensor(labels, dtype=torch.long)
        return {
            "input_ids": torch.tensor([tokens]),
            "position_ids": torch.tensor([positions]),
            "sources": torch.tensor(sources, dtype=torch.long),
            # Trainer counts these; under this name it takes them for already shifted.
            "shift_labels": targets,
            "labels": targets,
            "layout": layout,
        }


def _spans(path: list[int]) -> tuple[tuple[int, int], ...]:
    """Return the stretches of tokens that stand together in a path."""
    spans: list[tuple[int, int]] = []
    for node in path:
        if spans and spans[-1][1] == node:
            spans[-1] = (spans[-1][0], node + 1)
        else:
            spans.append((node, node + 1))
    return tuple(spans)


@dataclass(frozen=True)
class Pad:
    """Collator: pads rows on the right, to a multiple of 8 tokens.

    Attributes:
        pad_id: The token to pad with; it is masked, so its value does not matter.
    """

    pad_id: int

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Return ``input_ids``, ``attention_mask`` and ``labels``, each (batch, tokens)."""
        longest = max(len(row["input_ids"]) for row in rows)
        width = -(-longest // 8) * 8
        batch = {
            "input_ids": torch.full((len(rows), width), self.pad_id),
            "attention_mask": torch.zeros(len(rows), width, dtype=torch.long),
            "labels": torch.full((len(rows), width), IGNORE),
        }
        for i, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["input_ids"][i, :length] = torch.tensor(row["input_ids"])
            batch["attention_mask"][i, :length] = 1
            batch["labels"][i, :length] = torch.tensor(row["labels"])
        return batch


def pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return a token to pad with: the tokenizer's own, else its end-of-text token.

    Raises:
        SanError: when the tokenizer has neither.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise SanError(f"{tokenizer.name_or_path}: its tokenizer has no token to pad with")
