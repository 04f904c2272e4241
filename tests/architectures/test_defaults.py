"""What a silent config.json means here is what it means to transformers' own classes."""

import pytest
from transformers import CONFIG_MAPPING

from san_llm.architectures.decoders import FAMILIES
from san_llm.architectures.defaults import DEFAULTS, completed
from san_llm.architectures.sizes import linear_shapes

DERIVED = ("num_key_value_heads", "head_dim")  # which None stands for, until a class works them out


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_config_that_says_nothing_means_what_its_class_says(family):
    theirs, ours = CONFIG_MAPPING[family](), completed({"model_type": family})
    assert set(ours) == set(DEFAULTS["llama"]) | {"model_type"}
    for key, value in ours.items():
        if value is None:
            assert key in DERIVED
        else:
            assert getattr(theirs, key) == value, key
    assert linear_shapes(ours) == linear_shapes(theirs)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3"])  # others take no null
def test_a_null_means_what_it_means_to_the_class(family):
    silent = {"model_type": family, "hidden_size": 512, "num_attention_heads": 8}
    silent |= {"num_key_value_heads": None}
    assert linear_shapes(completed(silent)) == linear_shapes(CONFIG_MAPPING[family](**silent))


def test_what_a_config_says_stands():
    assert completed({"model_type": "llama", "head_dim": 7, "mine": 1})["head_dim"] == 7
    assert completed({"model_type": "other"}) == {"model_type": "other"}
