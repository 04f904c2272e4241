"""A tiny LLaMA as a GGUF file, written by the format's own library as llama.cpp does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from tiny import tiny_model
from tokenizers.pre_tokenizers import ByteLevel

BYTES = sorted(ByteLevel.alphabet())
MERGED = ["th", "the", "Ġthe"]
SPECIAL = ["<|end|>", "<|start|>"]
VOCABULARY = [*SPECIAL, *BYTES, *MERGED]
MERGES = ["t h", "th e", "Ġ the"]
END, START = 0, 1
BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_model(**changes: Any) -> Any:
    """Return the tiny model that :func:`write_gguf` can write: its vocabulary is in the file."""
    return tiny_model(
        vocab_size=len(VOCABULARY),
        bos_token_id=START,
        eos_token_id=END,
        pad_token_id=None,
        rms_norm_eps=1e-5,
        **changes,
    )


def _interleaved(weight: Any, heads: int) -> Any:
    """Return a q or k weight with the halves of each head interleaved, as llama.cpp stores it."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: Any, architecture: str = "llama") -> Path:
    """Write a model and a byte-level tokenizer in fp32 and return the path."""
    config = model.config
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(VOCABULARY)
    kinds = [TokenType.CONTROL] * len(SPECIAL) + [TokenType.NORMAL] * (len(BYTES) + len(MERGED))
    writer.add_token_types(kinds)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(START)
    writer.add_eos_token_id(END)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = "output.weight"
    for number in range(config.num_hidden_layers):
        for ours, theirs in BLOCK.items():
            names[f"model.layers.{number}.{ours}.weight"] = f"blk.{number}.{theirs}.weight"
    weights = {name: value.float().numpy() for name, value in model.state_dict().items()}
    for ours, theirs in names.items():
        value = weights[ours]
        if "attn_q" in theirs:
            value = _interleaved(value, config.num_attention_heads)
        elif "attn_k" in theirs:
            value = _interleaved(value, config.num_key_value_heads)
        writer.add_tensor(theirs, value.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
