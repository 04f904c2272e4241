"""Merged checkpoints: every weight against numpy, the logits in a stock process, all or nothing."""

import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from merge.stock import stock_logits
from peft import (
    AdaptionPromptConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from san.adapted import adapt, text
from tiny import rows, save_tiny, tiny_config, tiny_model, tiny_tokenizer, write_recipe, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaForCausalLM

from san_llm.errors import InputError, SanError
from san_llm.merge.request import MergeRequest, merge_request
from san_llm.merge.run import merge
from san_llm.models.subject import find_subject
from san_llm.models.weights import read_header
from san_llm.progress import quiet_libraries
from san_llm.recipe.read import load_recipe
from san_llm.runs.folder import new_run, point_latest
from san_llm.runs.record import versions

ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
SEVEN = [*ATTENTION, *MLP]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TIED = {"tie_word_embeddings": True}
BIASED = {"attention_bias": True, "mlp_bias": True}
LOW_RANK = {"r": 4, "lora_alpha": 12}

# name: (adapter's options, base's config, the base's dtype, --dtype)
CASES = {
    "both": ({}, {}, FP32, None),
    "both, tied": ({}, TIED, FP32, None),
    "both, bf16": ({}, {}, BF16, None),
    "both, tied bf16 as fp32": ({}, TIED, BF16, "float32"),
    "both, fp32 as bf16": ({}, {}, FP32, "bfloat16"),
    "both, bf16 as fp16": ({}, {}, BF16, "float16"),
    "both, MQA": ({}, {"num_key_value_heads": 1}, FP32, None),
    "both, MHA": ({}, {"num_key_value_heads": 4}, BF16, None),
    "neuron": ({"mode": "neuron"}, {}, FP32, None),
    "neuron, bf16": ({"mode": "neuron"}, TIED, BF16, None),
    "synapse": ({"mode": "synapse"}, {}, FP32, None),
    "synapse, fp16": ({"mode": "synapse"}, TIED, FP32, "float16"),
    "shift": ({"shift": True}, TIED, FP32, None),
    "shift, bf16": ({"shift": True}, {}, BF16, None),
    "shift on biases": ({"shift": True}, BIASED, FP32, None),
    "shift of two targets": (
        {"shift": True, "target_modules": ["k_proj", "up_proj"]},
        {},
        FP32,
        None,
    ),
    "embedding": ({"adapt_embedding": True}, {}, FP32, None),
    "embedding, tied": ({"adapt_embedding": True}, TIED, FP32, None),
    "embedding, tied bf16": ({"adapt_embedding": True}, TIED, BF16, None),
    "embedding, neuron": ({"adapt_embedding": True, "mode": "neuron"}, {}, FP32, None),
    "embedding, synapse": ({"adapt_embedding": True, "mode": "synapse"}, {}, FP32, None),
    "no residual links": ({"links": ["attention", "mlp"]}, {}, BF16, None),
    "few targets": ({"target_modules": ["v_proj", "o_proj", "down_proj"]}, TIED, FP32, None),
}


def save_base(folder, changes, dtype):
    """Save a tiny base; its biases, where it has some, are not zero."""
    model = tiny_model(dtype=dtype, **changes)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_(std=0.3)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def load(folder, dtype=FP32, **how):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **how).eval()


STOCK = """# forked from: stock
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folders, tokens, out = json.loads(sys.argv[1])
logits = {}
for folder in folders:
    model, problems = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert type(model).__name__ == "LlamaForCausalLM", type(model)
    assert not any(problems.values()), problems
    AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits[folder] = model.eval()(torch.tensor(tokens)).logits
save_file(logits, out)
assert not {"san_llm", "peft"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """Merge every case; return ``{name: (base, adapter, merged, stock logits)}``."""
    made = {}
    for number, (name, (options, changes, dtype, target)) in enumerate(CASES.items()):
        folder = tmp_path_factory.mktemp(f"case{number}")
        base = save_base(folder / "base", changes, dtype)
        adapt(load(base), seed=number, **options).save_pretrained(folder / "adapter")
        result = merge(
            MergeRequest(find_subject(str(base), folder / "adapter"), folder / "merged", target)
        )
        assert result.dtype == (target or str(dtype).removeprefix("torch."))
        made[name] = (base, folder / "adapter", folder / "merged")
    logits = stock_logits(
        STOCK,
        [out for *_, out in made.values()],
        tmp_path_factory.mktemp("stock") / "logits.safetensors",
    )
    return {name: (*paths, logits[str(paths[-1])]) for name, paths in made.items()}


def numbers(tensors):
    """Return tensors as fp32 numpy arrays."""
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}


def rounded(array, dtype):
    """Return fp32 numbers rounded once to a dtype, by torch's own conversion."""
    assert array.dtype == np.float32
    return torch.from_numpy(array).to(dtype)


