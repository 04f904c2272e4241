"""The carriers: PEFT's own methods where nothing is propagated, and the dense formula."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, get_peft_model
from reference import SEVEN, low_rank_logits, module_name, trained_tensors
from san.adapted import (
    adapt,
    assert_same_gradients,
    centered,
    family_model,
    relative,
    shake,
    text,
    vectors,
)
from torch.func import functional_call

from san_llm import SanConfig
from san_llm.architectures.decoders import TARGETS
from san_llm.san.formulas import merged_bias, merged_weight, squared_row_norms

LOW_RANK = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.0}


def ten_steps(model: Any) -> list[float]:
    """Train for ten steps on the same tokens and return the losses."""
    torch.manual_seed(5)
    tokens = text(batch=3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("links_off", [{"mode": "neuron"}, {"links": ()}])
@pytest.mark.parametrize("carrier", ["lora", "dora"])
def test_without_links_a_carrier_trains_as_pefts_own_method_step_for_step(
    carrier, links_off, family
):
    targets = list(TARGETS)
    own = LoraConfig(target_modules=targets, use_dora=carrier == "dora", **LOW_RANK)
    theirs = get_peft_model(family_model(family), own)
    ours = get_peft_model(family_model(family), SanConfig(carrier=carrier, **links_off, **LOW_RANK))
    names = {"lora_A": "san_lora_A", "lora_B": "san_lora_B"}
    parameters = dict(ours.named_parameters())
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            for their, our in names.items():
                if f".{their}." in name:
                    parameters[name.replace(their, our).replace(".weight", "")].copy_(value)
    expected, found = ten_steps(theirs), ten_steps(ours)
    assert expected[-1] < expected[0] - 0.1
    assert found == pytest.approx(expected, rel=1e-6)
    moved = [
        relative(parameters[name.replace("lora_A", "san_lora_A").replace(".weight", "")], value)
        for name, value in theirs.named_parameters()
        if ".lora_A." in name
    ]
    assert max(moved) < 1e-4


@pytest.mark.parametrize("form", ["lean", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_in_neuron_mode_the_scales_train_as_ia3_does_on_every_output_step_for_step(
    family, dtype, form
):
    ia3 = IA3Config(target_modules=list(SEVEN), feedforward_modules=[])
    theirs = get_peft_model(family_model(family, dtype), ia3, autocast_adapter_dtype=False)
    ours = get_peft_model(family_model(family, dtype), SanConfig(mode="neuron", form=form))
    wide = dtype == torch.float64
    assert ten_steps(ours) == pytest.approx(ten_steps(theirs), rel=1e-12 if wide else 1e-6)
    scales = {
        name.removeprefix("base_model.model.").removesuffix(".ia3_l.default"): value.flatten()
        for name, value in theirs.named_parameters()
        if value.requires_grad
    }
    gammas = vectors(ours)[0]
    assert gammas.keys() == scales.keys()
    for name, gamma in gammas.items():
        moved = (gamma - 1).norm()
        assert moved > 0.02, name
        assert (gamma - scales[name]).norm() < (1e-9 if wide else 1e-3) * moved, name


@pytest.mark.parametrize("form", ["plain", "lean"])
@pytest.mark.parametrize("mode", ["both", "neuron", "synapse"])
@pytest.mark.parametrize("carrier", ["lora", "dora"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("llama", {"attention_bias": True, "mlp_bias": True}), ("phi3", {})],
    ids=["llama", "biases", "phi3"],
)
def test_logits_and_gradients_are_those_of_the_dense_formula(family, changes, carrier, mode, form):
    plain = family_model(family, torch.float64, num_hidden_layers=3, **changes)
    options = {"carrier": carrier, "mode": mode}
    model = adapt(deepcopy(plain), form=form, adapt_embedding=True, **options, **LOW_RANK)
    trained = trained_tensors(centered(model))
    assert len(trained) == sum(p.requires_grad for p in model.parameters())
    found = model(input_ids=text()).logits
    c = LOW_RANK["lora_alpha"] / LOW_RANK["r"]
    expected = low_rank_logits(plain, text(), trained, c=c, **options)
    assert relative(found, expected) < 1e-10
    assert_same_gradients(found, expected, trained)


@pytest.mark.parametrize("form", ["plain", "lean"])
@pytest.mark.parametrize("mode", ["both", "neuron", "synapse"])
@pytest.mark.parametrize("carrier", ["lora", "dora"])
def test_a_row_of_zeros_starts_as_the_base_and_trains(carrier, mode, form):
    plain = family_model("llama", torch.float64, num_hidden_layers=2, attention_bias=True)
    for projection in SEVEN:
        plain.get_submodule(module_name(1, projection)).weight.data[3] = 0
    plain.model.layers[0].mlp.down_proj.weight.data[5:7] = 0
    options = {"carrier": carrier, "mode": mode}
    model = get_peft_model(deepcopy(plain), SanConfig(form=form, **options, **LOW_RANK))
    assert relative(model(text()).logits, plain(text()).logits) < 1e-12
    model(text()).logits.pow(2).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    trained = trained_tensors(centered(shake(model)))
    c = LOW_RANK["lora_alpha"] / LOW_RANK["r"]
    expected = low_rank_logits(plain, text(), trained, c=c, **options)
    assert_same(model(text()).logits, expected, trained)
    with torch.no_grad():
        assert relative(model.merge_and_unload()(text()).logits, expected) < 1e-10


@pytest.mark.parametrize("form", ["plain", "lean"])
@pytest.mark.parametrize("mode", ["both", "neuron", "synapse"])
@pytest.mark.parametrize("carrier", ["lora", "dora"])
def test_a_gated_mlp_passes_gradcheck(carrier, mode, form):
    sizes = {"hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2}
    plain = family_model(dtype=torch.float64, **sizes)
    model = adapt(plain, carrier=carrier, mode=mode, form=form, r=2, lora_alpha=3)
    mlp = centered(model).get_submodule("base_model.model.model.layers.0.mlp")
    trained = {name: p for name, p in mlp.named_parameters() if p.requires_grad}
    factors = {name: p for name, p in trained.items() if ".san_lora_" in name}
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)

    def passes(checked: dict[str, torch.Tensor], **how: Any) -> bool:
        def output(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
            return functional_call(mlp, dict(zip(checked, values, strict=True)), (x,))

        found: bool = torch.autograd.gradcheck(output, (x, *checked.values()), **how)
        return found

    if carrier == "lora":
        assert passes(trained)
        return
    assert passes({name: p for name, p in trained.items() if name not in factors})
    # By design what reaches A and B is not the derivative: the norm of V counts as a constant.
    assert not passes(factors, raise_exception=False)


def assert_same(found: torch.Tensor, expected: torch.Tensor, by: dict[str, torch.Tensor]) -> None:
    """Check logits, and the gradients of a sum of them by every vector."""
    assert relative(found, expected) < 1e-12
    weights = torch.randn(found.shape, dtype=found.dtype)
    mine, theirs = (
        torch.autograd.grad((logits * weights).sum(), list(by.values()))
        for logits in (found, expected)
    )
    for name, one, other in zip(by, mine, theirs, strict=True):
        assert relative(one, other) < 1e-10, name


@pytest.mark.parametrize("form", ["plain", "lean"])
def test_mode_neuron_alone_is_the_scaling_of_every_feature(form):
    plain = family_model(dtype=torch.float64)
    model = adapt(deepcopy(plain), mode="neuron", form=form)
    gammas, _ = vectors(model)
    assert len(gammas) == 4 * 7
    for name, gamma in gammas.items():
        plain.get_submodule(name).register_forward_hook(lambda _, x, y, gamma=gamma: y * gamma)
    assert_same(model(text()).logits, plain(text()).logits, gammas)


@pytest.mark.parametrize("form", ["plain", "lean"])
def test_mode_synapse_alone_is_the_scaling_of_the_readers_columns(form):
    plain = family_model(dtype=torch.float64)
    model = adapt(deepcopy(plain), mode="synapse", form=form)
    gammas, _ = vectors(model)
    assert len(gammas) == 4 * 4 - 1  # v, o, up and down of each block; nobody reads the last down
    weights = dict(plain.named_parameters())

    def scale_columns(block: int, reader: str, s: torch.Tensor) -> None:
        name = f"model.layers.{block}.{reader}_proj.weight"
        weights[name] = weights[name].detach() * s  # W[:, j] * s[j]

    for block in range(4):
        v, o, up = (
            gammas[f"model.layers.{block}.{name}_proj"]
            for name in ("self_attn.v", "self_attn.o", "mlp.up")
        )
        first, second = v[:8], v[8:]  # two kv heads of 8 channels, each read by two query heads
        scale_columns(block, "self_attn.o", torch.cat([first, first, second, second]))
        scale_columns(block, "mlp.down", up)
        scale_columns(block, "mlp.gate", o)
        scale_columns(block, "mlp.up", o)
        for reader in ("q", "k", "v") if block else ():
            down = gammas[f"model.layers.{block - 1}.mlp.down_proj"]
            scale_columns(block, f"self_attn.{reader}", down)
    assert_same(model(text()).logits, functional_call(plain, weights, (text(),)).logits, gammas)


def numpy_of(tensor: torch.Tensor) -> Any:
    return tensor.detach().double().numpy()


@pytest.mark.parametrize("mode", ["both", "neuron", "synapse"])
@pytest.mark.parametrize("carrier", ["lora", "dora"])
def test_every_merged_weight_is_the_formula_with_a_dense_norm(carrier, mode):
    model = adapt(family_model(dtype=torch.float64), carrier=carrier, mode=mode, **LOW_RANK)
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "san_feed")}
    c = LOW_RANK["lora_alpha"] / LOW_RANK["r"]

    def parts(layer: Any) -> tuple[Any, Any, Any, Any]:
        weight = numpy_of(layer.base_layer.weight)
        a, b = layer.san_lora_A["default"], layer.san_lora_B["default"]
        full = weight + c * numpy_of(b) @ numpy_of(a)
        norm, adapted = (np.linalg.norm(w, axis=1) for w in (weight, full))
        magnitude = layer.san_magnitude.get("default")
        return full, norm, adapted, None if magnitude is None else numpy_of(magnitude)

    checked = 0
    for layer in layers.values():
        full, norm, adapted, magnitude = parts(layer)
        if mode == "synapse":
            expected = (norm / adapted)[:, None] * full
        elif carrier == "dora":
            expected = (magnitude / adapted)[:, None] * full
        else:
            expected = full
        feed = layer.san_feed.get("default")
        assert (feed is None) == (mode == "neuron" or layer is _first_of(layers, layer))
        if feed is not None:
            _, norm, adapted, magnitude = parts(feed.anterior)
            gamma = (adapted if carrier == "lora" else magnitude) / norm
            how = feed.carry
            heads = gamma.reshape(-1, how.head_dim) if how.groups > 1 else gamma[:, None]
            expected = expected * np.repeat(heads, how.groups, axis=0).reshape(-1)
            checked += 1
        weight, _ = layer.merged_tensors(["default"])
        assert np.allclose(weight.detach().numpy(), expected, rtol=1e-12, atol=1e-14)
    assert checked == (0 if mode == "neuron" else len(layers) - 3)


def _first_of(layers: dict[str, Any], layer: Any) -> Any:
    """Return the layer itself where it is one of block 0's readers of the embedding, else None."""
    first = [f"layers.0.self_attn.{name}_proj" for name in "qkv"]
    name = next(name for name, other in layers.items() if other is layer)
    return layer if any(name.endswith(end) for end in first) else None


