"""SanConfig: every wrong option is one line that helps, every right one survives the file."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftConfig, TaskType, get_peft_model
from peft.utils import PeftType
from reference import ALL_LINKS, SEVEN
from tiny import tiny_config, tiny_model

from san_llm import SanConfig, propagation_graph
from san_llm.errors import InputError
from san_llm.san.options import SAVED_KEYS


def test_the_defaults_are_the_papers_method_on_all_seven_projections():
    config = SanConfig()
    assert config.target_modules is None  # all of the model's, once it is there
    assert (config.carrier, config.mode, config.shift) == ("scale", "both", False)
    assert tuple(config.links) == ALL_LINKS
    assert config.adapt_embedding is False
    assert config.peft_type == PeftType.SAN == "SAN"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "bth"}, "mode: 'bth' is not one of both, neuron, synapse (did you mean 'both'?)"),
        ({"mode": "Neuron"}, "did you mean 'neuron'?"),
        ({"mode": None}, "mode: None is not one of"),
        ({"carrier": "scal"}, "did you mean 'scale'?"),
        ({"carrier": 3}, "carrier: 3 is not one of"),
        ({"links": ["atention"]}, "links: 'atention' is not one of"),
        ({"links": ["atention"]}, "did you mean 'attention'?"),
        ({"links": "mlp"}, "links: expected a list"),
        ({"links": None}, "links: expected a list"),
        ({"links": [["mlp"]]}, "links: ['mlp'] is not one of"),
        ({"links": {"mlp": True}}, "links: expected a list"),
        ({"links": "fre"}, "links: expected a list of attention, mlp, residual, or the word free"),
        ({"links": ["free"]}, "links: 'free' is not a kind for a list: write the word alone"),
        ({"links": "free", "mode": "neuron"}, "links: free trains a row and a column scale of"),
        ({"links": "free", "mode": "synapse"}, "mode 'synapse' has only one of them"),
        ({"shift": "no"}, "shift: expected true or false, found 'no'"),
        ({"shift": 1}, "shift: expected true or false, found 1"),
        ({"adapt_embedding": "false"}, "adapt_embedding: expected true or false"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": [7]}, "expected module names, found 7"),
        ({"target_modules": 7}, "target_modules: expected"),
        ({"target_modules": "v_proj"}, "write ['v_proj']"),
        ({"target_modules": "(q_proj"}, "not a regular expression"),
        ({"mode": "synapse", "links": []}, "without links trains nothing"),
        ({"modules_to_save": ["q_proj"]}, "'q_proj' is also adapted"),
        ({"modules_to_save": ["embed_tokens"], "adapt_embedding": True}, "is also adapted"),
        ({"carrier": "lora", "r": 0}, "r: expected a rank"),
        ({"carrier": "lora", "r": "8"}, "r: expected a rank"),
        ({"carrier": "lora", "r": True}, "r: expected a rank from 1 to 1,048,576, found True"),
        ({"carrier": "lora", "r": 2**20 + 1}, "r: expected a rank"),
        ({"carrier": "lora", "lora_alpha": math.nan}, "up to 1,048,576, found nan"),
        ({"carrier": "lora", "lora_alpha": math.inf}, "up to 1,048,576, found inf"),
        ({"carrier": "lora", "lora_alpha": 0}, "lora_alpha: expected a number above 0"),
        ({"carrier": "dora", "lora_alpha": True}, "lora_alpha: expected a number above 0"),
        ({"carrier": "dora", "lora_dropout": math.nan}, "lora_dropout: expected 0 <= p < 1"),
        ({"carrier": "dora", "lora_dropout": -0.1}, "lora_dropout: expected 0 <= p < 1"),
        ({"carrier": "lora", "lora_alpha": "16"}, "lora_alpha: expected a number"),
        ({"carrier": "dora", "lora_dropout": 1}, "lora_dropout: expected"),
        ({"carrier": "dora", "lora_dropout": "0.1"}, "lora_dropout: expected"),
        ({"carrier": "lora", "shift": True}, "shift: the lora carrier has no"),
        ({"form": "leen"}, "did you mean 'lean'?"),
        ({"modules_to_save": "lm_head"}, "modules_to_save: expected a list"),
    ],
)
def test_a_wrong_option_is_one_line_with_what_would_work(options, said):
    with pytest.raises(InputError) as error:
        SanConfig(**options)
    message = str(error.value)
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["qproj"], "'qproj' is not one of q_proj"),
        (["qproj"], "did you mean 'q_proj'?"),
        (["down_porj", "q_proj"], "did you mean 'down_proj'?"),
        (["lm_head"], "'lm_head' is not one of"),
        (["model.layers.0.mlp.gate"], "did you mean 'gate_proj'?"),
    ],
)
def test_a_target_that_no_llama_has_is_named_with_the_nearest(targets, said):
    config = SanConfig(target_modules=targets)  # another model might have it
    for refuse in (propagation_graph, lambda _, it: get_peft_model(tiny_model(), it)):
        with pytest.raises(InputError) as error:
            refuse(tiny_config(), config)
        assert said in str(error.value)


@pytest.mark.parametrize("option", [{"r": 64}, {"lora_alpha": 32}, {"lora_dropout": 0.1}])
def test_an_option_of_matrices_is_told_to_do_nothing_with_the_scale_carrier(option):
    ((name, value),) = option.items()
    with pytest.warns(UserWarning, match=f"{name}={value}.*does nothing.*carrier='lora'"):
        SanConfig(**option)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SanConfig(carrier="lora", **option)
        SanConfig()


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="shfit"):
        SanConfig(shfit=True)  # type: ignore[call-arg]


OPTIONS = st.fixed_dictionaries(
    {
        "target_modules": st.one_of(
            st.none(),
            st.lists(st.sampled_from(SEVEN), min_size=1, unique=True),
            st.just(r".*layers\.\d\.mlp\.(up|down)_proj"),
            st.just(["model.layers.3.self_attn.o_proj"]),
        ),
        "mode": st.sampled_from(["both", "neuron"]),
        "shift": st.booleans(),
        "links": st.one_of(st.lists(st.sampled_from(ALL_LINKS), unique=True), st.just("free")),
        "adapt_embedding": st.booleans(),
        "train_norms": st.booleans(),
        "task_type": st.sampled_from([None, TaskType.CAUSAL_LM]),
        "modules_to_save": st.sampled_from([None, ["lm_head"]]),
    }
).filter(lambda options: options["links"] != "free" or options["mode"] == "both")


@settings(max_examples=40, deadline=None)
@given(options=OPTIONS)
def test_every_option_comes_back_from_its_file(tmp_path_factory, options):
    folder = tmp_path_factory.mktemp("config")
    config = SanConfig(**options)
    config.save_pretrained(folder)
    for loader in (SanConfig, PeftConfig):  # PeftConfig finds the class by peft_type
        again = loader.from_pretrained(folder)
        assert type(again) is SanConfig
        assert again.to_dict() == config.to_dict()


def test_links_and_targets_are_stored_in_one_order(tmp_path):
    one = SanConfig(links=["residual", "mlp", "mlp"], target_modules={"v_proj", "o_proj"})
    other = SanConfig(links=("mlp", "residual"), target_modules={"o_proj", "v_proj"})
    assert one.to_dict() == other.to_dict()


def test_a_set_of_targets_gets_an_order_that_no_hash_seed_changes():
    assert SanConfig(target_modules=set(SEVEN)).target_modules == sorted(SEVEN)


def test_a_hand_edited_file_is_checked_like_an_option(tmp_path):
    SanConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mode": "nueron"}))
    with pytest.raises(InputError, match="did you mean 'neuron'"):
        PeftConfig.from_pretrained(tmp_path)


def test_the_keys_of_a_saved_adapter_are_known_without_peft():
    assert {field.name for field in fields(SanConfig)} <= SAVED_KEYS


def test_the_note_on_loading_is_not_an_option():
    assert SanConfig(how_to_load="by magic") == SanConfig()


def test_peft_finds_the_method_by_its_name():
    from peft import get_peft_config

    config = get_peft_config({"peft_type": "SAN", "mode": "neuron"})
    assert isinstance(config, SanConfig)
    assert config.mode == "neuron"
