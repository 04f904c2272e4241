"""A base's files contradict each other: every stage says so in one line, before it begins."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from san.adapted import adapt, text
from tiny import save_tiny, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from san_llm.errors import InputError
from san_llm.merge.request import MergeRequest, check_request
from san_llm.merge.run import merge
from san_llm.models.load import load_base, load_config
from san_llm.models.locate import find_base
from san_llm.models.subject import Subject, find_subject
from san_llm.models.tokenizer import load_tokenizer
from san_llm.plan.bases import config_of
from san_llm.recipe.schema import Base

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def copy(here, tiny_base):
    """A copy of the tiny base, to be spoilt."""
    shutil.copytree(tiny_base, here / "copy")
    return here / "copy"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A SAN adapter of the tiny base."""
    folder = tmp_path_factory.mktemp("adapter")
    adapt(tiny_model()).save_pretrained(folder)
    return folder


def config(folder, **changes):
    """Change keys of a config.json; None takes a key out."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def weights(folder, change):
    """Save a folder's weights as ``change`` of them returns them."""
    save_file(change(load_file(folder / SINGLE)), folder / SINGLE, {"format": "pt"})


def shards(folder, **index):
    """Save a folder's weights as two shards and their index."""
    tensors = load_file(folder / SINGLE)
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map, **index}))


def sharded(folder, **index):
    shards(folder, **index)
    (folder / SINGLE).unlink()


def drop(*names):
    return lambda tensors: {name: t for name, t in tensors.items() if name not in names}


def renamed(change):
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


def as_dtype(dtype):
    return lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()}


def doubled_head(tensors):
    return tensors | {HEAD: tensors[HEAD] * 2, TABLE: tensors[TABLE]}


BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
NORM = "model.layers.2.input_layernorm.weight"
# what is done to the folder, and what every stage says of it
SPOILT = {
    "an adapter in it": (
        lambda base: (base / "adapter_config.json").write_text("{}"),
        "adapter_config.json: an adapter in the folder of a base",
    ),
    "whole weights, a quantization": (
        lambda base: config(base, quantization_config=BNB),
        "config.json: has a quantization_config, but the weights beside it are not quantized",
    ),
    "whole weights, another's quantization": (
        lambda base: config(base, quantization_config={"quant_method": "gptq"}),
        "config.json: has a quantization_config, but the weights beside it are not quantized",
    ),
    "numbers of 8 bits, no quantization": (
        lambda base: weights(base, as_dtype(torch.float8_e4m3fn)),
        "is stored as F8_E4M3, and config.json has no quantization_config",
    ),
    "tied, and a head": (
        lambda base: (config(base, tie_word_embeddings=True), weights(base, doubled_head)),
        "config.json says tie_word_embeddings, but lm_head.weight is not model.embed_tokens.weight",
    ),
    "not tied, and no head": (
        lambda base: weights(base, drop(HEAD)),
        "its weights have no lm_head.weight; config.json does not tie it to the embedding",
    ),
    "a norm is missing": (
        lambda base: weights(base, drop(NORM)),
        f"its weights have no {NORM}; they begin with lm_head.weight",
    ),
    "names of a wrapped model": (
        lambda base: weights(base, renamed(lambda name: f"module.{name}")),
        "its weights have no model.embed_tokens.weight; they begin with module.lm_head.weight",
    ),
    "another model's blocks": (
        lambda base: config(base, num_hidden_layers=3),
        "its config.json has num_hidden_layers 3, its weights have 4 blocks",
    ),
    "another model's sizes": (
        lambda base: config(base, intermediate_size=None),
        "has the shape (48, 32), by its config.json it is (11008, 32)",
    ),
    "a lost shard": (
        lambda base: (sharded(base, metadata={}), (base / "model-2.safetensors").unlink()),
        "model-2.safetensors: cannot be read: No such file or directory",
    ),
    "an index without metadata": (
        sharded,
        f'{INDEX}: has no "metadata", without which transformers does not load it',
    ),
}


