"""The decoder families, LLaMA and those that are wired as it is: their modules, links and norms.

``LINKS`` is the propagation map of a LLaMA block, and ``FAMILIES`` says for each ``model_type``
where it is wired otherwise. To add a family is to add its entry here.
"""

from __future__ import annotations

from dataclasses import replace

from san_llm.architectures.entry import Family, Link

EMBEDDING = "embed_tokens"
# The seven projections of a LLaMA block, in its order.
Q, K, V, O = "q_proj", "k_proj", "v_proj", "o_proj"  # noqa: E741 (the field's own letter)
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
TARGETS: tuple[str, ...] = (Q, K, V, O, GATE, UP, DOWN)
GATE_UP = "gate_up_proj"  # both in one: Phi-3's Linear, and transformers' experts with their DOWN

# Source: arXiv:2409.06706 states the principle; the LLaMA rows are our reading of it. "attention"
# and "mlp" are exact (attention mixes tokens, never channels; SwiGLU is linear in up), "residual"
# goes through the residual stream and an RMSNorm.
LINKS: tuple[Link, ...] = (
    Link("attention", posterior="o_proj", anterior="v_proj", conversion="repeat kv heads"),
    Link("mlp", posterior="down_proj", anterior="up_proj"),
    Link("residual", posterior="gate_proj", anterior="o_proj"),
    Link("residual", posterior="up_proj", anterior="o_proj"),
    Link("residual", posterior="q_proj", anterior="down_proj", blocks_back=1, first=EMBEDDING),
    Link("residual", posterior="k_proj", anterior="down_proj", blocks_back=1, first=EMBEDDING),
    Link("residual", posterior="v_proj", anterior="down_proj", blocks_back=1, first=EMBEDDING),
)

# Which Linears read the output of which RMSNorm of a block.
NORMS: dict[str, tuple[str, ...]] = {
    "input_layernorm": ("q_proj", "k_proj", "v_proj"),
    "post_attention_layernorm": ("gate_proj", "up_proj"),
}

# In Gemma 2 and 3 the features of o and down pass a norm of their own before they join the
# residual stream (post_attention_layernorm, post_feedforward_layernorm). A norm rescales a token
# and keeps its channels apart, so the residual links stand; what gate and up read is another norm.
_GEMMA2_NORMS = {
    "input_layernorm": NORMS["input_layernorm"],
    "pre_feedforward_layernorm": NORMS["post_attention_layernorm"],
}

_GEMMA2_BEHIND = ("post_attention_layernorm", "post_feedforward_layernorm")
_PER_HEAD = ("self_attn.q_norm", "self_attn.k_norm")

_LLAMA = Family(projections=TARGETS, links=LINKS, norms=NORMS)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,  # Llama 1, 2 and 3, SmolLM
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    # q and k pass a norm per head, but feed nothing.
    "qwen3": replace(_LLAMA, other_norms=_PER_HEAD),
    "gemma": replace(_LLAMA, norm_offset=1),
    "gemma2": replace(_LLAMA, norms=_GEMMA2_NORMS, other_norms=_GEMMA2_BEHIND, norm_offset=1),
    "gemma3_text": replace(
        _LLAMA, norms=_GEMMA2_NORMS, other_norms=_GEMMA2_BEHIND + _PER_HEAD, norm_offset=1
    ),
    "phi3": replace(
        _LLAMA,
        links=(
            Link(
                "attention", "o_proj", "qkv_proj", conversion="repeat kv heads", projection="v_proj"
            ),
            Link("mlp", "down_proj", "gate_up_proj", projection="up_proj"),
            Link("residual", "gate_up_proj", "o_proj"),
            Link("residual", "qkv_proj", "down_proj", blocks_back=1, first=EMBEDDING),
        ),
        norms={"input_layernorm": ("qkv_proj",), "post_attention_layernorm": ("gate_up_proj",)},
        fused={
            "qkv_proj": ("q_proj", "k_proj", "v_proj"),
            "gate_up_proj": ("gate_proj", "up_proj"),
        },
    ),
}

# Families whose stock config can hold a bias on all their projections, so that a shift can merge:
# the config's flag, and the parent of the Linears that it gives a bias.
BIAS_FLAGS: dict[str, dict[str, str]] = {
    "llama": {"attention_bias": "self_attn", "mlp_bias": "mlp"},
}

PARENTS: dict[str, str] = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
    "qkv_proj": "self_attn",
    "gate_up_proj": "mlp",
}
