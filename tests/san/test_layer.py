"""One adapted module: its formula, its start, its gradients, and the weight it merges into."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from reference import module_name
from san.adapted import adapt, family_model, logits, shake, text, vectors
from tiny import tiny_model
from torch import nn
from torch.func import functional_call

from san_llm import SanConfig
from san_llm.san.formulas import merged_bias, merged_weight
from san_llm.san.layer import SanEmbedding, SanLinear, scaled

EVERYTHING: dict[str, Any] = {"shift": True, "adapt_embedding": True}


@pytest.mark.parametrize("form", ["lean", "plain"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [{}, EVERYTHING, {"mode": "neuron"}, {"mode": "synapse"}], ids=str
)
@pytest.mark.filterwarnings("ignore:shift=True:UserWarning")
def test_an_adapter_starts_as_the_base_bit_for_bit(family, dtype, options, form):
    expected = logits(family_model(family, dtype))
    model = get_peft_model(family_model(family, dtype), SanConfig(form=form, **options))
    assert torch.equal(logits(model), expected)
    assert torch.equal(model.train()(input_ids=text()).logits, expected)


def test_scales_start_at_one_and_shifts_at_zero_in_fp32_over_a_bf16_base():
    model = get_peft_model(tiny_model(dtype=torch.bfloat16), SanConfig(**EVERYTHING))
    gammas, betas = vectors(model)
    assert len(gammas) == 4 * 7 + 1
    assert len(betas) == 4 * 7  # the embedding has no shift
    for gamma in gammas.values():
        assert torch.equal(gamma, torch.ones(len(gamma)))
        assert gamma.dtype == torch.float32
    for beta in betas.values():
        assert torch.equal(beta, torch.zeros(len(beta)))
        assert beta.dtype == torch.float32


@pytest.mark.parametrize("carrier", ["scale", "lora", "dora"])
def test_a_merge_is_worked_out_where_the_weight_is(carrier, monkeypatch):
    model = adapt(tiny_model(num_hidden_layers=1), carrier=carrier, r=4)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    elsewhere = torch.empty_like(layer.get_base_layer().weight, device="meta")
    monkeypatch.setattr(layer, "_wide_weight", lambda: elsewhere)
    weight, _ = layer.merged_tensors(["default"])
    assert weight.device == torch.device("meta")


def test_a_small_step_of_a_scale_is_not_lost_over_a_bf16_base():
    features = torch.full((1, 64), 1.0, dtype=torch.bfloat16).mul_(torch.arange(64) / 64 + 1)
    scale = torch.full((64,), 1 + 3 * 2**-9)  # no number of bf16, whose steps are 2**-7 there
    exact = (features.double() * scale.double()).to(torch.bfloat16)
    assert torch.equal(scaled(features, scale), exact)
    assert not torch.equal(exact, features * scale.bfloat16())


def test_features_follow_the_formula():
    model = adapt(tiny_model(attention_bias=True), form="plain", **EVERYTHING)
    gammas, betas = vectors(model)
    layer = model.base_model.model.model.layers[1].self_attn.o_proj
    base = layer.get_base_layer()
    x = torch.randn(2, 5, 32)
    s = gammas[module_name(1, "v_proj")].view(2, 8).repeat_interleave(2, dim=0).flatten()
    gamma, beta = gammas[module_name(1, "o_proj")], betas[module_name(1, "o_proj")]
    expected = gamma * ((s * x) @ base.weight.T + base.bias) + beta
    torch.testing.assert_close(layer(x), expected)


def test_the_embedding_scales_its_features():
    model = adapt(tiny_model(), adapt_embedding=True)
    layer = model.base_model.model.model.embed_tokens
    assert isinstance(layer, SanEmbedding)
    expected = layer.get_base_layer().weight[text()] * layer.san_gamma["default"]
    assert torch.equal(layer(text()), expected)


@pytest.mark.parametrize("form", ["lean", "plain"])
@pytest.mark.parametrize("mode", ["both", "neuron", "synapse"])
@pytest.mark.parametrize("shift", [False, True])
def test_gradients_agree_with_finite_differences(mode, shift, form):
    plain = family_model(
        dtype=torch.float64, hidden_size=8, intermediate_size=6, num_hidden_layers=2
    )
    model = adapt(plain, mode=mode, shift=shift, adapt_embedding=True, form=form)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert any(".san_beta" in name for name in trained) == shift
    tokens = text(1, 3)
    weights = torch.randn(1, 3, plain.config.vocab_size, dtype=torch.float64)

    def loss(*values: torch.Tensor) -> torch.Tensor:
        replaced = dict(zip(trained, values, strict=True))
        return (functional_call(model, replaced, (), {"input_ids": tokens}).logits * weights).sum()

    assert torch.autograd.gradcheck(loss, tuple(trained.values()), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["lean", "plain"])
def test_a_scale_of_zero_still_gets_its_gradient(form):
    gradients = []
    for value in (0.0, 1e-9):
        model = adapt(family_model(dtype=torch.float64), form=form)
        gammas, _ = vectors(model)
        for gamma in gammas.values():
            gamma.data[::5] = value
        model(input_ids=text()).logits.pow(2).sum().backward()
        gradients.append(torch.cat([gamma.grad for gamma in gammas.values()]))
    assert torch.isfinite(gradients[0]).all()
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-6)


def test_the_base_gets_no_gradient():
    model = adapt(tiny_model(), **EVERYTHING)
    model(input_ids=text()).logits.sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".san_" in name), name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    found = []
    for checkpointing in (False, True):
        model = adapt(tiny_model(), **EVERYTHING).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(input_ids=text(), use_cache=False).logits.pow(2).sum().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_autocast_keeps_the_scales_in_fp32():
    model = adapt(tiny_model()).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=text()).logits.float().pow(2).mean()
    loss.backward()
    for gamma in vectors(model)[0].values():
        assert gamma.grad is not None
        assert gamma.grad.dtype == torch.float32
        assert torch.isfinite(gamma.grad).all()


def test_a_layer_owns_its_scale_alone():
    model = get_peft_model(tiny_model(), SanConfig())
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(names))
    assert sum(".san_gamma." in name for name in names) == 28
    linear = model.base_model.model.model.layers[0].mlp.down_proj
    assert isinstance(linear, SanLinear)
    assert [name for name, _ in linear.named_parameters()] == [
        "base_layer.weight",
        "san_gamma.default",
    ]


def test_it_shows_what_wraps_a_layer():
    model = get_peft_model(tiny_model(), SanConfig())
    assert repr(model.base_model.model.model.layers[0].mlp.down_proj).startswith("san.SanLinear(")


def test_only_linears_are_wrapped():
    plain = tiny_model()
    plain.model.layers[1].mlp.up_proj = nn.Identity()
    with pytest.raises(ValueError, match="Identity"):
        get_peft_model(plain, SanConfig())


def test_an_optimizer_built_before_a_dtype_change_still_moves_what_the_readers_read():
    model = get_peft_model(tiny_model(dtype=torch.bfloat16), SanConfig())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before = logits(model)
    model(input_ids=text()).logits.float().pow(2).sum().backward()
    optimizer.step()
    after = logits(model)
    assert not torch.equal(before, after)
    copy = shake(get_peft_model(tiny_model(dtype=torch.bfloat16), SanConfig()))
    for (name, mine), (_, theirs) in zip(
        copy.named_parameters(), model.named_parameters(), strict=True
    ):
        if ".san_" in name:
            mine.data.copy_(theirs)
    assert torch.equal(logits(copy), after)


# --- the carrier's formula ---------------------------------------------------------------------

NUMBERS = st.floats(-4, 4, width=32)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rows=st.integers(1, 5), columns=st.integers(1, 5))
def test_the_merged_weight_and_bias_are_the_formula_entry_by_entry(data, rows, columns):
    def draw(count: int) -> np.ndarray:
        values = data.draw(st.lists(NUMBERS, min_size=count, max_size=count))
        return np.array(values, dtype=np.float64)

    weight = draw(rows * columns).reshape(rows, columns)
    gamma = draw(rows) if data.draw(st.booleans()) else None
    s = draw(columns) if data.draw(st.booleans()) else None
    bias = draw(rows) if data.draw(st.booleans()) else None
    beta = draw(rows) if data.draw(st.booleans()) else None
    # numpy's arrays and torch's tensors go through the same code
    for make in (np.asarray, torch.from_numpy):

        def given_as(array: Any, make: Any = make) -> Any:
            return None if array is None else make(array.copy())

        merged = merged_weight(given_as(weight), given_as(gamma), None, given_as(s))
        for i in range(rows):
            for j in range(columns):
                expected = weight[i, j]
                expected = expected if gamma is None else gamma[i] * expected
                expected = expected if s is None else expected * s[j]
                assert float(merged[i, j]) == expected
        shifted = merged_bias(given_as(bias), given_as(gamma), given_as(beta))
        if bias is None and beta is None:
            assert shifted is None
            continue
        for i in range(rows):
            own = 0.0 if bias is None else bias[i] * (1.0 if gamma is None else gamma[i])
            assert float(shifted[i]) == own + (0.0 if beta is None else beta[i])
