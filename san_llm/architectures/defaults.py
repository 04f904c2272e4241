"""What a family's config class takes where a ``config.json`` is silent.

Values of transformers' own classes (``LlamaConfig``, ...), so that a config means here what it
means to the model that is loaded from it, and no stage needs torch to know.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LLAMA = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,  # as many as there are query heads
    "head_dim": None,  # hidden_size shared out over the query heads
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_QWEN2 = _LLAMA | {"vocab_size": 151_936, "intermediate_size": 22_016, "num_key_value_heads": 32}
_QWEN2 |= {"max_position_embeddings": 32_768}
_GEMMA = _LLAMA | {"vocab_size": 256_000, "hidden_size": 3072, "intermediate_size": 24_576}
_GEMMA |= {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 16}
_GEMMA |= {"head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True}
_GEMMA2 = _GEMMA | {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
_GEMMA2 |= {"num_attention_heads": 8, "num_key_value_heads": 4}
_PHI3 = _LLAMA | {"vocab_size": 32_064, "hidden_size": 3072, "intermediate_size": 8192}
_PHI3 |= {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}

DEFAULTS: dict[str, Mapping[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA
    | {"intermediate_size": 14_336, "num_key_value_heads": 8, "max_position_embeddings": 131_072},
    "qwen2": _QWEN2,
    "qwen3": _QWEN2 | {"head_dim": 128},
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2 | {"vocab_size": 262_208, "max_position_embeddings": 131_072},
    "phi3": _PHI3,
}


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ``config.json`` with what its class takes where it is silent.

    Of a family that is not known nothing is filled in.
    """
    return {**DEFAULTS.get(str(config.get("model_type")), {}), **config}
