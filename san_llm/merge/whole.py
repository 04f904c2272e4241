"""A model of which every weight was trained: saved as a stock folder, and copied to hand it on."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from san_llm.files import read_json, refuse_link, sha256_of, write_json
from san_llm.merge.in_range import in_range
from san_llm.merge.write import Output, write_weights
from san_llm.models.locate import FoundBase
from san_llm.models.tokenizer import tokenizer_files, tokenizer_folder
from san_llm.models.weights import DTYPES, read_weights
from san_llm.progress import bar

GENERATION = "generation_config.json"
COMPANIONS = (GENERATION, "*processor_config.json", "LICENSE*", "NOTICE*")
DROPPED = ("_name_or_path", "torch_dtype", "transformers_version")  # of a config, when it is kept


@dataclass(frozen=True)
class WholeTask:
    """A model that was trained whole, and can be handed on.

    Attributes:
        found: The run's model.
        dtype: The dtype of the copy.
        shard_size: Bytes that one file of weights may hold.
    """

    found: FoundBase
    dtype: str
    shard_size: int


def copy_whole(task: WholeTask, folder: Path) -> tuple[dict[str, str], int]:
    """Write a model's weights and config in another dtype, or the same.

    Returns:
        The sha256 of each file of weights, and how many numbers the model has.
    """
    stored, dtype = read_weights(task.found.folder), task.dtype
    outputs = [
        in_range(Output(tensor.name, DTYPES[dtype], tensor.shape, tensor), dtype)
        for tensor in stored
    ]
    with bar("Copying", sum(output.size for output in outputs), "bytes") as progress:
        sums = write_weights(folder, outputs, task.shard_size, progress.advance)
    own = read_json(task.found.folder / "config.json")
    config = {key: value for key, value in own.items() if key not in DROPPED}
    write_json(folder / "config.json", config | {"dtype": dtype})
    return sums, sum(math.prod(tensor.shape) for tensor in stored)


def save_whole(model: Any, base: Path, folder: Path, shard_size: int) -> dict[str, str]:
    """Save a model that was trained whole as a stock folder, with what its base has beside it.

    Returns:
        The sha256 of each file of weights.
    """
    save_weights(model, folder, shard_size)
    copy_companions(base, folder, base)
    return {file.name: sha256_of(file) for file in sorted(folder.glob("*.safetensors"))}


def save_weights(model: Any, folder: Path, shard_size: int, **how: Any) -> None:
    """Save a model's weights and config; its base's generation settings are copied as a file.

    transformers before 5.23 refuses to write settings that go against each other, as many have.
    """
    from transformers import GenerationConfig

    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        model.save_pretrained(folder, max_shard_size=shard_size, **how)
    finally:
        model.generation_config = own
    (folder / GENERATION).unlink(missing_ok=True)


def copy_tokenizer(adapter: Path, folder: Path) -> None:
    """Copy the tokenizer of an adapter that has its own to one that goes on from it."""
    if tokenizer_folder(folder, adapter) == adapter:
        for file in tokenizer_files(folder, adapter):
            _copy(file, folder)


def copy_companions(source: Path, folder: Path, adapter: Path) -> None:
    """Copy the tokenizer, its chat template, how pictures and answers are made, and the licence.

    Args:
        source: The base's folder.
        folder: Where to.
        adapter: The adapter's, whose own tokenizer and template come before the base's.
    """
    files = [file for pattern in COMPANIONS for file in sorted(source.glob(pattern))]
    for file in [*tokenizer_files(source, adapter), adapter / GENERATION, *files]:
        if file.is_file() and not (folder / file.name).exists():
            _copy(file, folder)


def _copy(file: Path, folder: Path) -> None:
    refuse_link(file)
    shutil.copyfile(file, folder / file.name)