@pytest.mark.parametrize("name", list(SPOILT))
def test_every_stage_refuses_a_base_whose_files_disagree(copy, adapter, name):
    spoil, message = SPOILT[name]
    spoil(copy)
    base = Base(model=str(copy), dtype="float32")
    subject = Subject(base, adapter, None, None)
    stages = {
        "plan": lambda: config_of(base),
        "train": lambda: load_config(find_base(base)),
        "merge": lambda: check_request(MergeRequest(subject, Path("merged"))),
    }
    for stage, begin in stages.items():
        with pytest.raises(InputError) as caught:
            begin()
        assert str(caught.value).startswith(str(copy)), stage
        assert message in str(caught.value), stage
        assert "\n" not in str(caught.value)


def merged_logits(copy, adapter):
    """Merge into a base and return ``(the loaded base's, the merged model's)`` adapted logits."""
    found = find_base(Base(model=str(copy), dtype="float32"))
    adapted = adapt(load_base(found))
    adapted.load_adapter(str(adapter), "saved")
    adapted.set_adapter("saved")
    merge(MergeRequest(find_subject(str(copy), adapter), Path("merged")))
    stock = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
    with torch.no_grad():
        return adapted.eval()(text()).logits, stock.eval()(text()).logits


def other_shards(base):
    """Leave the shards of another save in the folder, and its index."""
    own = (base / SINGLE).read_bytes()
    weights(base, lambda tensors: {name: tensor * 3 for name, tensor in tensors.items()})
    shards(base, metadata={})
    (base / SINGLE).write_bytes(own)


GOOD = {
    "two sets of weights": other_shards,
    "float64": lambda base: (weights(base, as_dtype(torch.float64)), config(base, dtype="float64")),
    "names of the inner model": lambda base: (
        config(base, tie_word_embeddings=True),
        weights(base, drop(HEAD)),
        weights(base, renamed(lambda name: name.removeprefix("model."))),
    ),
    "tied, and the same head stored": lambda base: (
        config(base, tie_word_embeddings=True),
        weights(base, lambda tensors: tensors | {HEAD: tensors[TABLE].clone()}),
    ),
    "an index of one file": lambda base: (base / INDEX).write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(load_file(base / SINGLE), SINGLE)})
    ),
}


@pytest.mark.parametrize("name", list(GOOD))
def test_training_and_merging_read_the_same_weights(copy, adapter, capfd, name):
    GOOD[name](copy)
    expected, found = merged_logits(copy, adapter)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    said = f"{copy}: two sets of weights: {SINGLE} is read" in capfd.readouterr().err
    assert said == (name == "two sets of weights")


def test_a_tied_head_that_is_stored_stays_as_it_was_when_the_embedding_is_scaled(copy):
    GOOD["tied, and the same head stored"](copy)
    adapt(load_base(find_base(Base(model=str(copy)))), adapt_embedding=True).save_pretrained("ad")
    merge(MergeRequest(find_subject(str(copy), Path("ad")), Path("merged")))
    saved = load_file("merged/model.safetensors")
    assert json.loads(Path("merged/config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(saved[HEAD], load_file(copy / SINGLE)[TABLE])
    assert not torch.equal(saved[TABLE], saved[HEAD])


@pytest.mark.parametrize("role", ["eos_token", "pad_token"])
def test_a_token_past_the_embedding_is_refused_with_both_sizes(here, role):
    save_tiny(here / "base")
    tokenizer = AutoTokenizer.from_pretrained(here / "base")
    rows = len(tokenizer)
    tokenizer.add_special_tokens({role: "<mine>"})
    tokenizer.save_pretrained(here / "base")
    with pytest.raises(InputError) as caught:
        load_tokenizer(find_base(Base(model=str(here / "base"))))
    assert f"{role}: the token '<mine>' has the id {rows}" in str(caught.value)
    assert f"embedding of {rows} rows (its tokenizer has {rows + 1} tokens)" in str(caught.value)
