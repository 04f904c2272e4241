"""A merge in a model in memory: by PEFT, or over the base as it was quantized in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from san_llm.files import sha256_of
from san_llm.merge.checked import answered, check_answers
from san_llm.merge.peft import fold
from san_llm.merge.quantized import keep, round_plain
from san_llm.merge.stock_logits import in_fp32, place_in_fp32
from san_llm.merge.whole import save_weights
from san_llm.models.adapter import load_adapter
from san_llm.models.load import load_base, numbers_in
from san_llm.models.locate import FoundBase
from san_llm.models.quantize import dequantize
from san_llm.models.reading import is_finite
from san_llm.progress import bar
from san_llm.runs.record import Checked


def merge_in_memory(
    way: str | None,
    found: FoundBase,
    adapter: Path,
    folder: Path,
    dtype: str,
    shard_size: int,
    check: bool,
) -> tuple[dict[str, str], int, Checked | None]:
    """Merge in fp32, round once, save weights and config.

    Args:
        way: None merges into the full-precision base; ``dequantize`` and ``keep`` over it as it was
            quantized in training, see ``merge.quantized``.
        found: The base, with its quantization where it is merged over.
        adapter: An adapter; to keep 4 bits, a SAN adapter of the scale carrier.
        folder: The folder to save in.
        dtype: ``float32``, ``bfloat16`` or ``float16``; of a model in 4 bits, of what is not.
        shard_size: Bytes that one file may hold.
        check: Compare answers before and after.

    Returns:
        The sha256 of each file of weights, how many numbers the model has, and what was compared.

    Raises:
        InputError: when something cannot be loaded, does not fit, or cannot be kept in 4 bits.
        SanError: when the merged model answers otherwise.
    """
    target = getattr(torch, dtype)
    with bar("Merging", 3, "parts") as progress:
        adapted = _adapted(way, found, adapter)
        progress.advance(note="loaded")
        before = answered(adapted) if check else None
        merged: Any = keep(adapted) if way == "keep" else fold(adapted, adapter)
        checked = None if before is None else _checked(adapter, before, merged)
        round_plain(merged, target)
        merged.config.dtype = target
        progress.advance(note="folded")
        # As it stands: a reverse of how it was loaded is not implemented for 4-bit layers.
        save_weights(merged, folder, shard_size, save_original_format=way is None)
        progress.advance(note="written")
    sums = {file.name: sha256_of(file) for file in sorted(folder.glob("*.safetensors"))}
    return sums, sum(_size(parameter) for parameter in merged.parameters()), checked


def _adapted(way: str | None, found: FoundBase, adapter: Path) -> Any:
    if way is None:
        return load_adapter(load_base(found, dtype=torch.float32), adapter)
    if way == "dequantize":
        # Four bits may fit on a GPU that has no room for what they are made into.
        wide = load_base(found, place=place_in_fp32(numbers_in(found)))
        return load_adapter(dequantize(wide), adapter)
    adapted = load_adapter(load_base(found), adapter)
    in_fp32(adapted)
    return adapted


def _checked(adapter: Path, before: torch.Tensor, merged: Any) -> Checked | None:
    after = answered(merged)
    # Told by the weight's name, when its file is read again.
    return check_answers(adapter, before, after) if is_finite(after) else None


def _size(parameter: Any) -> int:
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())
