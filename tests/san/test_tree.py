"""The tree of a propagation graph: names that tell modules apart, lines that fit."""

import io

from rich.console import Console
from transformers import AutoConfig

from san_llm import propagation_graph
from san_llm.architectures.entry import Carry, Link
from san_llm.san.graph import PropagationGraph
from san_llm.san.node import Node

SIZES = {"num_hidden_layers": 3, "num_attention_heads": 12}
CONFIGS = {
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 2,
           "num_heads": 4},
    "bert": SIZES,
    "gpt_neox": SIZES | {"hidden_size": 768, "intermediate_size": 3072},
}  # fmt: skip


def drawn(graph, width=80):
    """Return the tree's first line and its branches by their titles, each with its lines."""
    if isinstance(graph, str):
        graph = propagation_graph(AutoConfig.for_model(graph, **CONFIGS[graph]))
    stream = io.StringIO()
    Console(file=stream, width=width).print(graph)
    text = stream.getvalue()
    branches = {}
    for line in text[text.index("\n├") + 1 :].splitlines():
        if line[0] in "├└":
            inside = branches.setdefault(line[4:], [])
        else:
            inside.append(line[4:].removeprefix("├── ").removeprefix("└── "))
    return text.splitlines()[0], branches


def test_an_encoders_blocks_are_not_a_decoders_and_a_layer_before_is_no_block_before():
    _, branches = drawn("t5")
    assert "q (64 x 64) gamma" in branches["encoder.block.0.layer.0"]
    assert "q (64 x 64) gamma <- o (residual, layer before)" in branches["decoder.block.1.layer.1"]
    assert "q (64 x 64) gamma <- wo (residual, block before)" in branches["decoder.block.1.layer.0"]
    assert len(branches) == 2 * 2 + 2 * 3


def test_modules_of_one_name_are_told_apart():
    _, branches = drawn("bert")
    assert branches["block 1 ... block 2  (2 alike)"] == [
        "query (768 x 768) <- output.dense (residual, block before)",
        "key (768 x 768) <- output.dense (residual, block before)",
        "value (768 x 768) <- output.dense (residual, block before)",
        "attention.output.dense (768 x 768) <- value (attention)",
        "intermediate.dense (3072 x 768) <- attention.output.dense (residual)",
        "output.dense (768 x 3072) <- intermediate.dense (mlp, activation)",
    ]


def test_what_every_line_says_is_said_once_where_a_line_has_no_room_for_it():
    feed = "<- dense_4h_to_h (residual, block before)"
    first, branches = drawn("gpt_neox", 100)
    assert "trained numbers;" in first
    assert (
        f"query_key_value (2304 x 768) gamma {feed}" in branches["block 1 ... block 2  (2 alike)"]
    )
    first, branches = drawn("gpt_neox")
    assert "trained: gamma of each;" in first
    assert f"query_key_value (2304 x 768) {feed}" in branches["block 1 ... block 2  (2 alike)"]
    _, branches = drawn("gpt_neox", 60)
    lines = branches["block 1 ... block 2  (2 alike)"]
    assert lines[0] == "query_key_value (2304 x 768)"
    assert lines[1].strip("│ ") == feed


def test_a_stage_reads_the_stage_before_four_times():
    name = "swin.encoder.layers.{}".format
    fc2, reduction = name("0.blocks.1.mlp.fc2"), name("0.downsample.reduction")
    query = name("1.blocks.0.attention.q_proj")
    residual, four = Link("residual", "", ""), Carry(0, 48, 4, 48)

    def node(name, anterior=None, carry=None):
        link = residual if anterior else None
        return Node(name, 96, 48, True, False, anterior, link, carry)

    nodes = (node(fc2), node(reduction, fc2, four), node(query, reduction, Carry(0, 96, 1, 96)))
    _, branches = drawn(PropagationGraph(nodes))
    assert branches == {
        "layers.0.blocks.1": ["fc2 (96 x 48) gamma"],
        "layers.0": ["reduction (96 x 48) gamma <- fc2 (residual, layers.0.blocks.1, 4 times)"],
        "layers.1.blocks.0": ["q_proj (96 x 48) gamma <- reduction (residual, layer before)"],
    }
