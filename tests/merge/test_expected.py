"""Merged weights checked a second time in fp64, and what a verification says of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from san.adapted import FAMILIES, FUSED, adapt, family_model
from tiny import save_tiny, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from san_llm.errors import InputError, SanError
from san_llm.merge.expected import ROUNDING, check_errors, stored_rows, weight_errors
from san_llm.merge.request import MergeRequest, check_request
from san_llm.merge.run import merge
from san_llm.merge.verify import verify
from san_llm.models.adapter import open_adapter
from san_llm.models.subject import find_subject
from san_llm.shown import parse_size

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def made(here):
    """Save a base of a family and an adapter over it, and merge them into ``merged``."""

    def make(dtype, family="llama", changes=None, **options):
        model = family_model(family, **(changes or {}))
        model.model.layers[1].mlp.down_proj.weight.data[3:5] = 0  # as in a pruned base
        model.save_pretrained("base")
        tiny_tokenizer().save_pretrained("base")
        adapt(AutoModelForCausalLM.from_pretrained("base"), **options).save_pretrained("adapter")
        merge(MergeRequest(find_subject("base", Path("adapter")), Path("merged"), dtype))

    return make


def errors(dtype):
    config = json.loads(Path("base/config.json").read_text())
    adapter = open_adapter(Path("adapter"))
    return weight_errors(stored_rows(Path("base")), config, adapter, Path("merged"), dtype)


def task(dtype):
    """Return the merge that ``made`` has made."""
    return check_request(MergeRequest(find_subject("base", Path("adapter")), Path("new"), dtype))


def tamper(change):
    path = Path("merged/model.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "neuron"},
        {"mode": "synapse"},
        {"shift": True},
        {"adapt_embedding": True, "changes": {"tie_word_embeddings": True}},
        {"modules_to_save": ["norm"]},
        {"carrier": "lora", "r": 4},
        {"carrier": "lora", "r": 4, "mode": "synapse"},
        {"carrier": "lora", "r": 4, "mode": "neuron"},
        {"carrier": "dora", "r": 4},
        {"carrier": "dora", "r": 4, "mode": "synapse"},
        {"links": "free"},
        {"train_norms": True},
    ],
)
def test_every_tensor_of_a_right_merge_is_within_its_rounding(made, options, dtype):
    made(dtype, **options)
    found = errors(dtype)
    assert found.keys() == load_file("merged/model.safetensors").keys()
    check_errors(Path("merged"), found, dtype)
    if dtype == "bfloat16":
        assert max(found.values()) > ROUNDING[dtype] / 4, "rounding is seen"


@pytest.mark.parametrize("family", [*FAMILIES, *FUSED])
def test_every_family_is_checked(made, family):
    made("float32", family)
    check_errors(Path("merged"), errors("float32"), "float32")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t[NAME][3].mul_(1.01),
        lambda t: t[NAME][3, 5].neg_(),
        lambda t: t[NAME][3, 5].fill_(float("nan")),
        lambda t: t[NAME].copy_(t[NAME].roll(1, 0)),
    ],
    ids=["scaled", "sign", "nan", "rolled"],
)
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_one_wrong_number_is_found_and_named(made, change, dtype):
    made(dtype)
    before = errors(dtype)
    tamper(change)
    after = errors(dtype)
    assert {n for n in after if after[n] != before[n]} == {NAME}
    with pytest.raises(SanError, match=rf"merged: {NAME} is .* \(1 of {len(after)} tensors\)"):
        check_errors(Path("merged"), after, dtype)


def test_an_untouched_tensor_that_changed_is_found(made):
    made("float32")
    tamper(lambda tensors: tensors["model.embed_tokens.weight"][2, 3].add_(1e-3))
    with pytest.raises(SanError, match=r"model\.embed_tokens\.weight is"):
        check_errors(Path("merged"), errors("float32"), "float32")


# --- what a verification says ---


@pytest.mark.slow
def test_a_verification_has_every_error_and_how_alike_the_texts_are(made):
    made("bfloat16")
    result = verify(Path("merged"), task("bfloat16"))
    assert result.weight_errors == errors("bfloat16")
    worst = max(result.weight_errors, key=result.weight_errors.get)
    assert result.largest_weight_error == (worst, result.weight_errors[worst])
    assert 0 <= result.same_greedy <= 1
    assert result.quantization_moved is None


@pytest.mark.slow
def test_greedy_texts_are_those_that_generate_writes(made, monkeypatch):
    import san_llm.merge.verify

    seen = []
    right = san_llm.merge.verify._stock_answers

    def spy(*arguments, **how):
        seen.append(right(*arguments, **how))
        return seen[-1]

    monkeypatch.setattr(san_llm.merge.verify, "_stock_answers", spy)
    made("float32")
    result = verify(Path("merged"), task("float32"))
    assert result.same_greedy == 1
    model = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
    model.generation_config.eos_token_id = None
    for prompt, new in zip(san_llm.merge.verify.PROMPTS, seen[0][1], strict=True):
        tokens = tiny_tokenizer()(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(tokens, max_new_tokens=32, do_sample=False, pad_token_id=0)
        assert out[0, tokens.shape[1] :].tolist() == new
        assert len(new) == 32


@pytest.mark.slow
def test_a_method_of_pefts_has_no_formula_to_compare(here):
    save_tiny(here / "base")
    config = LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False)
    get_peft_model(tiny_model(), config).save_pretrained("adapter")
    subject = find_subject("base", Path("adapter"))
    assert merge(MergeRequest(subject, Path("out"), verified=True)).verified.weight_errors is None


# --- sizes ---


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("500MB", 500 * 10**6),
        ("2GB", 2 * 10**9),
        ("2gib", 2 * 2**30),
        (" 1.5 kB ", 1500),
        ("20000", 20_000),
        ("1b", 1),
    ],
)
def test_a_size_is_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "0", "0.1B", "5XB", "1e9", "2 G B", "nan", "٣GB", "9" * 400]
)
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(InputError, match="is not a size: write it as 500MB, 2GB or 2GiB"):
        parse_size(text)


@pytest.mark.parametrize("method", ["san", "lora"])
def test_a_merge_is_cut_into_files_of_the_size_asked_for(command, here, method):
    save_tiny(here / "base")
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    adapted = adapt(tiny_model()) if method == "san" else get_peft_model(tiny_model(), lora)
    adapted.save_pretrained("adapter")
    asked = ("merge", "--adapter", "adapter", "--model", "base", "--output", "out")
    done = command(*asked, "--shard-size", "huge")
    assert (done.returncode, done.stdout) == (2, "")
    assert "'huge' is not a size" in done.stderr
    assert command(*asked, "--shard-size", "50kB").returncode == 0
    sizes = [path.stat().st_size for path in sorted(Path("out").glob("*.safetensors"))]
    assert len(sizes) > 3
    assert all(size < 50_000 + 5_000 for size in sizes), "and a header"
    one = load_file("base/model.safetensors")
    model = AutoModelForCausalLM.from_pretrained("out")
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in one.values())
    assert np.isfinite(model.lm_head.weight.detach().numpy()).all()
