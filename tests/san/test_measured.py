"""SAN on models that no table knows, against dense references wired by hand from their source."""

import re
from copy import deepcopy
from functools import partial

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from san.adapted import dense_linear, held_against_dense, moved
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM

from san_llm import SanConfig
from san_llm.errors import InputError

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
HEAD = 8


def as_is(gamma):
    return gamma


def shared_heads(gamma):  # each value head stands for two query heads
    return torch.cat([part for part in gamma.split(HEAD) for _ in range(2)])


def behind_all(gamma):  # one value head, the last rows of q, k and v
    return gamma[-HEAD:].repeat(4)


def third_of_heads(gamma):  # q, k and v of a head stand together
    return torch.cat([part[-HEAD:] for part in gamma.split(3 * HEAD)])


def last_half(gamma):
    return gamma[len(gamma) // 2 :]


LLAMA = {
    "self_attn.q_proj": ("mlp.down_proj", 1, as_is),
    "self_attn.k_proj": ("mlp.down_proj", 1, as_is),
    "self_attn.v_proj": ("mlp.down_proj", 1, as_is),
    "self_attn.o_proj": ("self_attn.v_proj", 0, shared_heads),
    "mlp.gate_proj": ("self_attn.o_proj", 0, as_is),
    "mlp.up_proj": ("self_attn.o_proj", 0, as_is),
    "mlp.down_proj": ("mlp.up_proj", 0, as_is),
}
# Experts write the stream, each with channels of its own: nobody feeds the next block.
MIXTURE = {
    "self_attn.q_proj": None,
    "self_attn.k_proj": None,
    "self_attn.v_proj": None,
    "self_attn.o_proj": ("self_attn.v_proj", 0, shared_heads),
    "mlp.experts": ("self_attn.o_proj", 0, as_is),
}
# For each family: where its blocks are, and what feeds what, by hand: the anterior, how many blocks
# before, how its channels lie; None where nothing does.
WIRED = {
    "olmo2": ("model.layers", LLAMA),
    "olmo3": ("model.layers", LLAMA),
    "granite": ("model.layers", LLAMA),
    "stablelm": ("model.layers", LLAMA),
    "smollm3": ("model.layers", LLAMA),
    "ministral": ("model.layers", LLAMA),
    "glm4": (
        "model.layers",
        {
            **{name: row for name, row in LLAMA.items() if "self_attn" in name},
            "mlp.gate_up_proj": ("self_attn.o_proj", 0, as_is),
            "mlp.down_proj": ("mlp.gate_up_proj", 0, last_half),
        },
    ),
    "starcoder2": (
        "model.layers",
        {
            "self_attn.q_proj": ("mlp.c_proj", 1, as_is),
            "self_attn.k_proj": ("mlp.c_proj", 1, as_is),
            "self_attn.v_proj": ("mlp.c_proj", 1, as_is),
            "self_attn.o_proj": ("self_attn.v_proj", 0, shared_heads),
            "mlp.c_fc": ("self_attn.o_proj", 0, as_is),
            "mlp.c_proj": ("mlp.c_fc", 0, as_is),
        },
    ),
    # Attention and MLP side by side, both read what the MLP before wrote last.
    "gpt_neox": (
        "gpt_neox.layers",
        {
            "attention.query_key_value": ("mlp.dense_4h_to_h", 1, as_is),
            "attention.dense": ("attention.query_key_value", 0, third_of_heads),
            "mlp.dense_h_to_4h": ("mlp.dense_4h_to_h", 1, as_is),
            "mlp.dense_4h_to_h": ("mlp.dense_h_to_4h", 0, as_is),
        },
    ),
    "phi": (
        "model.layers",
        {
            "self_attn.q_proj": ("mlp.fc2", 1, as_is),
            "self_attn.k_proj": ("mlp.fc2", 1, as_is),
            "self_attn.v_proj": ("mlp.fc2", 1, as_is),
            "self_attn.dense": ("self_attn.v_proj", 0, shared_heads),
            "mlp.fc1": ("mlp.fc2", 1, as_is),
            "mlp.fc2": ("mlp.fc1", 0, as_is),
        },
    ),
    "opt": (
        "model.decoder.layers",
        {
            "self_attn.q_proj": ("fc2", 1, as_is),
            "self_attn.k_proj": ("fc2", 1, as_is),
            "self_attn.v_proj": ("fc2", 1, as_is),
            "self_attn.out_proj": ("self_attn.v_proj", 0, as_is),
            "fc1": ("self_attn.out_proj", 0, as_is),
            "fc2": ("fc1", 0, as_is),
        },
    ),
    "bert": (
        "bert.encoder.layer",
        {
            "attention.self.query": ("output.dense", 1, as_is),
            "attention.self.key": ("output.dense", 1, as_is),
            "attention.self.value": ("output.dense", 1, as_is),
            "attention.output.dense": ("attention.self.value", 0, as_is),
            "intermediate.dense": ("attention.output.dense", 0, as_is),
            "output.dense": ("intermediate.dense", 0, as_is),
        },
    ),
    "mixtral": ("model.layers", MIXTURE),
    "qwen3_moe": ("model.layers", MIXTURE),
    "olmoe": ("model.layers", MIXTURE),
    "phimoe": ("model.layers", MIXTURE),  # whose router is a Linear that writes a choice
    "qwen2_moe": (
        "model.layers",
        {
            **MIXTURE,
            "mlp.shared_expert.gate_proj": ("self_attn.o_proj", 0, as_is),
            "mlp.shared_expert.up_proj": ("self_attn.o_proj", 0, as_is),
            "mlp.shared_expert.down_proj": ("mlp.shared_expert.up_proj", 0, as_is),
        },
    ),
    "falcon": (
        "transformer.h",
        {
            "self_attention.query_key_value": ("mlp.dense_4h_to_h", 1, as_is),
            "self_attention.dense": ("self_attention.query_key_value", 0, behind_all),
            "mlp.dense_h_to_4h": ("mlp.dense_4h_to_h", 1, as_is),
            "mlp.dense_4h_to_h": ("mlp.dense_h_to_4h", 0, as_is),
        },
    ),
}
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}  # in float64
IDS = torch.randint(3, 97, (2, 7), generator=torch.Generator().manual_seed(5))


