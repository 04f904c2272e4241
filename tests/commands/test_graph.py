"""``san-llm graph``: the tree of a table, of a measurement, and both held against each other."""

import json
from pathlib import Path

import pytest
from tiny import rows, write_recipe, write_rows
from transformers import AutoConfig

LLAMA = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture
def model(here):
    def write(model_type, **changes):
        folder = Path(model_type)
        AutoConfig.for_model(model_type, **(LLAMA | changes)).save_pretrained(folder)
        return folder

    return write


def test_of_a_family_with_a_table_no_torch_is_asked(model, command):
    said = command("graph", model("llama"))
    assert said.returncode == 0, said.stderr
    assert "o_proj (64 x 64) gamma <- v_proj (attention, per kv head)" in said.stdout
    assert "block 1 ... block 2  (2 alike)" in said.stdout
    assert "measured" not in said.stdout


def test_of_a_base_that_is_not_here_yet_its_known_sizes_do(here, command):
    told = json.loads(command("graph", "llama7b_commonsense", "--json").stdout)
    assert told["trained"] == 1_359_872
    assert told["modules"][3]["anterior"] == "model.layers.0.self_attn.v_proj"


def test_measured_it_is_as_the_table_says(model, command):
    said = command("graph", model("llama"), "--measure", "--json")
    assert said.returncode == 0, said.stderr
    told = json.loads(said.stdout)
    assert told["differences"] == []
    assert told["measured"] is True
    assert told["left_alone"] == {
        "the embedding": ["model.embed_tokens"],
        "outside of the blocks": ["lm_head"],
    }
    by_name = {module["name"]: module for module in told["modules"]}
    o = by_name["model.layers.1.self_attn.o_proj"]
    assert o["anterior"] == "model.layers.1.self_attn.v_proj"
    assert (o["kind"], o["exactness"]) == ("attention", "exact")
    assert o["channels"]["groups"] == 2


def test_a_family_that_no_table_knows_is_measured(model, command):
    said = command("graph", model("starcoder2"))
    assert said.returncode == 0, said.stderr
    assert "c_proj (64 x 96) gamma <- c_fc (mlp, activation)" in said.stdout
    assert "not adapted: lm_head: outside of the blocks" in said.stdout
    assert "measured: on two small copies, which agree" in said.stdout


def test_pictures_with_text_are_rooted_at_the_language_model(here, command):
    text = LLAMA | {"model_type": "llama"}
    tower = {"model_type": "clip_vision_model", "hidden_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2, "image_size": 8, "patch_size": 4}  # fmt: skip
    AutoConfig.for_model("llava", text_config=text, vision_config=tower).save_pretrained("llava")
    said = command("graph", "llava", "--json")
    assert said.returncode == 0, said.stderr
    told = json.loads(said.stdout)
    block = "model.language_model.layers.{}.self_attn.q_proj"
    fed = {module["name"]: module["anterior"] for module in told["modules"]}
    assert fed[block.format(0)] is None
    assert fed[block.format(1)] == "model.language_model.layers.0.mlp.down_proj"
    left = {reason: names[0] for reason, names in told["left_alone"].items()}
    assert left["the vision tower is left frozen"].startswith("model.vision_tower.")
    connector = next(reason for reason in left if reason.startswith("the connector"))
    assert connector.endswith("; modules_to_save=['multi_modal_projector'] trains it whole")
    assert left["outside of the blocks"] == "lm_head"


def test_a_recipe_with_its_options(tiny_base, here, command):
    write_rows(Path("rows.json"), rows(4))
    write_recipe(Path("mine.yaml"), tiny_base, Path("rows.json"))
    neuron = json.loads(command("graph", "mine.yaml", "method.mode=neuron", "--json").stdout)
    assert {module["anterior"] for module in neuron["modules"]} == {None}
    said = command("graph", "mine.yaml", "method.name=lora")
    assert said.returncode == 2
    assert "method lora: only san has a propagation graph" in said.stderr


def test_what_is_neither_is_refused_in_a_line(here, command):
    said = command("graph", "nowhere/at/all")
    assert (said.returncode, said.stdout) == (2, "")
    assert "nowhere/at/all: no such folder" in said.stderr
    Path("odd").mkdir()
    Path("odd/config.json").write_text('{"model_type": "gpt_neoxx"}')
    said = command("graph", "odd")
    assert said.returncode == 2
    assert "transformers has no such model (did you mean 'gpt_neox'?)" in said.stderr