def by_hand(base, adapter, options, config):
    """Return every weight and bias of the merged model in fp32: diag(gamma) W diag(s), in numpy."""
    weights = numbers(load_file(base / "model.safetensors"))
    saved = numbers(load_file(adapter / "adapter_model.safetensors"))
    gammas, betas = {}, {}
    for key, value in saved.items():
        module, _, kind = key.removeprefix("base_model.model.").partition(".san_")
        (gammas if kind == "gamma" else betas)[module] = value
    mode = options.get("mode", "both")
    links = options.get("links", ["attention", "mlp", "residual"])
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    head = config["hidden_size"] // config["num_attention_heads"]
    result = dict(weights)

    def block(number, projection):
        parent = "self_attn" if projection in ATTENTION else "mlp"
        return f"model.layers.{number}.{parent}.{projection}"

    def anterior(number, projection):
        if projection == "o_proj":
            gamma = gammas.get(block(number, "v_proj")) if "attention" in links else None
            if gamma is None:
                return None
            heads = [gamma[h // group * head :][:head] for h in range(len(gamma) // head * group)]
            return np.concatenate(heads)
        if projection == "down_proj":
            return gammas.get(block(number, "up_proj")) if "mlp" in links else None
        if "residual" not in links:
            return None
        if projection in ("gate_proj", "up_proj"):
            return gammas.get(block(number, "o_proj"))
        if number == 0:
            return gammas.get("model.embed_tokens")
        return gammas.get(block(number - 1, "down_proj"))

    for number in range(config["num_hidden_layers"]):
        for projection in options.get("target_modules", SEVEN):
            name = block(number, projection)
            weight = weights[f"{name}.weight"]
            bias = weights.get(f"{name}.bias")
            if mode != "synapse":
                weight = gammas[name][:, None] * weight
                bias = None if bias is None else gammas[name] * bias
            s = None if mode == "neuron" else anterior(number, projection)
            if s is not None:
                weight = weight * s[None, :]
            if name in betas:
                bias = betas[name] if bias is None else bias + betas[name]
            result[f"{name}.weight"] = weight
            if bias is not None:
                result[f"{name}.bias"] = bias
    if "model.embed_tokens" in gammas and mode != "synapse":
        table = weights["model.embed_tokens.weight"]
        result["model.embed_tokens.weight"] = table * gammas["model.embed_tokens"][None, :]
        result.setdefault("lm_head.weight", table)  # the features are scaled, the head is not
    return result


@pytest.mark.parametrize("name", list(CASES))
def test_every_weight_is_the_formula_in_fp32_rounded_once(merged, name):
    options, _, dtype, target = CASES[name]
    base, adapter, out, _ = merged[name]
    stored = getattr(torch, target) if target else dtype
    config = json.loads((base / "config.json").read_text())
    expected = by_hand(base, adapter, options, config)
    found = load_file(out / "model.safetensors")
    zeros = {key for key in found if key.endswith(".bias") and key not in expected}
    assert found.keys() - zeros == expected.keys()
    assert bool(zeros) == (name == "shift of two targets")
    for key in zeros:  # a config gives all Linears of a parent a bias, or none
        assert not found[key].any()
    for key, value in expected.items():
        assert found[key].dtype == stored
        assert torch.equal(found[key], rounded(value, stored)), key
    before = numbers(load_file(base / "model.safetensors"))
    changed = {key for key in before if not np.array_equal(before[key], expected[key])}
    assert changed, "the adapter moves something"
    for key in before.keys() - changed:
        assert torch.equal(found[key], rounded(before[key], stored)), f"{key} is the base's"


def adapted_logits(base, adapter):
    with torch.no_grad():
        return PeftModel.from_pretrained(load(base), adapter).eval()(text()).logits


def apart(found, expected):
    """Return the largest difference in units of the largest expected number."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", list(CASES))
def test_stock_transformers_answers_as_base_and_adapter(merged, name):
    base, adapter, out, logits = merged[name]
    stored = json.loads((out / "config.json").read_text())["dtype"]
    expected = adapted_logits(base, adapter)
    bound = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 5e-2}[stored]
    assert apart(logits, expected) < bound
    assert apart(load(base)(text()).logits.detach(), expected) > 4 * bound, "the adapter matters"


@pytest.mark.parametrize("name", list(CASES))
def test_a_merged_folder_is_a_whole_stock_checkpoint(merged, name):
    _, _, dtype, target = CASES[name]
    base, _, out, _ = merged[name]
    assert sorted(os.listdir(out)) == [
        *("README.md", "chat_template.jinja", "config.json", "generation_config.json"),
        *("merge_manifest.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    ]
    for file in ("chat_template.jinja", "tokenizer.json", "generation_config.json"):
        assert (out / file).read_bytes() == (base / file).read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == (target or str(dtype).removeprefix("torch."))
    assert not {"auto_map", "quantization_config", "_name_or_path"} & set(config)
    card = (out / "README.md").read_text()
    assert f"# {base.name} tuned with SAN" in card
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        count = sum(np.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    assert f"Parameters: {count:,}, stored as {config['dtype']}" in card
    base_size = sum(t.numel() for t in load_file(base / "model.safetensors").values())
    if not CASES[name][0].get("shift") and "embedding, tied" not in name:
        assert count == base_size


# --- the methods of PEFT ---


def randomized(model, seed=0):
    """Move every trained number of an adapter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.rand(parameter.shape, generator=generator)
            parameter.data = parameter.data + 0.3 * (noise - 0.5)
    return model.eval()


PEFT_METHODS = {
    "lora": lambda: LoraConfig(target_modules=SEVEN, task_type="CAUSAL_LM", **LOW_RANK),
    "dora": lambda: LoraConfig(
        target_modules=SEVEN, task_type="CAUSAL_LM", use_dora=True, **LOW_RANK
    ),
    "ia3": lambda: IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    ),
}
PEFT_CASES = [
    (method, changes, dtype, target)
    for method in PEFT_METHODS
    for changes, dtype, target in (
        ({}, FP32, None),
        (TIED, BF16, None),
        (TIED, FP32, "bfloat16"),
        ({}, BF16, "float32"),
    )
]


def peft_by_hand(method, weight, saved, module):
    """Return one merged weight in fp32, by the method's formula."""
    prefix = f"base_model.model.{module}."
    if method == "ia3":
        scale = saved.get(f"{prefix}ia3_l")
        return weight if scale is None else weight * scale.reshape(scale.shape)
    delta = 12 / 4 * (saved[f"{prefix}lora_B.weight"] @ saved[f"{prefix}lora_A.weight"])
    if method == "lora":
        return weight + delta
    magnitude = saved[f"{prefix}lora_magnitude_vector"]
    direction = weight + delta
    return magnitude[:, None] * direction / np.linalg.norm(direction, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def peft_merged(tmp_path_factory):
    made = {}
    for number, (method, changes, dtype, target) in enumerate(PEFT_CASES):
        folder = tmp_path_factory.mktemp(f"peft{number}")
        base = save_base(folder / "base", changes, dtype)
        model = get_peft_model(load(base), PEFT_METHODS[method]())
        randomized(model, number).save_pretrained(folder / "adapter")
        merge(MergeRequest(find_subject(str(base), folder / "adapter"), folder / "merged", target))
        made[number] = (base, folder / "adapter", folder / "merged")
    logits = stock_logits(
        STOCK,
        [out for *_, out in made.values()],
        tmp_path_factory.mktemp("stock") / "logits.safetensors",
    )
    return [(*paths, logits[str(paths[-1])]) for paths in made.values()]


@pytest.mark.parametrize(
    "number", range(len(PEFT_CASES)), ids=[f"{c[0]}-{c[2]}-{c[3]}" for c in PEFT_CASES]
)
def test_pefts_methods_merge_in_fp32_and_round_once(peft_merged, number):
    method, _, dtype, target = PEFT_CASES[number]
    base, adapter, out, logits = peft_merged[number]
    stored = getattr(torch, target) if target else dtype
    before = numbers(load_file(base / "model.safetensors"))
    saved = numbers(load_file(adapter / "adapter_model.safetensors"))
    found = load_file(out / "model.safetensors")
    assert found.keys() == before.keys()
    moved = 0
    for key, value in before.items():
        module = key.removesuffix(".weight")
        adapted = any(f".{module}." in name for name in saved)
        expected = peft_by_hand(method, value, saved, module) if adapted else value
        exact = method == "ia3" or not adapted  # a sum's order is free, a product's is not
        moved += adapted
        assert found[key].dtype == stored
        if exact:
            assert torch.equal(found[key], rounded(np.ascontiguousarray(expected), stored)), key
        elif stored == FP32:
            assert np.allclose(found[key].numpy(), expected, rtol=1e-5, atol=1e-6), key
        else:
            # A sum in another order may fall on the other side of a rounding, rarely.
            other = found[key] != rounded(expected.astype(np.float32), stored)
            assert other.float().mean() < 0.01, key
            assert np.allclose(found[key].float().numpy(), expected, rtol=2**-7, atol=1e-6), key
    assert moved == (12 if method == "ia3" else 28)
    expected_logits = adapted_logits(base, adapter)
    assert apart(logits, expected_logits) < {FP32: 1e-5, BF16: 5e-2}[stored]
    assert not any("lora" in key or "ia3" in key for key in found)
    for file in ("chat_template.jinja", "generation_config.json", "tokenizer.json", "README.md"):
        assert (out / file).is_file()
    assert not list(out.glob("*.bin"))
    assert not (out / "adapter_config.json").exists()


def lora(*targets, **how):
    return LoraConfig(target_modules=[*targets], task_type="CAUSAL_LM", **LOW_RANK, **how)


@pytest.mark.parametrize(
    ("config", "stays"),
    [
        (lora("q_proj"), True),
        (lora("q_proj", "lm_head"), False),
        (lora("q_proj", "embed_tokens"), False),
        (lora("lm_head", use_dora=True), False),
        (lora("embed_tokens", use_dora=True), False),
        (lora("q_proj", modules_to_save=["lm_head"]), False),
        (lora("q_proj", modules_to_save=["embed_tokens"]), False),
    ],
    ids=[
        "neither",
        "head",
        "embedding",
        "DoRA head",
        "DoRA embedding",
        "own head",
        "own embedding",
    ],
)
def test_what_an_adapter_does_to_one_of_two_tied_weights_is_not_done_to_the_other(
    here, config, stays
):
    save_base(here / "base", TIED, FP32)
    randomized(get_peft_model(load("base"), config)).save_pretrained("adapter")
    merge(MergeRequest(find_subject("base", Path("adapter")), Path("out")))
    wanted = adapted_logits("base", "adapter")
    merged = load("out")
    with torch.no_grad():
        assert apart(merged(text()).logits, wanted) < 1e-5
    assert merged.config.tie_word_embeddings is stays
    assert ("lm_head.weight" not in load_file("out/model.safetensors")) is stays


def test_pefts_warning_of_tied_weights_is_not_shown(recwarn, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    quiet_libraries()
    get_peft_model(tiny_model(**TIED), lora("q_proj", "lm_head"))
    assert not [warning for warning in recwarn if "tie" in str(warning.message)]


def test_blocks_that_an_adapter_repeats_are_each_merged_for_themselves(here):
    save_base(here / "base", {}, FP32)
    model = get_peft_model(load("base"), lora("q_proj", layer_replication=[[0, 3], [1, 4]]))
    randomized(model).save_pretrained("adapter")
    merge(MergeRequest(find_subject("base", Path("adapter")), Path("out")))
    merged = load("out")
    assert len(merged.model.layers) == merged.config.num_hidden_layers == 6
    with torch.no_grad():
        assert apart(merged(text()).logits, adapted_logits("base", "adapter")) < 1e-5


CAUSAL = {"task_type": "CAUSAL_LM"}
UNMERGEABLE = {
    "PROMPT_TUNING": PromptTuningConfig(num_virtual_tokens=2, **CAUSAL),
    "PREFIX_TUNING": PrefixTuningConfig(num_virtual_tokens=2, **CAUSAL),
    "P_TUNING": PromptEncoderConfig(num_virtual_tokens=2, **CAUSAL),
    "ADAPTION_PROMPT": AdaptionPromptConfig(adapter_len=2, adapter_layers=1, **CAUSAL),
}


@pytest.mark.parametrize("method", UNMERGEABLE)
def test_an_adapter_that_changes_no_weights_is_refused_before_its_base_is_looked_for(here, method):
    get_peft_model(tiny_model(), UNMERGEABLE[method]).save_pretrained("adapter")
    said = f"adapter/adapter_config.json: peft_type {method} adds to what a model reads"
    with pytest.raises(InputError, match=said):
        merge(MergeRequest(find_subject("owner/nowhere", Path("adapter")), Path("out")))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"lora_bias": True}, "lora_bias gives the base a model.layers.0.self_attn.q_proj.bias"),
        ({"alora_invocation_tokens": [1]}, "PEFT does not merge it: aLoRA does not support"),
    ],
    ids=["biases", "aLoRA"],
)
def test_an_adapter_that_peft_cannot_merge_is_refused_in_words(command, here, how, said):
    save_base(here / "base", {}, FP32)
    get_peft_model(load("base"), lora("q_proj", **how)).save_pretrained("adapter")
    done = command("merge", "--adapter", "adapter", "--model", "base", "--output", "out")
    refused(done, 2, said)