@pytest.mark.parametrize("mode", ["both", "neuron", "synapse"])
@pytest.mark.parametrize("carrier", ["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_merged_model_answers_as_the_adapted_one(family, carrier, mode):
    model = adapt(family_model(family, dtype=torch.float64), carrier=carrier, mode=mode, **LOW_RANK)
    with torch.no_grad():
        expected = model(text()).logits
        merged = model.merge_and_unload()(text()).logits
    assert relative(merged, expected) < 1e-6


@pytest.mark.parametrize("form", ["lean", "plain"])
@pytest.mark.parametrize("mode", ["both", "synapse"])
def test_gradients_of_the_lora_carrier_agree_with_finite_differences(mode, form):
    model = adapt(
        family_model(dtype=torch.float64, num_hidden_layers=2),
        carrier="lora",
        mode=mode,
        form=form,
        **LOW_RANK,
    )
    weights = torch.randn(model(text()).logits.shape, dtype=torch.float64)
    trained = [p for p in model.parameters() if p.requires_grad]

    def value() -> torch.Tensor:
        return (model(text()).logits.double() * weights).sum()

    value().backward()
    generator = torch.Generator().manual_seed(0)
    step = 1e-5
    for parameter in trained[:: max(1, len(trained) // 12)]:
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            parameter += step * direction
            above = value()
            parameter -= 2 * step * direction
            below = value()
            parameter += step * direction
        expected = (above - below) / (2 * step)
        found = (parameter.grad * direction).sum()
        assert found.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)


def test_the_norm_of_dora_is_a_constant_in_the_backward_pass():
    model = adapt(family_model(), carrier="dora", mode="neuron", **LOW_RANK)
    layer = next(m for m in model.modules() if hasattr(m, "san_feed"))
    row_scale = layer.row_scale("default")
    (to_a,) = torch.autograd.grad(
        row_scale.sum(), [layer.san_lora_A["default"]], allow_unused=True, retain_graph=True
    )
    (to_m,) = torch.autograd.grad(row_scale.sum(), [layer.san_magnitude["default"]])
    assert to_a is None
    assert to_m.abs().min() > 0


def test_the_norm_of_lora_sends_its_gradient_to_a_and_b():
    model = adapt(family_model(), carrier="lora", **LOW_RANK)
    layer = next(m for m in model.modules() if hasattr(m, "san_feed"))
    a, b = layer.san_lora_A["default"], layer.san_lora_B["default"]
    gradients = torch.autograd.grad(layer.gamma("default").sum(), [a, b])
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.floats(-2, 2), st.integers(0, 99)
)
def test_row_norms_need_no_dense_product(d_out, d_in, rank, c, seed):
    dice = np.random.default_rng(seed)
    weight, a, b = (dice.normal(size=s) for s in ((d_out, d_in), (rank, d_in), (d_out, rank)))
    expected = ((weight + c * b @ a) ** 2).sum(1)
    found = squared_row_norms((weight**2).sum(1), weight @ a.T, a, b, c)
    assert np.allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_the_formula_serves_numpy_and_torch_alike():
    dice = np.random.default_rng(0)
    weight, delta = dice.normal(size=(2, 3, 4))
    row_scale, s = dice.normal(size=3), dice.normal(size=4)
    expected = np.diag(row_scale) @ (weight + delta) @ np.diag(s)
    assert np.allclose(merged_weight(weight, row_scale, delta, s), expected)
    tensors = (torch.tensor(value) for value in (weight, row_scale, delta, s))
    assert np.allclose(merged_weight(*tensors).numpy(), expected)
    assert merged_bias(None, row_scale, None) is None
    assert np.array_equal(merged_bias(None, row_scale, s), s)


def test_dropout_acts_on_the_low_rank_path_alone_and_only_in_training():
    model = get_peft_model(
        family_model(), SanConfig(carrier="lora", mode="neuron", r=4, lora_dropout=0.5)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(text()).logits, model(text()).logits)
        model.train()
        torch.manual_seed(0)
        first = model(text()).logits
        assert not torch.equal(first, model(text()).logits)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
        assert torch.equal(model(text()).logits, family_model()(text()).logits)