def small(family):
    """Return a random model in float64, with norms and biases that are none of 0 and 1."""
    torch.manual_seed(3)
    values = dict(SIZES)
    if family in ("falcon", "gpt_neox"):
        values.pop("num_key_value_heads")
    if family == "falcon":
        values |= {"bos_token_id": 1, "eos_token_id": 1}
    if family == "opt":
        values |= {"word_embed_proj_dim": 32, "ffn_dim": 40}
    if family in ("glm4", "ministral", "qwen3_moe", "gpt_oss"):
        values |= {"head_dim": HEAD}
    if family == "gpt_oss" or "mlp.experts" in WIRED[family][1]:
        values |= {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
        values |= {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}
        values |= {"eos_token_id": 1, "bos_token_id": 1}
    if family == "phimoe":
        values |= {"intermediate_size": 64}
    config = AutoConfig.for_model(family, **values)
    model = AutoModelForCausalLM.from_config(config, **EAGER).double().eval()
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.data = 1 + 0.3 * torch.randn_like(parameter)
        else:
            parameter.data = 0.2 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def dense(model, gammas, family):
    """Return logits of diag(gamma) W diag(s) and gamma b, as the table by hand has s."""
    where, table = WIRED[family]
    weights = {}
    for name, gamma in gammas.items():
        block, relative = re.fullmatch(rf"{re.escape(where)}\.(\d+)\.(.+)", name).groups()
        s = torch.ones(())
        if table[relative]:
            anterior, back, lay = table[relative]
            if int(block) >= back:
                s = lay(gammas[f"{where}.{int(block) - back}.{anterior}"])
        if gamma.dim() == 2:  # an expert a row: gate, up and down
            module = model.get_submodule(name)
            inside = module.down_proj.shape[2]
            gate, up, down = gamma.split([inside, inside, gamma.shape[1] - 2 * inside], dim=1)
            wide = torch.cat([gate, up], dim=1)
            weights[f"{name}.gate_up_proj"] = wide[:, :, None] * module.gate_up_proj * s
            weights[f"{name}.down_proj"] = down[:, :, None] * module.down_proj * up[:, None]
        else:
            weights |= dense_linear(model, name, gamma, s)
    return functional_call(model, weights, kwargs={"input_ids": IDS}).logits


@pytest.mark.holds("dense", "files")
@pytest.mark.parametrize("family", WIRED)
def test_it_is_the_dense_model_in_logits_and_every_gradient(family, tmp_path):
    merged, theirs, gammas = held_against_dense(
        small(family),
        {"input_ids": IDS},
        SanConfig(),
        partial(dense, family=family),
        tmp_path,
        gradients={"rtol": 1e-5, "atol": 1e-7},
        merges=1e-7,
        moves=0.1,
    )
    assert len(gammas) == 3 * len(WIRED[family][1])
    merged.save_pretrained(tmp_path / "merged")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", **EAGER)
    torch.testing.assert_close(stock(input_ids=IDS).logits, theirs, rtol=1e-5, atol=1e-5)


def test_a_file_of_experts_is_merged_expert_by_expert(tmp_path):
    """Files have a tensor for each expert's gate, up and down, which a merge must scale alone."""
    small("mixtral").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **EAGER)
    adapted = get_peft_model(base, SanConfig())
    gammas = moved(adapted)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    before = load_file(tmp_path / "base" / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert before.keys() == after.keys()
    s = gammas["model.layers.1.self_attn.o_proj"]
    for number, gamma in enumerate(gammas["model.layers.1.mlp.experts"]):
        gate, up, down = gamma.split([SIZES["intermediate_size"]] * 2 + [SIZES["hidden_size"]])
        for name, rows, columns in (("w1", gate, s), ("w3", up, s), ("w2", down, up)):
            tensor = f"model.layers.1.block_sparse_moe.experts.{number}.{name}.weight"
            wanted = rows[:, None] * before[tensor] * columns
            torch.testing.assert_close(after[tensor], wanted.to(before[tensor].dtype))
    router = "model.layers.1.block_sparse_moe.gate.weight"
    assert torch.equal(after[router], before[router])


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "neuron"},
        {"mode": "synapse"},
        {"links": ["attention", "residual"]},
        {"links": "free"},
    ],
    ids=str,
)
def test_experts_merge_to_what_they_compute_in_every_mode(options):
    adapted = get_peft_model(small("mixtral"), SanConfig(**options))
    gammas = moved(adapted)
    own = {name for name in gammas if name.endswith("experts")}
    assert bool(own) is (options.get("mode") != "synapse")
    logits = adapted(input_ids=IDS).logits
    adapted.merge_adapter()
    torch.testing.assert_close(adapted(input_ids=IDS).logits, logits, rtol=1e-7, atol=1e-7)
    adapted.unmerge_adapter()
    torch.testing.assert_close(adapted(input_ids=IDS).logits, logits, rtol=1e-12, atol=1e-12)


