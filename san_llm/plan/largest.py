"""The largest micro-batch of a recipe's rows, tokenized and packed as training does it."""

from __future__ import annotations

from heapq import nlargest
from typing import Any

from san_llm.architectures.lookup import is_known
from san_llm.data.batches import Pack, Pad, pad_id
from san_llm.data.encode import encoding_of
from san_llm.data.split import split_held_out
from san_llm.data.tokenized import encode_rows
from san_llm.models.locate import find_base
from san_llm.models.tokenizer import training_tokenizer
from san_llm.plan.memory import Batch
from san_llm.plan.planned import Seen
from san_llm.recipe.schema import Recipe


def look_at(recipe: Recipe, micro_batch: int) -> Seen:
    """Return what a recipe's rows come to; the training then finds their tokens in the cache.

    Args:
        recipe: The recipe whose rows are looked at.
        micro_batch: How many rows are computed at once.

    Raises:
        InputError: when the rows or the tokenizer cannot serve.
    """
    rows = split_held_out(recipe).train
    found = find_base(recipe.base)
    tokenizer = training_tokenizer(recipe, found)
    encoding = encoding_of(recipe.data, tokenizer, found.vocabulary)
    encoded = encode_rows(rows, encoding).rows
    lengths = [len(row) for row in encoded["input_ids"]]
    longest = nlargest(micro_batch, range(len(lengths)), key=lengths.__getitem__)
    batch = [encoded[index] for index in longest]
    if recipe.training.packing and is_known(found.config["model_type"]):
        return Seen(len(lengths), _packed(batch, share=True), _packed(batch, share=False))
    padded = Pad(pad_id(tokenizer))(batch)
    tokens, width = padded["input_ids"].numel(), padded["input_ids"].shape[1]
    learned = int((padded["labels"][:, 1:] != -100).sum())
    masked = not bool(padded["attention_mask"].all())
    largest = Batch(tokens, learned, width, packed=False, masked=masked)
    return Seen(len(lengths), largest, largest)


def _packed(rows: list[dict[str, Any]], share: bool) -> Batch:
    batch = Pack(share)(rows)
    return Batch(
        tokens=batch["input_ids"].numel(),
        learned=len(batch["labels"]),
        longest=max(row.length for row in batch["layout"]),
        packed=True,
        masked=False,
    )
