"""LoRA, DoRA and IA3 merged by PEFT, in a model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from san_llm.files import sha256_of
from san_llm.models.adapter import load_adapter
from san_llm.models.load import load_base
from san_llm.models.locate import FoundBase
from san_llm.progress import bar


def merge_in_memory(
    found: FoundBase, adapter: Path, folder: Path, dtype: str, shard_size: int
) -> dict[str, str]:
    """Merge by PEFT in fp32, round once, save weights and config; return the checksums.

    Args:
        found: The base; its quantization is ignored.
        adapter: An adapter of a method that PEFT merges.
        folder: The folder to save in.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        shard_size: Bytes that one file may hold.

    Returns:
        The sha256 of each file of weights.

    Raises:
        InputError: when the base or the adapter cannot be loaded, or do not fit.
    """
    target = getattr(torch, dtype)
    with bar("Merging", 3, "parts") as progress:
        adapted = load_adapter(load_base(found, dtype=torch.float32), adapter)
        progress.advance(note="loaded")
        merged: Any = adapted.merge_and_unload(safe_merge=True).to(target)
        merged.config.dtype = target
        progress.advance(note="folded")
        merged.save_pretrained(folder, max_shard_size=shard_size)
        progress.advance(note="written")
    return {file.name: sha256_of(file) for file in sorted(folder.glob("*.safetensors"))}