def test_biases_of_an_adapter_are_merged_into_those_of_its_base(here):
    save_base(here / "base", BIASED, FP32)
    randomized(get_peft_model(load("base"), lora("q_proj", lora_bias=True))).save_pretrained("ad")
    merge(MergeRequest(find_subject("base", Path("ad")), Path("out")))
    with torch.no_grad():
        assert apart(load("out")(text()).logits, adapted_logits("base", "ad")) < 1e-5


def test_a_base_with_odd_generation_settings_merges_and_keeps_them(tmp_path):
    base = save_base(tmp_path / "base", {}, FP32)
    odd = {"do_sample": False, "temperature": 0.9, "eos_token_id": [1, 3]}
    (base / "generation_config.json").write_text(json.dumps(odd))
    model = get_peft_model(load(base), PEFT_METHODS["lora"]())
    randomized(model).save_pretrained(tmp_path / "lora")
    adapt(load(base)).save_pretrained(tmp_path / "san")
    for name in ("lora", "san"):
        merge(MergeRequest(find_subject(str(base), tmp_path / name), tmp_path / f"merged-{name}"))
        kept = json.loads((tmp_path / f"merged-{name}" / "generation_config.json").read_text())
        assert kept == kept | odd


# --- all or nothing ---


@pytest.fixture
def pair(here):
    """A tiny base and a moved SAN adapter in ``base`` and ``adapter``."""
    base = save_base(here / "base", {}, FP32)
    adapt(load(base)).save_pretrained(here / "adapter")
    return here


