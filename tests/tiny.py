"""Small real things that many tests need: a LLaMA of a few thousand weights, a tokenizer, rows."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
)

CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_config(**changes: Any) -> LlamaConfig:
    """Return a LLaMA config: 4 blocks, hidden 32, 4 heads, 2 kv heads, untied embeddings."""
    settings: dict[str, Any] = {
        "vocab_size": len(CHARACTERS) + 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**(settings | changes))


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Return a random LLaMA with weights large enough that every part matters to the logits."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(initializer_range=0.2, **changes))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    return model.to(dtype).eval()


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [4.0, 6.0, 8.0, 12.0],
}


def tiny_phi3(switch: int, seed: int = 0) -> Any:
    """Return a random Phi-3 of that shape, whose rows beyond ``switch`` tokens rotate otherwise."""
    torch.manual_seed(seed)
    shape = tiny_config().to_dict()
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "pad_token_id")
    heads = ("num_attention_heads", "num_key_value_heads", "bos_token_id", "eos_token_id")
    config = Phi3Config(
        **{key: shape[key] for key in (*kept, *heads)},
        max_position_embeddings=1024,
        original_max_position_embeddings=switch,
        rope_parameters=LONGROPE | {"original_max_position_embeddings": switch},
        initializer_range=0.2,
    )
    return Phi3ForCausalLM(config).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token a character, and ``</s>`` as its end-of-text token."""
    special = ["<s>", "</s>", "<pad>", "<unk>"]
    words = {token: number for number, token in enumerate([*special, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )


def save_tiny(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Save a tiny LLaMA and its tokenizer as a checkpoint and return its folder."""
    tiny_model(dtype=dtype, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def rows(count: int) -> list[dict[str, str]]:
    """Return boolq-like rows of different lengths in the LLM-Adapters form."""
    return [
        {
            "instruction": f"Is {number} {'x' * (number % 7)} even?",
            "input": "",
            "output": f"the correct answer is {'false' if number % 2 else 'true'}",
            "answer": "false" if number % 2 else "true",
        }
        for number in range(count)
    ]


def write_rows(path: Path, values: list[dict[str, str]]) -> Path:
    """Write rows as JSON and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def write_recipe(path: Path, base: Path, train: Path, /, **sections: dict[str, Any]) -> Path:
    """Write a recipe for a tiny base: 4 steps of 4 rows in fp32, SAN; sections override keys."""
    recipe: dict[str, dict[str, Any]] = {
        "base": {"model": str(base), "dtype": "float32"},
        "method": {"name": "san"},
        "data": {"train": str(train), "held_out": 4, "prompt": "alpaca", "loss": "response"},
        "training": {
            "epochs": 1,
            "max_steps": 4,
            "batch_size": 4,
            "micro_batch_size": 2,
            "learning_rate": 1e-2,
            "warmup_steps": 0,
            "evaluate_every": 2,
        },
    }
    for section, keys in sections.items():
        recipe[section] = recipe.get(section, {}) | keys
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML, too
    return path
