"""Merged models as .gguf files, read again by transformers and by the format's own reader."""

import json
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from san.adapted import adapt, family_model, text
from tiny import save_tiny, tiny_model
from tiny_gguf import VOCABULARY, gguf_model, write_gguf
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from san_llm.errors import InputError, SanError
from san_llm.merge.request import MergeRequest
from san_llm.merge.run import merge
from san_llm.models.from_gguf import convert_gguf
from san_llm.models.subject import find_subject

FP32 = torch.float32
# Of the largest logit: half a step of each format, through two blocks.
BOUNDS = {"f16": 5e-3, "bf16": 4e-2, "q8_0": 1e-1}


def make(folder, **changes):
    """Save a tiny base with a byte-level tokenizer, and an adapter over it."""
    changes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2} | changes
    model = gguf_model(**changes)
    convert_gguf(write_gguf(folder / "source.gguf", model), folder / "base")
    adapt(AutoModelForCausalLM.from_pretrained(folder / "base")).save_pretrained(folder / "adapter")
    return find_subject(str(folder / "base"), folder / "adapter")


def answers(folder, **how):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval()
    with torch.no_grad():
        return model(text() % len(VOCABULARY)).logits


@pytest.mark.parametrize("kind", list(BOUNDS))
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}],
    ids=["GQA", "tied", "MHA", "MQA"],
)
def test_transformers_reads_the_same_model_back(here, kind, changes):
    result = merge(MergeRequest(make(here, **changes), Path("out"), "float32", gguf=kind))
    assert result.gguf == str(Path("out/model.gguf"))
    Path("alone").mkdir()
    os.rename("out/model.gguf", "alone/model.gguf")  # so that nothing else is read
    expected, found = answers("out"), answers("alone", gguf_file="model.gguf")
    apart = ((found - expected).abs().max() / expected.abs().max()).item()
    assert apart < BOUNDS[kind]
    own = AutoTokenizer.from_pretrained("out")
    read = AutoTokenizer.from_pretrained("alone", gguf_file="model.gguf")
    for words in ("the other thing", "Grüße, 世界! 123\n\n", "<|start|>the<|end|>"):
        assert read(words)["input_ids"] == own(words)["input_ids"]
        assert read.decode(read(words)["input_ids"]) == own.decode(own(words)["input_ids"])
    # By the file: transformers before 5.23 take its start token for its end.
    stored = fields("alone/model.gguf")
    assert stored["tokenizer.ggml.bos_token_id"] == own.bos_token_id
    assert stored["tokenizer.ggml.eos_token_id"] == own.eos_token_id


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rms_norm_eps": 1e-6, "max_position_embeddings": 77, "rope_theta": 123456.0},
        {"head_dim": 32, "num_key_value_heads": 1, "intermediate_size": 64},
        {"num_hidden_layers": 1, "num_attention_heads": 8},
    ],
)
def test_every_size_and_number_of_the_header_is_the_sources(here, changes):
    subject = make(here)
    config = json.loads((here / "base" / "config.json").read_text())
    changes = {"rms_norm_eps": 1e-5, "rope_theta": 10_000.0} | changes
    config |= {key: value for key, value in changes.items() if key != "rope_theta"}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": changes["rope_theta"]}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**config))
    model.save_pretrained(here / "base")
    adapt(model).save_pretrained(here / "adapter")
    merge(MergeRequest(subject, Path("out"), "float32", gguf="bf16"))
    fields = GGUFReader("out/model.gguf").fields
    said = {
        key.removeprefix("llama."): field.contents()
        for key, field in fields.items()
        if key.startswith("llama.")
    }
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    assert said == {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.dimension_count": head,
        "rope.freq_base": changes["rope_theta"],
        "attention.layer_norm_rms_epsilon": pytest.approx(changes["rms_norm_eps"], rel=1e-6),
        "vocab_size": config["vocab_size"],
    }