def lora_of(here):
    model = get_peft_model(load(here / "base"), PEFT_METHODS["lora"]())
    randomized(model).save_pretrained(here / "lora")


def change(adapter, how):
    path = Path(adapter) / "adapter_model.safetensors"
    tensors = load_file(path)
    how(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


GAMMA = "base_model.model.model.layers.1.self_attn.v_proj.san_gamma"
LORA_B = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"


def refused(done, code, message):
    """Check that a merge ended with one plain line and left nothing."""
    assert (done.returncode, done.stdout) == (code, "")
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert message in errors[0]
    here = Path(os.getcwd())
    assert sorted(p.name for p in here.iterdir()) == sorted(
        {"base", "adapter", "lora"} & {p.name for p in here.iterdir()}
    )


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        (lambda t: t[GAMMA].fill_(float("nan")), 1, "not finite"),
        (lambda t: t[GAMMA].fill_(float("inf")), 1, "not finite"),
        (lambda t: t.update({GAMMA: torch.ones(7)}), 2, "another base"),
        (lambda t: t.pop(GAMMA), 2, "no gamma for model.layers.1.self_attn.v_proj"),
        (lambda t: t.update({GAMMA.replace(".1.", ".9."): torch.ones(16)}), 2, "belongs to noth"),
    ],
    ids=["nan", "inf", "shape", "missing", "extra"],
)
def test_a_san_adapter_that_cannot_be_merged_leaves_nothing(command, pair, how, code, message):
    change("adapter", how)
    done = command("merge", "--adapter", "adapter", "--model", "base", "--output", "out")
    refused(done, code, message)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_numbers_that_the_dtype_cannot_hold_are_refused_not_made_infinite(command, pair, dtype):
    huge = 1e6 if dtype == "float16" else 1e30
    change("adapter", lambda tensors: [vector.fill_(huge) for vector in tensors.values()])
    asked = ("merge", "--adapter", "adapter", "--model", "base", "--output", "out")
    refused(command(*asked, "--dtype", dtype), 1, f"merged, it has numbers that {dtype} ca")
    if dtype == "float16":
        assert command(*asked, "--dtype", "bfloat16").returncode == 0


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        (lambda t: t[LORA_B].fill_(float("nan")), 1, "has numbers that are not finite"),
        (lambda t: t[LORA_B].fill_(1e6), 1, "it has numbers that float16 cannot hold"),
        (lambda t: t.update({LORA_B: torch.ones(7, 4)}), 1, "size mismatch for base_model."),
    ],
    ids=["nan", "overflow", "shape"],
)
def test_a_lora_adapter_that_cannot_be_merged_leaves_nothing(command, pair, how, code, message):
    lora_of(pair)
    change("lora", how)
    done = command(
        *("merge", "--adapter", "lora", "--model", "base", "--output", "out"),
        *("--dtype", "float16"),
    )
    refused(done, code, message)


