"""That a base's files say one thing: its config, its weights, what lies beside them.

Asked before a base is trained over, questioned or merged into, so that no stage reads another model
than the stage before it. By the headers of the weights' files, which takes no time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from san_llm.architectures.decoders import EMBEDDING, FAMILIES, PARENTS
from san_llm.architectures.lookup import is_known, place_of
from san_llm.architectures.sizes import check_sizes, linear_shapes
from san_llm.errors import InputError
from san_llm.models.locate import FoundBase
from san_llm.models.weights import SIZES, Stored, passed_over, read_bytes, read_weights
from san_llm.progress import say
from san_llm.runs.record import ADAPTER_CONFIG
from san_llm.san.measured import stock_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EMBEDDED, HEAD = f"model.{EMBEDDING}.weight", "lm_head.weight"


say_once = cache(say)  # a base is asked about by every stage of a command


def check_base(found: FoundBase) -> None:
    """Refuse a base whose files contradict each other, as far as they are known by their names.

    Raises:
        InputError: naming the file, and what to do.
    """
    folder, config = found.folder, found.config
    known = is_known(config.get("model_type"))
    if known:
        check_sizes(config)
    else:
        stock_config(config)  # refuses what transformers has no model for
    if (folder / ADAPTER_CONFIG).is_file():
        raise InputError(
            f"{folder / ADAPTER_CONFIG}: an adapter in the folder of a base: transformers would "
            "put it on top of the base in silence; move its files to a folder of their own and "
            "name that with --adapter, or merge it first"
        )
    two_sets = passed_over(folder)
    if two_sets is not None and "WORLD_SIZE" not in os.environ:  # not by each process
        say_once(two_sets)
    stored = {tensor.name: tensor for tensor in read_weights(folder)}
    if known:  # of others, transformers says it as they are loaded
        _check_blocks(found, stored)
        if found.bits is None:
            _check_whole(found, stored)
    if known and config["tie_word_embeddings"] and HEAD in stored:
        _check_tied(found, stored[HEAD], stored.get(EMBEDDED))


def _check_blocks(found: FoundBase, stored: dict[str, Stored]) -> None:
    """Refuse weights that are another model's: other blocks, a part that is missing."""
    config = found.config
    numbers = {place_of(name.rpartition(".")[0])[0] for name in stored} - {None}
    count: int = config["num_hidden_layers"]
    if numbers and numbers != set(range(count)):
        raise InputError(
            f"{found.folder}: its config.json has num_hidden_layers {count}, its "
            f"weights have {len(numbers)} blocks"
        )
    needed = [EMBEDDED, "model.norm.weight"]
    if not config["tie_word_embeddings"]:
        needed.append(HEAD)
    for block in range(count):
        parts = [f"{PARENTS[target]}.{target}" for target in linear_shapes(config)]
        parts += FAMILIES[config["model_type"]].norms
        needed += [f"model.layers.{block}.{part}.weight" for part in parts]
    for name in needed:
        if name not in stored:
            hint = f"they begin with {min(stored)}" if stored else "they are empty"
            if name == HEAD:
                hint = "config.json does not tie it to the embedding: tie_word_embeddings is false"
            raise InputError(f"{found.folder}: its weights have no {name}; {hint}")


def _check_whole(found: FoundBase, stored: dict[str, Stored]) -> None:
    """Refuse weights of another shape than the config's, or in numbers that are no weights."""
    config = found.config
    shapes = {EMBEDDED: (config["vocab_size"], config["hidden_size"])}
    for target, shape in linear_shapes(config).items():
        for block in range(config["num_hidden_layers"]):
            shapes[f"model.layers.{block}.{PARENTS[target]}.{target}.weight"] = shape
    for name, shape in shapes.items():
        tensor = stored[name]
        if tensor.dtype not in SIZES:
            raise InputError(
                f"{tensor.file}: {name} is stored as {tensor.dtype}, and config.json has no "
                f"quantization_config that says how to read it; expected {', '.join(SIZES)}"
            )
        if tensor.shape != shape:
            raise InputError(
                f"{found.folder}: {name} has the shape {tensor.shape}, by its config.json it is "
                f"{shape}"
            )


def _check_tied(found: FoundBase, head: Stored, embedding: Stored | None) -> None:
    """Refuse a head that is tied by the config and another matrix in the file."""
    if embedding is None or (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
        same = False
    else:
        pairs = zip(read_bytes(head), read_bytes(embedding), strict=True)
        same = all(one == other for one, other in pairs)
    if not same:
        raise InputError(
            f"{found.folder}: config.json says tie_word_embeddings, but {HEAD} is not {EMBEDDED}: "
            "readers take the one or the other; set it to false, or take the head out"
        )


def refuse_past_embedding(
    tokens: Sequence[int], vocabulary: int, where: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Refuse a token that the model's embedding has no row for.

    Raises:
        InputError: naming where it is, the token and both sizes.
    """
    largest = max(tokens, default=0)
    if largest >= vocabulary:
        token = tokenizer.convert_ids_to_tokens(largest)
        known = 1 + max(tokenizer.get_vocab().values())
        raise InputError(
            f"{where}: the token {token!r} has the id {largest:,}, past the model's embedding of "
            f"{vocabulary:,} rows (its tokenizer has {known:,} tokens): take it out of the "
            "tokenizer, or resize the embedding (resize_token_embeddings) and save the model"
        )
