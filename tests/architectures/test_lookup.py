"""Names of modules as drawings and trees show them."""

import pytest

from san_llm.architectures.lookup import short_label


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("model.layers.3.mlp.up_proj", "up"),
        ("self_attn.qkv_proj", "self_attn.qkv_proj"),
        ("up_proj", "up"),
        ("qkv_proj", "qkv"),
        ("model.embed_tokens", "embed"),
        ("embed_tokens", "embed"),
        ("transformer.h.0.attn.c_proj", "attn.c_proj"),
        ("attn.c_proj", "attn.c_proj"),
        ("mlp.c_proj", "mlp.c_proj"),
        ("mlp.shared_expert.up_proj", "mlp.shared_expert.up_proj"),
    ],
)
def test_a_module_is_shown_by_what_tells_it_from_the_others_of_its_block(name, shown):
    assert short_label(name) == shown