def test_a_base_of_another_shape_is_refused(command, pair):
    save_base(pair / "lora", {"intermediate_size": 64}, FP32)  # stands where it may stay
    done = command("merge", "--adapter", "adapter", "--model", "lora", "--output", "out")
    refused(done, 2, "it was trained on another base")


def test_a_base_that_is_missing_or_cut_short_is_refused(command, pair):
    asked = ("merge", "--adapter", "adapter", "--output", "out")
    refused(command(*asked, "--model", "./nowhere"), 2, "./nowhere: no such folder")
    weights = pair / "base" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    refused(command(*asked, "--model", "base"), 2, "cut short")
    weights.unlink()
    refused(command(*asked, "--model", "base"), 2, "no model.safetensors")


def test_an_adapter_without_its_numbers_or_with_a_broken_config_is_refused(command, pair):
    asked = ("merge", "--adapter", "adapter", "--model", "base", "--output", "out")
    config = pair / "adapter" / "adapter_config.json"
    whole = config.read_text()
    config.write_text("{")
    refused(command(*asked), 2, "adapter_config.json: not valid JSON")
    config.write_text("[]")
    refused(command(*asked), 2, "adapter_config.json")
    config.write_text(whole)
    (pair / "adapter" / "adapter_model.safetensors").write_bytes(b"nonsense")
    refused(command(*asked), 2, "adapter_model.safetensors: not a safetensors file")
    (pair / "adapter" / "adapter_model.safetensors").unlink()
    refused(command(*asked), 2, "not an adapter: no adapter_model.safetensors in it")


