"""Measured graphs: the declared table is one, and what nobody declared is as its source says."""

from dataclasses import replace

import numpy as np
import pytest
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, Olmo2ForCausalLM, SiglipModel

from san_llm.architectures.decoders import FAMILIES, LINKS
from san_llm.errors import InputError
from san_llm.measure.copies import is_experts, small_copies
from san_llm.measure.run import class_of, measure
from san_llm.plan.wiring import differences
from san_llm.san.graph import PropagationGraph, propagation_graph
from san_llm.san.measured import nodes
from san_llm.san.options import Options

# A head of 16 channels, two value heads for four query heads, three blocks.
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
OPTIONS = Options(adapt_embedding=True)


def config_of(model_type, **changes):
    return AutoConfig.for_model(model_type, **(SIZES | changes))


def measured(config):
    return PropagationGraph(nodes(measure(config, class_of(config)), OPTIONS))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_says_what_is_measured(family):
    config = config_of(family, **({"head_dim": 8} if "gemma" in family else {}))
    assert differences(propagation_graph(config, OPTIONS), measured(config)) == []


@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        ("llama", {"links": (replace(LINKS[0], conversion="as is"), *LINKS[1:])}),
        ("llama", {"links": (LINKS[0], replace(LINKS[1], anterior="gate_proj"), *LINKS[2:])}),
        ("llama", {"links": LINKS[:-1]}),
        ("phi3", {"fused": {"qkv_proj": ("v_proj", "q_proj", "k_proj"),
                            "gate_up_proj": ("gate_proj", "up_proj")}}),
    ],
)  # fmt: skip
def test_a_wrong_table_is_told(family, wrong, monkeypatch):
    config = config_of(family)
    monkeypatch.setitem(FAMILIES, family, replace(FAMILIES[family], **wrong))
    assert differences(propagation_graph(config, OPTIONS), measured(config))


def told(graph):
    """What feeds the modules of blocks 0 and 1, in short: last names, the kind, what is between."""
    short = {}
    for module in graph.modules:
        link = graph.into.get(module.name)
        if link is not None:
            short[module.name] = (link.anterior, link.kind, link.exactness)
    return short


def test_gpt_neox():
    config = config_of("gpt_neox")
    graph = measure(config, class_of(config))
    block, before = "gpt_neox.layers.1.", "gpt_neox.layers.0."
    links = told(graph)
    qkv, dense = "attention.query_key_value", "attention.dense"
    up, down = "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
    # Attention and MLP are summed side by side: the MLP's last Linear is the nearer writer.
    assert links[block + qkv] == (before + down, "residual", "stream")
    assert links[block + up] == (before + down, "residual", "stream")
    assert links[block + dense] == (block + qkv, "attention", "exact")
    assert links[block + down] == (block + up, "mlp", "activation")
    heads = np.arange(3 * 64).reshape(4, 3, 16)
    assert (graph.into[block + dense].channels.source(192, 64) == heads[:, 2].reshape(-1)).all()
    outside = [module.name for module in graph.modules if module.place == "outside"]
    assert outside == ["lm_head"] or outside == ["embed_out"]


