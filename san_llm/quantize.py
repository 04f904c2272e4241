"""The only file that knows bitsandbytes: how a base is loaded in 4 or 8 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

Quantization = Literal["4bit", "8bit"]


def quantization_config(quantization: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return how to load a base in 4 bits (nf4, double quantization, as QLoRA) or 8 bits.

    Args:
        quantization: ``4bit`` or ``8bit``.
        dtype: The dtype that 4-bit layers compute in.
    """
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
