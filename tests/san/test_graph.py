"""The propagation map: the table itself, its use on heads and subsets, counts, and the tree."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from reference import ALL_LINKS, SEVEN, module_name, synapse_source
from rich.console import Console
from san.adapted import adapt, family_model, logits, vectors
from tiny import tiny_config, tiny_model
from transformers import GPTNeoXConfig, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config

from san_llm import SanConfig, propagation_graph
from san_llm.architectures.decoders import LINKS
from san_llm.architectures.lookup import link_into
from san_llm.errors import InputError
from san_llm.san.options import MODES

LLAMA_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)
LLAMA3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
SMOLLM2_135M = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)


def test_the_table_is_the_papers_map_for_a_llama_block():
    rows = {(r.posterior, r.anterior, r.kind, r.blocks_back, r.conversion, r.first) for r in LINKS}
    assert rows == {
        ("o_proj", "v_proj", "attention", 0, "repeat kv heads", None),
        ("down_proj", "up_proj", "mlp", 0, "as is", None),
        ("gate_proj", "o_proj", "residual", 0, "as is", None),
        ("up_proj", "o_proj", "residual", 0, "as is", None),
        ("q_proj", "down_proj", "residual", 1, "as is", "embed_tokens"),
        ("k_proj", "down_proj", "residual", 1, "as is", "embed_tokens"),
        ("v_proj", "down_proj", "residual", 1, "as is", "embed_tokens"),
    }


@settings(max_examples=60, deadline=None)
@given(
    targets=st.lists(st.sampled_from(SEVEN), min_size=1, unique=True),
    links=st.lists(st.sampled_from(ALL_LINKS), unique=True).map(tuple),
    embedding=st.booleans(),
)
def test_a_link_stands_only_where_its_kind_is_on_and_both_ends_are_targets(
    targets, links, embedding
):
    config = SanConfig(target_modules=targets, links=links, adapt_embedding=embedding)
    graph = propagation_graph(tiny_config(), config)
    adapted = {module_name(block, target) for block in range(4) for target in targets}
    adapted |= {"model.embed_tokens"} if embedding else set()
    assert {node.name for node in graph} == adapted
    for block in range(4):
        for target in targets:
            source = synapse_source(block, target, links)
            node = next(n for n in graph if n.name == module_name(block, target))
            assert node.anterior == (source if source in adapted else None)


@pytest.mark.parametrize(
    ("kv_heads", "v_rows"), [(4, 32), (2, 16), (1, 8)], ids=["MHA", "GQA", "MQA"]
)
def test_v_has_the_rows_of_its_kv_heads_and_o_the_columns_of_all_heads(kv_heads, v_rows):
    graph = propagation_graph(tiny_config(num_key_value_heads=kv_heads))
    shapes = {node.name: (node.d_out, node.d_in) for node in graph}
    assert shapes[module_name(2, "v_proj")] == (v_rows, 32)
    assert shapes[module_name(2, "o_proj")] == (32, 32)
    o = next(node for node in graph if node.name == module_name(2, "o_proj"))
    assert o.anterior == module_name(2, "v_proj")
    assert o.link is not None
    assert o.link.conversion == "repeat kv heads"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 1}, {"intermediate_size": 40}])
def test_shapes_and_counts_are_those_of_the_real_model(family, changes):
    plain = family_model(family, **changes)
    linears = {name: tuple(m.weight.shape) for name, m in plain.named_modules() if "_proj" in name}
    graph = propagation_graph(plain)
    assert {node.name: (node.d_out, node.d_in) for node in graph} == linears
    model = get_peft_model(plain, SanConfig())
    assert graph.trained == model.get_nb_trainable_parameters()[0]
    assert {node.name for node in graph} == set(vectors(model)[0])


def test_a_head_size_of_its_own_is_followed():
    plain = family_model("llama", head_dim=12)
    linears = {name: tuple(m.weight.shape) for name, m in plain.named_modules() if "_proj" in name}
    assert linears[module_name(0, "q_proj")] == (48, 32)
    assert {n.name: (n.d_out, n.d_in) for n in propagation_graph(plain)} == linears


@pytest.mark.parametrize(
    ("config", "trained"), [(LLAMA_7B, 1_359_872), (LLAMA3_8B, 1_376_256), (SMOLLM2_135M, 155_520)]
)
def test_the_method_trains_as_many_numbers_as_its_page_says(config, trained):
    assert propagation_graph(config).trained == trained
    assert propagation_graph(config.to_dict()).trained == trained


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 4 * (3 * 32 + 2 * 16 + 2 * 48)),
        ({"shift": True}, 2 * 4 * (3 * 32 + 2 * 16 + 2 * 48)),
        ({"adapt_embedding": True}, 4 * (3 * 32 + 2 * 16 + 2 * 48) + 32),
        ({"adapt_embedding": True, "shift": True}, 8 * (3 * 32 + 2 * 16 + 2 * 48) + 32),
        # v, o and up feed a neighbour in every block, down in all but the last
        ({"mode": "synapse"}, 4 * (16 + 32 + 48) + 3 * 32),
        ({"mode": "synapse", "links": ["mlp"]}, 4 * 48),
        ({"links": "free"}, 4 * (3 * 32 + 2 * 16 + 2 * 48) + 4 * (6 * 32 + 48)),
        ({"links": "free", "target_modules": ["down_proj"], "adapt_embedding": True}, 4 * 80 + 32),
        ({"target_modules": ["k_proj"]}, 4 * 16),
        ({"target_modules": r".*layers\.[01]\..*gate_proj"}, 2 * 48),
    ],
)
def test_the_graph_counts_what_the_adapter_trains(options, count):
    config = SanConfig(**options)
    assert propagation_graph(tiny_config(), config).trained == count
    assert get_peft_model(tiny_model(), config).get_nb_trainable_parameters()[0] == count


@pytest.mark.parametrize(
    ("config", "trained"), [(LLAMA_7B, 2_498_560), (LLAMA3_8B, 2_621_440), (SMOLLM2_135M, 305_280)]
)
def test_free_column_scales_are_as_many_as_the_page_says(config, trained):
    assert propagation_graph(config, SanConfig(links="free")).trained == trained


@pytest.mark.parametrize("how", [*({"mode": mode} for mode in MODES), {"links": "free"}], ids=str)
@pytest.mark.parametrize("carrier", ["scale", "lora", "dora"])
def test_the_graph_counts_the_numbers_of_every_carrier(carrier, how):
    options = {"carrier": carrier, "r": 3, "adapt_embedding": True, **how}
    model = adapt(family_model(), **options)
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert propagation_graph(model).trained == counted


def test_an_adapted_model_shows_its_own_graph():
    model = get_peft_model(tiny_model(), SanConfig(target_modules=["v_proj", "o_proj"]), "one")
    model.add_adapter("two", SanConfig(target_modules=["up_proj"], shift=True))
    assert propagation_graph(model).trained == 4 * (16 + 32)
    model.set_adapter("two")
    assert propagation_graph(model).trained == 4 * 2 * 48


def test_readers_of_o_are_gate_and_up_of_the_same_block():
    graph = propagation_graph(tiny_config())
    readers = {node.name for node in graph.readers(module_name(1, "o_proj"))}
    assert readers == {module_name(1, "gate_proj"), module_name(1, "up_proj")}
    readers = {node.name for node in graph.readers(module_name(1, "down_proj"))}
    assert readers == {module_name(2, name) for name in ("q_proj", "k_proj", "v_proj")}
    assert graph.readers(module_name(3, "down_proj")) == []  # the last one feeds nothing


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.down", "lm_head", "model.layers.x.mlp.down_proj", "", "down_proj"]
)
def test_a_name_outside_the_map_has_no_link(name):
    assert link_into(name) is None


@pytest.mark.parametrize("config", [{}, {"model_type": None}, {"model_type": ["llama"]}])
def test_what_is_no_model_of_transformers_has_no_graph(config):
    with pytest.raises(InputError, match=r"model type .*: transformers has no such model"):
        propagation_graph(config)


def test_a_family_without_a_map_is_measured():
    config = GPTNeoXConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                           num_attention_heads=4)  # fmt: skip
    by_object, by_values = propagation_graph(config), propagation_graph(config.to_dict())
    assert by_object == by_values
    assert [node.anterior and node.anterior.rsplit(".", 1)[-1] for node in by_object] == [
        *(None, "query_key_value", None, "dense_h_to_4h"),
        *("dense_4h_to_h", "query_key_value", "dense_4h_to_h", "dense_h_to_4h"),
    ]


@pytest.mark.parametrize("config", [LlamaConfig(), MistralConfig(), Qwen2Config()])
def test_every_supported_family_has_a_graph(config):
    assert len(list(propagation_graph(config))) == 7 * config.num_hidden_layers


@pytest.mark.parametrize("targets", [["model.layers.7.mlp.up_proj"], r".*nothing", ["mlp.q_proj"]])
def test_a_target_that_matches_nothing_is_refused_as_the_tuner_does(targets):
    config = SanConfig(target_modules=targets)
    with pytest.raises(InputError, match="matches no"):
        propagation_graph(tiny_config(), config)


# --- the tree ----------------------------------------------------------------------------------


def drawn(graph: object, **options: object) -> str:
    stream = io.StringIO()
    Console(file=stream, width=100, **options).print(graph)
    return stream.getvalue()


def test_the_tree_says_who_feeds_whom():
    tree = drawn(propagation_graph(SMOLLM2_135M)).splitlines()
    assert tree[0].startswith("SAN propagation  155,520 trained numbers; x <- y: s of x is")
    assert any("block 1 ... block 29  (29 alike)" in line for line in tree)
    said = "o_proj (576 x 576) gamma <- v_proj (attention, per kv head)"
    assert any(said in line for line in tree)
    said = "q_proj (576 x 576) gamma <- down_proj (residual, block before)"
    assert any(said in line for line in tree)
    assert sum("q_proj" in line for line in tree) == 2  # block 0 has nothing before it


def test_the_tree_names_the_embedding_and_a_shift():
    tree = drawn(propagation_graph(tiny_config(), SanConfig(shift=True, adapt_embedding=True)))
    assert "embed_tokens (32) gamma" in tree
    assert "q_proj (32 x 32) gamma + beta <- embed_tokens (residual)" in tree


def test_the_tree_says_what_only_reads_in_synapse_mode():
    tree = drawn(propagation_graph(tiny_config(), SanConfig(mode="synapse")))
    assert "gate_proj (48 x 32) reads only <- o_proj (residual)" in tree


def test_the_tree_says_who_has_column_scales_of_its_own():
    tree = drawn(propagation_graph(tiny_config(), SanConfig(links="free", shift=True)))
    assert "trained numbers; sigma: an s of its own" in tree
    assert "down_proj (32 x 48) gamma + sigma + beta" in tree
    assert "<-" not in tree


def test_the_tree_says_which_part_of_a_fused_linear_is_read():
    lines = drawn(propagation_graph(Phi3Config(num_key_value_heads=8))).splitlines()
    assert any("o_proj (3072 x 3072) gamma <- qkv_proj (attention, v, per kv head)" in x
               for x in lines)  # fmt: skip
    assert any("down_proj (3072 x 8192) gamma <- gate_up_proj (mlp, up)" in x for x in lines)


def test_a_terminal_gets_colours_and_a_file_none():
    graph = propagation_graph(tiny_config())
    assert "\x1b[" in drawn(graph, force_terminal=True, color_system="standard")
    assert "\x1b" not in drawn(graph)


def test_printing_to_a_pipe_is_plain_whole_lines():
    script = (
        "# forked from: all\n"
        "import rich; from transformers import LlamaConfig; from san_llm import *;"
        "rich.print(propagation_graph(LlamaConfig(hidden_size=4096, intermediate_size=14336,"
        "num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8),"
        "SanConfig(shift=True)))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout
    text = out.decode()
    assert "\x1b" not in text
    assert "2,752,512 trained numbers" in text
    # one line a projection, none broken at the 80 columns of a pipe
    assert len(text.splitlines()) == 1 + 2 * (1 + 7)


def test_an_adapter_means_what_its_own_table_says(tmp_path):
    """A later version's table may be another; adapters of before it were saved have none."""
    adapt(tiny_model()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    values = json.loads(file.read_text())
    rows = values["table"]["links"]
    assert {row["kind"] for row in rows} == {"attention", "mlp", "residual"}

    def loaded(**changes):
        file.write_text(json.dumps(values | changes))
        return PeftModel.from_pretrained(tiny_model(), tmp_path)

    without = {"links": [row for row in rows if row["kind"] != "residual"], "fused": {}}
    other = loaded(table=without)
    assert torch.equal(logits(other), logits(loaded(links=["attention", "mlp"])))
    assert not torch.equal(logits(other), logits(loaded()))
    kinds = {node.link.kind for node in propagation_graph(other) if node.link}
    assert kinds == {"attention", "mlp"}
    assert torch.equal(logits(loaded(table=None)), logits(loaded()))
    with pytest.raises(InputError, match=r"adapter_config.json: table: not a propagation table"):
        loaded(table={"links": [{"kind": "mlp"}], "fused": {}})