def test_falcon_with_one_value_head_behind_all_queries():
    config = AutoConfig.for_model(
        "falcon", vocab_size=300, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    graph = measure(config, class_of(config))
    link = graph.into["transformer.h.2.self_attention.dense"]
    value = np.arange(80, 96)  # behind 64 rows of queries and 16 of the key
    assert (link.channels.source(96, 64) == np.tile(value, 4)).all()
    assert {module.kind for module in graph.modules} == {"Linear", "Embedding"}


def test_vit():
    config = AutoConfig.for_model("vit", hidden_size=64, num_hidden_layers=3,
                                  num_attention_heads=4, intermediate_size=96)  # fmt: skip
    graph = measure(config, class_of(config))
    block, before = "vit.layers.1.", "vit.layers.0."
    links = told(graph)
    for projection in "qkv":
        name = f"attention.{projection}_proj"
        assert links[block + name] == (before + "mlp.fc2", "residual", "stream")
        assert links[before + name][0] == "vit.embeddings.patch_embeddings.projection"
    assert links[block + "attention.o_proj"] == (block + "attention.v_proj", "attention", "exact")
    assert links[block + "mlp.fc1"] == (block + "attention.o_proj", "residual", "stream")
    assert links[block + "mlp.fc2"] == (block + "mlp.fc1", "mlp", "activation")
    assert graph.by_name["classifier"].note == "outside of the blocks"


def test_a_norm_behind_an_activation_makes_no_stream_of_it():
    config = AutoConfig.for_model("convnextv2", image_size=64, patch_size=4, depths=[2, 2],
                                  hidden_sizes=[32, 48], num_stages=2)  # fmt: skip
    links = told(measure(config, class_of(config)))
    for block in ("0.layers.0", "0.layers.1", "1.layers.0", "1.layers.1"):
        name = f"convnextv2.encoder.stages.{block}.".__add__
        assert links[name("pwconv2")] == (name("pwconv1"), "mlp", "activation")
        assert links[name("pwconv1")] == (name("dwconv"), "residual", "stream")


def test_an_encoder_feeds_no_first_block_of_a_decoder():
    config = AutoConfig.for_model(
        "t5", d_model=64, d_kv=16, d_ff=96, num_layers=2, num_decoder_layers=2, num_heads=4
    )
    graph = measure(config, class_of(config))
    links = told(graph)
    for layer in ("0.layer.0.SelfAttention", "0.layer.1.EncDecAttention"):
        attention = f"decoder.block.{layer}"
        assert not {f"{attention}.k", f"{attention}.v"} & links.keys()
        assert links[f"{attention}.o"] == (f"{attention}.v", "attention", "exact")
    crossed = "decoder.block.1.layer.1.EncDecAttention"
    assert links[f"{crossed}.q"][0] == "decoder.block.1.layer.0.SelfAttention.o"
    assert graph.by_name[f"{crossed}.v"].note == "nothing near it writes its channels one for one"


def test_nor_does_it_where_cross_attention_stands_in_the_decoders_blocks_themselves():
    config = AutoConfig.for_model(
        "bart", d_model=64, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96,
        architectures=["BartForConditionalGeneration"],
    )  # fmt: skip
    links = told(measure(config, class_of(config)))
    for number in range(2):
        crossed = f"model.decoder.layers.{number}.encoder_attn"
        assert not {f"{crossed}.k_proj", f"{crossed}.v_proj"} & links.keys()
        assert links[f"{crossed}.out_proj"] == (f"{crossed}.v_proj", "attention", "exact")
        writer = f"model.decoder.layers.{number}.self_attn.out_proj"
        assert links[f"{crossed}.q_proj"] == (writer, "residual", "stream")


def test_experts_write_the_stream_each_with_channels_of_its_own():
    config = config_of("qwen2_moe", moe_intermediate_size=32, shared_expert_intermediate_size=48,
                       num_experts=4)  # fmt: skip
    graph = measure(config, class_of(config))
    block = "model.layers.1."
    for projection in "qkv":
        module = graph.by_name[f"{block}self_attn.{projection}_proj"]
        assert module.name not in graph.into
        assert module.note == "experts write what it reads, each with channels of its own"
    assert graph.into[f"{block}mlp.shared_expert.down_proj"].kind == "mlp"
    unusable = [m.name for m in graph.modules if m.place == "block" and not m.usable]
    assert [name for name in unusable if name.startswith(block)] == [
        f"{block}mlp.shared_expert_gate"
    ]
    experts = graph.by_name[f"{block}mlp.experts"]
    assert (experts.kind, experts.experts, experts.d_out, experts.d_in) == (
        "Experts", 4, 2 * 32 + config.hidden_size, config.hidden_size
    )  # fmt: skip
    assert graph.into[experts.name].anterior == f"{block}self_attn.o_proj"


class Tied(Olmo2ForCausalLM):
    """Two blocks with one up projection, as some models share parts of them."""

    def __init__(self, config):
        super().__init__(config)
        first, second, *_ = self.model.layers
        second.mlp.up_proj.weight = first.mlp.up_proj.weight


def test_a_module_whose_weight_is_anothers_is_left_alone():
    graph = measure(config_of("olmo2"), Tied)
    unusable = {m.name: m.note for m in graph.modules if m.place == "block" and not m.usable}
    one, two = (f"model.layers.{block}.mlp.up_proj" for block in (0, 1))
    assert unusable == {one: f"its weight is also that of {two}",
                        two: f"its weight is also that of {one}"}  # fmt: skip


def test_it_is_the_same_measured_again_and_from_the_cache(monkeypatch, tmp_path):
    config = config_of("olmo2")
    first = measure(config)
    assert measure(config) == first  # from the cache
    monkeypatch.setenv("SAN_LLM_CACHE", str(tmp_path))
    assert measure(config) == first
    assert len(list((tmp_path / "graphs").iterdir())) == 1


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("audio-spectrogram-transformer", {"num_hidden_layers": 1}),  # reads a spectrogram
        ("dinov3_vit", {"num_hidden_layers": 1}),  # has a parameter without numbers
        ("poolformer", {"depths": [1, 1, 1, 1]}),  # whose pool_size is no width
    ],
)
def test_a_small_copy_is_made_and_run(model_type, sizes):
    config = AutoConfig.for_model(model_type, **sizes)
    first, second = small_copies(config, class_of(config))
    shapes = [[p.shape for p in copy.model.parameters()] for copy in (first, second)]
    assert shapes[0] != shapes[1]


def test_a_convolution_over_time_is_no_stack_of_experts():
    assert not is_experts(nn.Conv1d(4, 8, 3))


def test_two_towers_have_a_graph_each():
    part = {"num_hidden_layers": 1, "hidden_size": 48, "num_attention_heads": 4}
    tower = part | {"image_size": 32, "patch_size": 16}
    config = AutoConfig.for_model("siglip", vision_config=tower, text_config=part)
    fed = measure(config, SiglipModel).into
    for tower in ("vision_model", "text_model"):
        block = f"{tower}.encoder.layers.0."
        anteriors = {link.anterior for name, link in fed.items() if name.startswith(block)}
        assert len(anteriors) == 4
        assert all(anterior.startswith(tower) for anterior in anteriors)


@pytest.mark.holds("refused")
@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("siglip2", "no small copy of it can be made"),
        # Older versions of transformers keep its experts so that they are not found.
        (
            "switch_transformers",
            ".*(it computes some tokens apart|small copy cannot be measured)",
        ),
    ],
)
def test_a_model_that_is_not_understood_is_refused(family, said, record_property):
    config = CONFIG_MAPPING[family]()
    if family == "switch_transformers":
        config.num_layers = config.num_decoder_layers = config.num_sparse_encoder_layers = 2
        config.num_sparse_decoder_layers = 2
    assert issubclass(class_of(config), nn.Module)
    with pytest.raises(InputError, match=f"model type '{family}': {said}") as refused:
        measure(config)
    record_property("why", str(refused.value))