@pytest.mark.parametrize("method", ["adapter", "lora"])
def test_a_full_disk_leaves_nothing(pair, command, method):
    lora_of(pair)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may grow beyond 64 KiB: the kernel's own error, as on a disk that is full.
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    try:
        done = command("merge", "--adapter", method, "--model", "base", "--output", "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    refused(done, 1, "File too large")


def sparse_pair(vocabulary: int, **options) -> dict[str, list[int]]:
    """Save a base whose zeros take no room, and an adapter over it; return the base's shapes."""
    config = tiny_config(num_hidden_layers=1)
    model = adapt(LlamaForCausalLM(config), **options)
    shapes = {
        name: list(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()
    }
    model.save_pretrained("adapter")
    tiny_config(vocab_size=vocabulary, num_hidden_layers=1).save_pretrained("base")
    shapes |= {name: [vocabulary, 32] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    table, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * int(np.prod(shape))
        table[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(table).encode()
    with open("base/model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return shapes


def test_a_merge_never_holds_a_whole_tensor(here):
    shapes = sparse_pair(1_600_000, adapt_embedding=True)  # two of 205 MB, one of them folded
    code = """
import sys
from san_llm.cli import app
try:
    app(sys.argv[1:])
finally:
    print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""
    asked = ["merge", "--adapter", "adapter", "--model", "base", "--output", "out"]
    done = subprocess.run(
        [sys.executable, "-c", code, *asked], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(read_header(Path("out/model.safetensors"))) == len(shapes)
    assert 1024 * int(done.stdout.split()[-1]) < 150e6


def test_a_merge_killed_half_way_leaves_no_model_and_the_next_one_starts_cleanly(here):
    # 400 MB: time enough to be seen and killed while they are written.
    shapes = sparse_pair(1_600_000)
    asked = [sys.executable, "-m", "san_llm", "merge", "--adapter", "adapter", "--model", "base"]
    asked += ["--output", "out"]
    running = subprocess.Popen(asked, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (written := list(here.glob(".out.*/*.safetensors"))) or not written[0].stat().st_size:
        assert running.poll() is None, "it ended before it was seen writing"
        assert time.monotonic() < deadline
    running.kill()
    running.wait()
    (left,) = here.glob(".out.*")
    assert not Path("out").exists()
    assert os.listdir(left) == ["model.safetensors"], "no config: nothing loads it"
    with pytest.raises(InputError, match=r"damaged|cut short|not a safetensors"):
        read_header(left / "model.safetensors")
    assert subprocess.run(asked, check=False, capture_output=True).returncode == 0
    assert sorted(os.listdir()) == ["adapter", "base", "out"]
    assert len(read_header(Path("out/model.safetensors"))) == len(shapes)


def test_files_are_never_overwritten_without_leave(command, pair):
    (pair / "out").mkdir()
    (pair / "out" / "model.safetensors").write_text("precious")
    asked = ("merge", "--adapter", "adapter", "--model", "base", "--output", "out")
    done = command(*asked)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: out: has files in it; add --overwrite to replace them\n"
    assert (pair / "out" / "model.safetensors").read_text() == "precious"
    with pytest.raises(InputError, match="has files in it"):
        merge(MergeRequest(find_subject("base", Path("adapter")), Path("out")))
    # A merge that fails leaves the old folder, leave or not.
    numbers_before = load_file("adapter/adapter_model.safetensors")
    change("adapter", lambda tensors: tensors[GAMMA].fill_(float("nan")))
    assert command(*asked, "--overwrite").returncode == 1
    assert (pair / "out" / "model.safetensors").read_text() == "precious"
    save_file(numbers_before, "adapter/adapter_model.safetensors", metadata={"format": "pt"})
    (pair / "out" / "old.txt").write_text("old")
    assert command(*asked, "--overwrite").returncode == 0
    assert not (pair / "out" / "old.txt").exists()
    assert load("out").config.model_type == "llama"
    assert sorted(os.listdir(pair)) == ["adapter", "base", "out"]


def test_the_base_and_the_adapter_are_left_as_they_are(command, pair):
    def contents():
        return {
            path: (path.read_bytes(), path.stat().st_mtime_ns)
            for folder in ("base", "adapter")
            for path in (pair / folder).rglob("*")
        }

    before = contents()
    asked = ("merge", "--adapter", "adapter", "--model", "base", "--output", "out")
    assert command(*asked).returncode == 0
    assert contents() == before


def test_merging_onto_the_base_or_the_adapter_itself_is_refused(command, pair):
    for target in ("base", "adapter"):
        done = command("merge", "--adapter", "adapter", "--model", "base", "--output", target)
        refused(done, 2, f"{target}: has files in it")


# --- quantized bases ---


def test_an_adapter_trained_over_4_bits_merges_into_the_full_base_and_says_so(command, here):
    base = save_tiny(here / "base", hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    data = write_rows(here / "rows.json", rows(8))
    changes = ["base.quantization=4bit", "data.date=2025-01-02"]
    recipe = load_recipe(write_recipe(here / "mine.yaml", base, data), changes)
    run = new_run(recipe, None, False)
    quantized = load(
        base,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        device_map="cpu",
    )
    adapt(quantized).save_pretrained(run / "adapter")
    point_latest(run)
    done = command("merge")
    assert done.returncode == 0, done.stderr
    note = (
        f"trained over a 4bit base, merged into the full-precision {base}: outputs differ from "
        "training's by the base's quantization error\n"
    )
    assert done.stderr.endswith(note)
    assert "trained over the base in 4bit" in (run / "merged" / "README.md").read_text()
    found = load_file(run / "merged" / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    for key, value in by_hand(base, run / "adapter", {}, config).items():
        assert torch.equal(found[key], torch.from_numpy(value)), key
    facts = json.loads((run / "merged" / "merge_manifest.json").read_text())
    assert (facts["prompt"], facts["date"]) == ("alpaca", "2025-01-02")
    value = json.loads(command("merge", "--json", "--overwrite").stdout)
    assert (value["trained_over"], value["base"]) == ("4bit", str(base))
    assert (value["dtype"], value["output"]) == ("float32", str(run / "merged"))


@pytest.mark.parametrize("method", ["adapter", "lora"])
def test_a_base_that_is_a_quantized_checkpoint_is_refused(command, here, method):
    save_tiny(here / "full", hidden_size=64, intermediate_size=128, num_hidden_layers=1)
    quantized = load(
        here / "full",
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        device_map="cpu",
    )
    quantized.save_pretrained(here / "base")
    if method == "lora":
        model = get_peft_model(load(here / "full"), PEFT_METHODS["lora"]())
        randomized(model).save_pretrained(here / "lora")
    else:
        adapt(load(here / "full")).save_pretrained(here / "adapter")
    for path in (here / "full").iterdir():
        path.unlink()
    (here / "full").rmdir()
    done = command("merge", "--adapter", method, "--model", "base", "--output", "out")
    refused(done, 2, "a quantized checkpoint has no full-precision weights; name the model")


# --- what else a checkpoint has ---


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_the_config_says_the_dtype_of_the_weights_and_the_manifest_what_made_them(
    pair, dtype, capsys
):
    merge(MergeRequest(find_subject("base", Path("adapter")), Path("out"), dtype))
    wanted = dtype or "float32"
    assert json.loads((pair / "out" / "config.json").read_text())["dtype"] == wanted
    stored = {str(t.dtype) for t in load_file("out/model.safetensors").values()}
    assert stored == {f"torch.{wanted}"}
    assert re.search(r"^Merging: (\S+ kB) of \1 after ", capsys.readouterr().err, re.MULTILINE)
    facts = json.loads((pair / "out" / "merge_manifest.json").read_text())
    assert {"made", "platform", "versions", "git"} <= facts.keys()
    assert facts["versions"] == versions()
    assert (facts["base"], facts["prompt"], facts["date"]) == ("base", None, None)


def test_scales_are_merged_without_what_other_methods_need(pair, monkeypatch):
    for name in ("peft", "in_memory", "verify"):  # which import torch
        monkeypatch.setitem(sys.modules, f"san_llm.merge.{name}", None)
    merge(MergeRequest(find_subject("base", Path("adapter")), Path("out")))
    lora_of(pair)
    with pytest.raises(ImportError):
        merge(MergeRequest(find_subject("base", Path("lora")), Path("other")))


def test_many_files_of_weights_load_as_one_model(pair):
    merge(MergeRequest(find_subject("base", Path("adapter")), Path("one")))
    merge(MergeRequest(find_subject("base", Path("adapter")), Path("many"), shard_size=20_000))
    assert len(list(Path("many").glob("*.safetensors"))) > 3
    with torch.no_grad():
        assert torch.equal(load("one")(text()).logits, load("many")(text()).logits)


def test_the_manifest_and_the_card_say_what_was_merged(command, pair):
    from hashlib import sha256

    (pair / "base" / "LICENSE").write_text("take it")
    asked = ("merge", "--adapter", "adapter", "--model", "base", "--output", "out", "--json")
    assert json.loads(command(*asked).stdout)["verified"] is None
    facts = json.loads((pair / "out" / "merge_manifest.json").read_text())
    files = {
        "base config": pair / "base" / "config.json",
        "adapter": pair / "adapter" / "adapter_model.safetensors",
        "model.safetensors": pair / "out" / "model.safetensors",
    }
    assert facts["sha256"] == {
        name: sha256(path.read_bytes()).hexdigest() for name, path in files.items()
    }
    assert facts["sha256"]["adapter"] in (pair / "out" / "README.md").read_text()
    assert (pair / "out" / "LICENSE").read_text() == "take it"


def test_the_tokenizer_and_its_template_work_from_the_merged_folder(merged):
    tokenizer = AutoTokenizer.from_pretrained(merged["both"][2])
    turns = [{"role": "user", "content": "Hi"}]
    shown = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert shown == "<|user|>Hi</s>\n<|assistant|>"
    assert tokenizer.decode(tokenizer("a b?")["input_ids"]) == "a b?"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"dtype": "float33"}, "--dtype: 'float33' is not one of"),
        ({"quantized": "kept"}, r"--quantized: 'kept' is not one of .* \(did you mean 'keep'"),
        ({"gguf": "q4"}, "--gguf: 'q4' is not one of"),
        ({"private": True}, "--private: says how to --push"),
    ],
)
def test_a_wrong_word_is_told_before_any_run_is_looked_for(here, how, said):
    with pytest.raises(InputError, match=f"^{said}"):
        merge_request(None, None, None, **how)
    with pytest.raises(InputError, match="no run yet"):
        merge_request(None, None, None)


def test_nothing_to_merge_is_an_error():
    with pytest.raises(InputError, match="there is no adapter to merge"):
        merge(MergeRequest(find_subject("base"), Path("out")))
    assert issubclass(InputError, SanError)