@pytest.mark.parametrize("heads", [4, 1])
def test_the_rotary_scaling_of_llama_3_is_written_as_llama_cpp_does(here, heads):
    head_dim = 64 // heads
    subject = make(here, num_attention_heads=heads, num_key_value_heads=1)
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }
    config = json.loads(Path("base/config.json").read_text())
    Path("base/config.json").write_text(json.dumps(config | {"rope_parameters": scaling}))
    merge(MergeRequest(subject, Path("out"), "float32", gguf="f16"))
    stored = {t.name: t.data for t in GGUFReader("out/model.gguf").tensors}
    factors = torch.from_numpy(stored["rope_freqs.weight"].copy())
    plain = 1 / 500_000.0 ** (torch.arange(0, head_dim, 2) / head_dim)
    expected = AutoModelForCausalLM.from_pretrained("out").eval()
    frequencies = expected.model.rotary_emb.inv_freq
    assert torch.allclose(plain / factors, frequencies, rtol=1e-6)
    assert factors.min() == 1
    assert factors.max() == 8
    assert len(factors.unique()) > 2
    # What llama.cpp computes: the file's own base frequency, divided by those factors.
    Path("alone").mkdir()
    os.rename("out/model.gguf", "alone/model.gguf")
    read = AutoModelForCausalLM.from_pretrained("alone", gguf_file="model.gguf", dtype=FP32).eval()
    unscaled = read.model.rotary_emb.inv_freq
    tokens = text() % len(VOCABULARY)
    with torch.no_grad():
        wanted = expected(tokens).logits
        without = read(tokens).logits
        unscaled /= factors
        found = read(tokens).logits
    size = wanted.abs().max()
    assert (found - wanted).abs().max() < BOUNDS["f16"] * size
    assert (without - wanted).abs().max() > BOUNDS["f16"] * size, "the scaling matters"
    with pytest.raises(InputError, match="its rotary frequencies are scaled, which transformers"):
        convert_gguf(Path("alone/model.gguf"), Path("again"))


def fields(file="out/model.gguf"):
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


DEFAULTS = ("max_position_embeddings", "rms_norm_eps", "rope_parameters", "head_dim")


@pytest.mark.parametrize(
    "given",
    [
        {"rms_norm_eps": 3e-5, "max_position_embeddings": 777, "head_dim": 8},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 12_345.0}, "head_dim": 16},
        {"rope_parameters": None, "rope_theta": 54_321.0, "head_dim": 16},  # as older configs
        {**dict.fromkeys(DEFAULTS), "num_key_value_heads": None},
    ],
    ids=["sizes", "rope", "older rope", "left out"],
)
def test_the_file_says_of_the_shape_what_the_config_means_to_its_class(here, given):
    subject = make(here, num_key_value_heads=4)
    if given["head_dim"]:  # transformers reads no such model from GGUF
        model = gguf_model(hidden_size=64, head_dim=given["head_dim"])
        model.save_pretrained("base")
        adapt(model).save_pretrained("adapter")
    config = json.loads(Path("base/config.json").read_text()) | given
    kept = {key: value for key, value in config.items() if value is not None}
    Path("base/config.json").write_text(json.dumps(kept))
    merge(MergeRequest(subject, Path("out"), "float32", gguf="f16"))
    meant, written = AutoConfig.from_pretrained("out"), fields()
    assert {name: written[f"llama.{name}"] for name in SHAPE} == {
        name: pytest.approx(wanted(meant), rel=1e-7) for name, wanted in SHAPE.items()
    }


SHAPE = {
    "context_length": lambda config: config.max_position_embeddings,
    "embedding_length": lambda config: config.hidden_size,
    "block_count": lambda config: config.num_hidden_layers,
    "feed_forward_length": lambda config: config.intermediate_size,
    "attention.head_count": lambda config: config.num_attention_heads,
    "attention.head_count_kv": lambda config: config.num_key_value_heads,
    "attention.key_length": lambda config: config.head_dim,
    "attention.value_length": lambda config: config.head_dim,
    "rope.dimension_count": lambda config: config.head_dim,
    "rope.freq_base": lambda config: config.rope_parameters["rope_theta"],
    "attention.layer_norm_rms_epsilon": lambda config: config.rms_norm_eps,
    "vocab_size": lambda config: config.vocab_size,
}


def test_matrices_are_stored_as_asked_and_vectors_in_fp32(here):
    merge(MergeRequest(make(here), Path("out"), "float32", gguf="q8_0"))
    kinds = {t.name: t.tensor_type.name for t in GGUFReader("out/model.gguf").tensors}
    assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"
    assert kinds["blk.1.ffn_down.weight"] == kinds["token_embd.weight"] == "Q8_0"
    assert len(kinds) == 2 * 9 + 3


