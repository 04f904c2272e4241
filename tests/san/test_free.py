"""Column scales of the targets' own (``links: free``): against the dense formula, and in PEFT."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from reference import (
    SEVEN,
    dense_logits,
    dense_model,
    low_rank_logits,
    module_name,
    trained_tensors,
)
from safetensors.torch import load_file
from san.adapted import (
    adapt,
    assert_same_gradients,
    centered,
    columns,
    family_model,
    logits,
    relative,
    shake,
    text,
    vectors,
)
from tiny import tiny_model
from torch.func import functional_call

from san_llm import SanConfig

FREE: dict[str, Any] = {"links": "free"}
LOW_RANK = {"r": 4, "lora_alpha": 6}
BIASES = {"attention_bias": True, "mlp_bias": True}
both_forms = pytest.mark.parametrize("form", ["lean", "plain"])


def two_adapters(**other: Any) -> Any:
    """Return a model with a free adapter and one whose scales are carried on."""
    model = adapt(tiny_model(), adapter="one", **FREE)
    model.add_adapter("two", SanConfig(**other))
    return shake(model, 2, "two")


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("options", [{}, {"shift": True}, {"carrier": "lora"}], ids=str)
@pytest.mark.filterwarnings("ignore:shift=True:UserWarning")
def test_it_starts_as_the_base_bit_for_bit_with_a_column_scale_a_channel(
    family, dtype, form, options
):
    plain = family_model(family, dtype)
    expected = logits(plain)
    shapes = {n: m.in_features for n, m in plain.named_modules() if "_proj" in n}
    model = get_peft_model(plain, SanConfig(form=form, adapt_embedding=True, **FREE, **options))
    assert torch.equal(logits(model), expected)
    sigmas = columns(model)
    assert {name: len(sigma) for name, sigma in sigmas.items()} == shapes
    assert all(sigma.dtype == torch.float32 and (sigma == 1).all() for sigma in sigmas.values())


@both_forms
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(
    ("family", "changes"), [("llama", BIASES), ("gemma2", {}), ("qwen2", {})], ids=str
)
@pytest.mark.filterwarnings("ignore:shift=True:UserWarning")
def test_logits_and_gradients_are_those_of_the_dense_formula(family, changes, shift, form):
    plain = family_model(family, torch.float64, num_hidden_layers=2, **changes)
    options: dict[str, Any] = {"adapt_embedding": True, **FREE}
    model = adapt(deepcopy(plain), shift=shift, form=form, **options)
    gammas, betas = vectors(model)
    sigmas = columns(model)
    found = model(text()).logits
    expected = dense_logits(plain, text(), gammas, betas, sigmas=sigmas, **options)
    assert relative(found, expected) < 1e-12
    trained = [*gammas.values(), *betas.values(), *sigmas.values()]
    weights = torch.randn(found.shape, dtype=found.dtype)
    mine = torch.autograd.grad((found * weights).sum(), trained)
    theirs = torch.autograd.grad((expected * weights).sum(), trained)
    largest = max(gradient.abs().max() for gradient in theirs)
    assert all((a - b).abs().max() < 1e-11 * largest for a, b in zip(mine, theirs, strict=True))


@both_forms
@pytest.mark.parametrize("carrier", ["lora", "dora"])
@pytest.mark.parametrize(("family", "changes"), [("llama", BIASES), ("phi3", {})], ids=str)
def test_the_low_rank_carriers_have_them_too(family, changes, carrier, form):
    plain = family_model(family, torch.float64, num_hidden_layers=2, **changes)
    options = {"carrier": carrier, **FREE}
    model = adapt(deepcopy(plain), form=form, adapt_embedding=True, **options, **LOW_RANK)
    trained = trained_tensors(centered(model))
    assert sum(name.endswith(" sigma") for name in trained) == 2 * (4 if family == "phi3" else 7)
    found = model(text()).logits
    expected = low_rank_logits(plain, text(), trained, c=3 / 2, **options)
    assert relative(found, expected) < 1e-10
    assert_same_gradients(found, expected, trained)
    with torch.no_grad():
        assert relative(model.merge_and_unload()(text()).logits, expected) < 1e-10


@both_forms
def test_gradients_of_the_column_scales_agree_with_finite_differences(form):
    sizes = {"hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2}
    model = adapt(family_model(dtype=torch.float64, **sizes), form=form, **FREE)
    trained = {n: p for n, p in model.named_parameters() if ".san_sigma." in n}
    assert len(trained) == 14
    tokens = text(1, 3)
    weights = torch.randn(1, 3, model.config.vocab_size, dtype=torch.float64)

    def loss(*values: torch.Tensor) -> torch.Tensor:
        replaced = dict(zip(trained, values, strict=True))
        return (functional_call(model, replaced, (), {"input_ids": tokens}).logits * weights).sum()

    assert torch.autograd.gradcheck(loss, tuple(trained.values()), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_scales_that_act_as_one_product_learn_alike_and_all_others_apart(kv_heads):
    model = get_peft_model(tiny_model(num_key_value_heads=kv_heads), SanConfig(**FREE))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(text(), labels=text()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    gammas, sigmas = vectors(model)[0], columns(model)

    def apart(writer: str, reader: str, blocks: int = 0) -> float:
        gamma, sigma = gammas[module_name(1, writer)], sigmas[module_name(1 + blocks, reader)]
        return (gamma.repeat(len(sigma) // len(gamma)) - sigma).abs().max().item()

    # silu(g) * (gamma z) * sigma, and so through attention where every head has its own channels
    assert apart("up_proj", "down_proj") < 1e-6
    assert (apart("v_proj", "o_proj") < 1e-6) == (kv_heads == 4)
    assert min(apart("o_proj", name) for name in ("gate_proj", "up_proj")) > 1e-3
    assert min(apart("down_proj", name, 1) for name in ("q_proj", "k_proj", "v_proj")) > 1e-3
    assert not torch.equal(sigmas[module_name(2, "q_proj")], sigmas[module_name(2, "k_proj")])


@pytest.mark.parametrize(
    ("dtype", "low_cpu_mem_usage"), [(torch.bfloat16, False), (torch.float32, True)]
)
def test_it_comes_back_from_its_file_bit_for_bit(tmp_path, dtype, low_cpu_mem_usage):
    model = adapt(tiny_model(dtype=dtype), modules_to_save=["lm_head"], **FREE)
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(2)
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(name.endswith(".san_sigma") for name in held) == 28
    assert all(t.dtype == torch.float32 for name, t in held.items() if ".san_" in name)
    again = PeftModel.from_pretrained(
        tiny_model(dtype=dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert again.peft_config["default"].links == "free"
    assert torch.equal(logits(again), logits(model))


def test_beside_an_adapter_with_links_each_acts_as_if_it_were_alone():
    model = two_adapters()
    base, alone = logits(tiny_model()), logits(adapt(tiny_model(), **FREE))
    assert torch.equal(logits(model), alone)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.set_adapter("two")
    assert torch.equal(logits(model), logits(adapt(tiny_model(), 2)))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 28
    assert not any("san_sigma" in name for name in trained)
    model.delete_adapter("two")
    assert torch.equal(logits(model), alone)
    model.add_adapter("two", SanConfig())
    model.delete_adapter("one")
    assert not any("san_sigma" in name for name in model.state_dict())
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("order", [["one", "two"], ["two", "one"]])
def test_two_active_adapters_multiply(order):
    plain = family_model(dtype=torch.float64, num_hidden_layers=2)
    model = get_peft_model(deepcopy(plain), SanConfig(shift=True, **FREE), "one")
    model.add_adapter("two", SanConfig(target_modules=["up_proj", "down_proj", "q_proj"]))
    shake(model, 1, "one")
    shake(model, 2, "two")
    model.base_model.set_adapter(order)
    together = plain
    for name in order:
        how: dict[str, Any] = {"links": "free", "sigmas": columns(model, name)}
        how = how if name == "one" else {"targets": ("up_proj", "down_proj", "q_proj")}
        together = dense_model(together, *vectors(model, name), **how)
    expected = logits(together)
    assert relative(logits(model), expected) < 1e-12
    assert relative(logits(model.merge_and_unload()), expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_restores_every_bit(dtype):
    model = adapt(tiny_model(dtype=dtype), shift=True, adapt_embedding=True, **FREE)
    before, state = logits(model), deepcopy(model.state_dict())
    model.merge_adapter()
    assert relative(logits(model), before) < (1e-5 if dtype == torch.float32 else 0.1)
    model.unmerge_adapter()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("targets", [["down_proj"], ["o_proj"], list(SEVEN[:3])], ids=str)
def test_any_targets_have_both_scales(targets):
    plain = family_model(dtype=torch.float64, num_hidden_layers=2)
    found = []
    for form in ("lean", "plain"):
        model = adapt(deepcopy(plain), form=form, target_modules=targets, **FREE)
        assert len(columns(model)) == 2 * len(targets)
        found.append(logits(model))
    gammas, betas = vectors(model)
    how: dict[str, Any] = {"targets": tuple(targets), "sigmas": columns(model), **FREE}
    expected = logits(dense_model(plain, gammas, betas, **how))
    assert all(relative(one, expected) < 1e-12 for one in found)