def test_experts_of_another_form_are_left_alone_and_said_to_be():
    graph = get_peft_model(small("gpt_oss"), SanConfig()).peft_config["default"].graph
    (experts,) = (m for m in graph["modules"] if m["name"] == "model.layers.0.mlp.experts")
    assert not experts["usable"]
    assert "compute otherwise than down(act(gate) * up)" in experts["note"]


def test_an_adapter_means_what_it_meant_whatever_is_measured_later(tmp_path, monkeypatch):
    base = small("starcoder2")
    adapted = get_peft_model(deepcopy(base), SanConfig())
    moved(adapted)
    logits = adapted(input_ids=IDS).logits
    adapted.save_pretrained(tmp_path)
    monkeypatch.setattr("san_llm.measure.run.measure", None)  # not asked again
    loaded = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(loaded(input_ids=IDS).logits, logits)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    get_peft_model(small("gpt_neox"), SanConfig()).save_pretrained(tmp_path)
    other = "the adapter was made for another model: "
    with pytest.raises(InputError, match=f"{other}its graph has a gpt_neox.layers.0"):
        PeftModel.from_pretrained(small("olmo2"), tmp_path)
    config = AutoConfig.for_model("gpt_neox", **(SIZES | {"hidden_size": 48}))
    with pytest.raises(InputError, match=f"{other}.*has 96 channels in its graph, 144 here"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_config(config), tmp_path)


def test_measuring_leaves_the_random_numbers_alone():
    base = small("granite")
    torch.manual_seed(11)
    first = torch.rand(3)
    torch.manual_seed(11)
    get_peft_model(base, SanConfig())
    assert torch.equal(torch.rand(3), first)


def test_two_adapters_and_modes_beside_each_other():
    base = small("gpt_neox")
    adapted = get_peft_model(deepcopy(base), SanConfig())
    moved(adapted)
    first = adapted(input_ids=IDS).logits
    adapted.add_adapter("neuron", SanConfig(mode="neuron"))
    adapted.set_adapter("neuron")
    assert torch.equal(adapted(input_ids=IDS).logits, base(input_ids=IDS).logits)
    adapted.set_adapter("default")
    torch.testing.assert_close(adapted(input_ids=IDS).logits, first)


@pytest.mark.parametrize("carrier", ["lora", "dora"])
def test_low_rank_carriers_merge_to_what_they_compute(carrier):
    adapted = get_peft_model(small("olmo2"), SanConfig(carrier=carrier, r=2))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "san_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    logits = adapted(input_ids=IDS).logits
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=IDS).logits, logits, rtol=1e-7, atol=1e-7)


def test_targets_are_named_by_the_model():
    adapted = get_peft_model(small("gpt_neox"), SanConfig(target_modules=r".*\.mlp\..*"))
    names = {n.split(".san_gamma")[0].rsplit(".", 1)[-1] for n, _ in adapted.named_parameters()
             if "san_gamma" in n}  # fmt: skip
    assert names == {"dense_h_to_4h", "dense_4h_to_h"}
    with pytest.raises(InputError, match=r"'.*qkv' matches no module of this model: it has query"):
        get_peft_model(small("gpt_neox"), SanConfig(target_modules=".*qkv"))
    with pytest.raises(InputError, match="cannot be adapted: outside of the blocks"):
        get_peft_model(small("starcoder2"), SanConfig(target_modules=".*lm_head"))


def test_what_is_saved_names_what_was_adapted_and_nothing_else(tmp_path):
    one = get_peft_model(small("olmo2"), SanConfig(target_modules=r".*layers\.1\.mlp\..*"))
    moved(one)
    logits = one(input_ids=IDS).logits
    one.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(small("olmo2"), tmp_path)
    names = {name.split(".san_gamma")[0] for name, _ in loaded.named_parameters() if "san_" in name}
    assert {name.split(".layers.")[1] for name in names} == {
        "1.mlp.gate_proj", "1.mlp.up_proj", "1.mlp.down_proj"
    }  # fmt: skip
    torch.testing.assert_close(loaded(input_ids=IDS).logits, logits)
    everything = get_peft_model(small("olmo2"), SanConfig())
    assert everything.peft_config["default"].target_modules.count("|") == 6  # of whatever block