def test_a_row_that_is_not_whole_blocks_is_stored_in_f16(here):
    merge(MergeRequest(make(here, intermediate_size=72), Path("out"), "float32", gguf="q8_0"))
    kinds = {t.name: t.tensor_type.name for t in GGUFReader("out/model.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"


@pytest.mark.parametrize(("size", "fits"), [(65504.0, True), (65536.0, False)])
def test_numbers_beyond_f16_are_refused_in_f16_alone(here, size, fits):
    subject = make(here, intermediate_size=72)
    path = here / "base" / "model.safetensors"
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    # Of an embedding, which no scale of this adapter touches; and a row that q8_0 cannot hold.
    tensors["lm_head.weight"][5, 7] = -size
    tensors["model.norm.weight"][3] = 1e6  # a vector stays fp32
    save_file(tensors, path, {"format": "pt"})
    merge(MergeRequest(subject, Path("bf16"), "float32", gguf="bf16"))
    for kind in ("f16", "q8_0"):
        asked = MergeRequest(subject, Path(kind), "float32", gguf=kind)
        if fits or kind == "q8_0":
            merge(asked)
            continue
        with pytest.raises(SanError, match=r"lm_head\.weight has numbers that f16 cannot hold"):
            merge(asked)
        assert not Path(kind).exists()


@pytest.mark.parametrize(("kind", "step"), [("f16", 2**-24), ("bf16", 2**-133)])
def test_a_number_below_half_of_the_smallest_step_becomes_zero_and_is_no_damage(here, kind, step):
    subject = make(here)
    path = here / "base" / "model.safetensors"
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    tensors["lm_head.weight"][5, 7] = 0.49 * step
    save_file(tensors, path, {"format": "pt"})
    merge(MergeRequest(subject, Path("out"), "float32", gguf=kind))
    assert load_file("out/model.safetensors")["lm_head.weight"][5, 7] != 0
    (head,) = (t for t in GGUFReader("out/model.gguf").tensors if t.name == "output.weight")
    assert gguf.quants.dequantize(head.data, head.tensor_type)[5, 7] == 0


def test_the_file_of_many_shards_is_that_of_one(here, capsys):
    subject = make(here)
    merge(MergeRequest(subject, Path("one"), gguf="f16"))
    merge(MergeRequest(subject, Path("many"), gguf="f16", shard_size=30_000))
    one, many = (GGUFReader(f"{name}/model.gguf").tensors for name in ("one", "many"))
    many = {tensor.name: tensor.data for tensor in many}
    assert len(one) == len(many)
    assert all(np.array_equal(tensor.data, many[tensor.name]) for tensor in one)
    told = capsys.readouterr().err
    for part in ("Writing", "Checking"):
        line = f"\n{part} GGUF: {len(many)} of {len(many)} tensors after "
        assert f"\n{told}".count(line) == 2


def test_the_command_says_where_and_the_manifest_has_its_sum(command, here):
    from hashlib import sha256

    make(here)
    asked = ("merge", "--adapter", "adapter", "--model", "base", "--output", "out")
    done = command(*asked, "--gguf", "q4")
    assert done.stderr.startswith("error: --gguf: 'q4' is not one of f16, bf16, q8_0")
    done = command(*asked, "--gguf", "bf16")
    assert done.returncode == 0, done.stderr
    assert "out/model.gguf (bf16)" in done.stdout
    sums = json.loads(Path("out/merge_manifest.json").read_text())["sha256"]
    assert sums["model.gguf"] == sha256(Path("out/model.gguf").read_bytes()).hexdigest()


def test_what_cannot_be_written_is_refused_before_the_merge(here):
    def refused(subject, said, **how):
        with pytest.raises(InputError, match=said):
            merge(MergeRequest(subject, Path("out"), gguf="f16", **how))
        assert not Path("out").exists()

    subject = make(here)
    family_model("mistral").save_pretrained("mistral")
    adapt(AutoModelForCausalLM.from_pretrained("mistral")).save_pretrained("other")
    other = find_subject("mistral", Path("other"))
    refused(other, "only the llama family is written, this is mistral")
    save_tiny(here / "words")
    adapt(tiny_model()).save_pretrained("third")
    words = find_subject("words", Path("third"))
    refused(words, "tokenizer.json: only byte-level BPE is written, found WordLevel")
    os.unlink("words/tokenizer.json")
    refused(words, "words: no tokenizer in it")
    config = json.loads(Path("base/config.json").read_text())
    scaled = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0}
    changed = config | {"rope_parameters": scaled}
    Path("base/config.json").write_text(json.dumps(changed))
    refused(subject, "rotary scaling of the type 'yarn' is not written")
    Path("base/config.json").write_text(json.dumps(config | {"mlp_bias": True}))
    refused(subject, "a model with biases is not written")
    Path("base/config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    refused(subject, "config.json: hidden_act 'gelu' is not written: readers compute silu")


@pytest.mark.parametrize("shape", [1, 2], ids=["vectors", "matrices"])
def test_a_file_that_came_out_otherwise_is_refused(here, monkeypatch, shape):
    subject = make(here)
    right = gguf.quants.quantize

    def wrong(numbers, kind):
        made = right(numbers, kind)
        if numbers.ndim == shape:  # two steps of the format, of one number
            flat = made.reshape(-1)
            flat.view(np.uint32 if shape == 1 else np.uint8 if kind.name == "Q8_0" else np.uint16)[
                -1
            ] += 2
        return made

    monkeypatch.setattr(gguf.quants, "quantize", wrong)
    for kind in BOUNDS:
        with pytest.raises(SanError, match=r"model.gguf: \S+ is not what was merged"):
            merge(MergeRequest(subject, Path(kind), "float32", gguf=kind))
        assert not Path(kind).exists()
