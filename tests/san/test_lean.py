"""The lean form against the plain one: the same losses and gradients, wherever it runs."""

from __future__ import annotations

import copy
import io
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from san.adapted import FAMILIES, adapt, family_model, shake, text
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.utils.deprecation import deprecate_kwarg

from san_llm import SanConfig
from san_llm.architectures.decoders import TARGETS
from san_llm.architectures.entry import KINDS
from san_llm.measure.rotation import rotates_halves
from san_llm.ops.scale import (
    Scaled,
    ScaledActivation,
    ScaledLayerNorm,
    ScaledNorm,
    ScaledRotary,
    ScaledSwiGLU,
    layer_norm,
    scaled,
)
from san_llm.san.lean import GatedFold, NormFold, RotaryFold, ValueFold

LOW_RANK = {"r": 4, "lora_alpha": 6}
LENGTHS = {torch.float32: (1e-6, 1e-5), torch.float64: (1e-12, 1e-12)}


def loss_and_gradients(model: Any, **inputs: Any) -> tuple[float, dict[str, Tensor]]:
    """Return a loss in the logits' own precision, and the gradient of every trained tensor."""
    model.zero_grad()
    logits = model(input_ids=text(), **inputs).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), text()[:, 1:].flatten())
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), found


def assert_same(
    plain: Any, lean: Any, dtype: torch.dtype, floor: float = 1.0, **inputs: Any
) -> None:
    """Check the loss, and each gradient relative to its norm or to that share of all gradients'.

    A gradient far smaller than the others' carries their rounding.
    """
    of_loss, of_gradients = LENGTHS[dtype]
    expected, gradients = loss_and_gradients(plain, **inputs)
    found, ours = loss_and_gradients(lean, **inputs)
    assert found == pytest.approx(expected, rel=of_loss)
    assert ours.keys() == gradients.keys()
    whole = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()
    for name, gradient in gradients.items():
        scale = max(gradient.norm().item(), floor * whole)
        assert (ours[name] - gradient).norm().item() <= of_gradients * scale, name


def pair(dtype: torch.dtype, family: str = "llama", changes: Any = None, **options: Any) -> Any:
    """Return the same moved adapter in both forms."""
    models = [
        adapt(family_model(family, dtype=dtype, **(changes or {})), form=form, **options)
        for form in ("plain", "lean")
    ]
    for model in models:
        for name, parameter in model.named_parameters():
            if ".san_lora_" in name:
                parameter.data.mul_(0.1)  # so that no block multiplies its input by ten
    return models


subsets = st.lists(st.sampled_from(TARGETS), min_size=1, unique=True)
kinds = st.one_of(st.lists(st.sampled_from(KINDS), unique=True), st.just("free"))


@pytest.mark.holds("lean", families=FAMILIES)
@settings(deadline=None, max_examples=40)
@given(
    dtype=st.sampled_from(list(LENGTHS)),
    family=st.sampled_from(sorted(FAMILIES)),
    kv_heads=st.sampled_from([1, 2, 4]),
    carrier=st.sampled_from(["scale", "lora", "dora"]),
    mode=st.sampled_from(["both", "neuron"]),
    shift=st.booleans(),
    links=kinds,
    targets=st.one_of(st.just(list(TARGETS)), subsets),
    embedding=st.booleans(),
)
def test_both_forms_have_the_same_loss_and_gradients(
    dtype, family, kv_heads, carrier, mode, shift, links, targets, embedding
):
    plain, lean = pair(
        dtype,
        family,
        {"num_key_value_heads": kv_heads, "num_hidden_layers": 2},
        carrier=carrier,
        mode="both" if links == "free" else mode,
        shift=shift and carrier == "scale",
        links=links,
        target_modules=targets,
        adapt_embedding=embedding,
        **LOW_RANK,
    )
    assert_same(plain, lean, dtype, floor=1e-3)


@pytest.mark.parametrize("dtype", list(LENGTHS))
@pytest.mark.parametrize("carrier", ["scale", "lora", "dora"])
def test_synapse_mode_is_the_same_in_both_forms(carrier, dtype):
    plain, lean = pair(dtype, carrier=carrier, mode="synapse", **LOW_RANK)
    assert_same(plain, lean, dtype, floor=1e-3)


@pytest.mark.parametrize("value", [0.0, 1e-30, -1e-8, 1e4])
def test_a_gamma_of_any_size_is_right_in_the_lean_form(value):
    plain, lean = pair(torch.float64)
    for model in (plain, lean):
        for name, parameter in model.named_parameters():
            if ".san_gamma." in name and ("v_proj" in name or "up_proj" in name):
                parameter.data[::2] = value
    assert_same(plain, lean, torch.float64, floor=1e-3)


WHERE = {
    NormFold: "self_attn.q_proj.columns_fold",
    RotaryFold: "self_attn.k_proj.rows_fold",
    ValueFold: "self_attn.o_proj.columns_fold",
    GatedFold: "mlp.down_proj.columns_fold",
}


@pytest.mark.parametrize(
    ("family", "options", "standing"),
    [
        ("llama", {}, {NormFold, RotaryFold, ValueFold, GatedFold}),
        ("qwen2", {}, {NormFold, RotaryFold, ValueFold, GatedFold}),
        ("gemma", {}, {NormFold, RotaryFold, ValueFold, GatedFold}),
        (
            "qwen3",
            {},
            {NormFold, ValueFold, GatedFold},
        ),  # norms between the Linear and the rotation
        ("llama", {"shift": True}, {NormFold}),
        ("llama", {"links": ("mlp",)}, {RotaryFold, GatedFold}),
        ("llama", {"links": ("attention",)}, {RotaryFold, ValueFold, GatedFold}),
        ("llama", {"links": "free"}, {RotaryFold, GatedFold}),
        ("llama", {"carrier": "dora", **LOW_RANK}, {NormFold, RotaryFold, ValueFold, GatedFold}),
        ("qwen2", {"carrier": "dora", **LOW_RANK}, {NormFold, GatedFold}),  # q, k and v have biases
        ("llama", {"form": "plain"}, set()),
        ("llama", {"target_modules": ["q_proj", "o_proj", "up_proj"]}, set()),
    ],
)
def test_a_fold_stands_where_its_scales_can_move(family, options, standing):
    model = adapt(family_model(family), **options)
    block = model.base_model.model.model.layers[1]  # the first has no layer before it
    found = set()
    for kind, where in WHERE.items():
        module, _, name = where.rpartition(".")
        fold = getattr(block.get_submodule(module), name, None)
        assert isinstance(fold, kind | None)
        found |= {kind} if fold is not None and fold.stands() else set()
    assert found == standing
    with model.disable_adapter():
        assert not any(
            fold.stands()
            for module in block.modules()
            for fold in vars(module).values()
            if isinstance(fold, tuple(WHERE))
        )


def test_only_a_rotation_of_halves_is_taken_over():
    def rotate_half(x: Tensor) -> Tensor:
        return torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], dim=-1)

    def stock(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin

    def other(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return q * cos - rotate_half(q) * sin, k * cos + rotate_half(k) * sin

    def attention(body: str, **names: Any) -> nn.Module:
        exec(f"def forward(self, x):\n    return {body}", names)
        return type("Attention", (nn.Module,), {"forward": names["forward"]})()

    called = "apply_rotary_pos_emb(x)"
    assert rotates_halves(attention(called, apply_rotary_pos_emb=apply_rotary_pos_emb))
    assert rotates_halves(attention(called, apply_rotary_pos_emb=stock))
    assert not rotates_halves(attention(called, apply_rotary_pos_emb=other))
    assert not rotates_halves(attention(called, apply_rotary_pos_emb=lambda q, k: (q, k)))
    assert not rotates_halves(attention("x", apply_rotary_pos_emb=stock)), "it does not call it"
    assert not rotates_halves(attention(called))
    renaming = attention(called, apply_rotary_pos_emb=stock)
    rename = deprecate_kwarg("y", version="99", new_name="x")  # as transformers renames arguments
    type(renaming).forward = rename(type(renaming).forward)
    assert rotates_halves(renaming)
    # As one that is not in Python, and has no names.
    compiled = type("Attention", (nn.Module,), {"forward": partial(torch.relu)})
    assert not rotates_halves(compiled())


def kept_for_backward(model: Any) -> int:
    """Return how many numbers the graph of a forward keeps, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = model(input_ids=text(4, 64)).logits  # alive while its storages are counted
    assert kept.requires_grad
    return sum(seen.values())


def test_the_lean_form_keeps_about_as_much_as_the_frozen_base():
    llama_7b = {"hidden_size": 64, "intermediate_size": 172, "num_key_value_heads": 4}
    frozen = family_model(**llama_7b).requires_grad_(False)
    frozen.enable_input_require_grads()
    plain, lean = pair(torch.float32, changes=llama_7b)
    limit = kept_for_backward(frozen)
    assert kept_for_backward(lean) < 1.1 * limit
    assert kept_for_backward(plain) > 1.4 * limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("carrier", ["scale", "lora", "dora"])
def test_the_lean_form_starts_at_the_base_bit_for_bit(carrier, dtype):
    base = family_model().to(dtype)  # with LLaMA's own norms
    with torch.no_grad():
        expected = base(text()).logits
        model = get_peft_model(copy.deepcopy(base), SanConfig(carrier=carrier, **LOW_RANK))
        assert torch.equal(model(text()).logits, expected)


def test_in_bf16_the_lean_form_is_as_close_to_fp32_as_the_plain_one():
    errors = {"plain": 0.0, "lean": 0.0}
    for seed in range(4):  # of one model alone the rounding is luck
        _, wanted = loss_and_gradients(adapt(family_model(seed=seed), seed + 10))
        for form in errors:
            base = family_model(seed=seed).to(torch.bfloat16)
            _, found = loss_and_gradients(adapt(base, seed + 10, form=form))
            errors[form] += sum(
                (found[n] - g).norm().item() / g.norm().item() / 4 / len(wanted)
                for n, g in wanted.items()
            )
    assert errors["lean"] < 1.1 * errors["plain"]
    assert errors["lean"] < 0.1


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_works_with_every_attention_and_with_checkpointing(attention, checkpointing):
    plain, lean = pair(torch.float32)
    for model in (plain, lean):
        model.train()
        model.config._attn_implementation = attention
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(plain, lean, torch.float32)


def test_padding_is_masked_alike():
    plain, lean = pair(torch.float32)
    mask = torch.ones_like(text())
    mask[0, 4:] = 0
    assert_same(plain, lean, torch.float32, attention_mask=mask)


@pytest.mark.slow
def test_it_compiles():
    model = adapt(family_model(num_hidden_layers=2)).train()
    expected, gradients = loss_and_gradients(model)
    compiled = torch.compile(model, backend="aot_eager")
    found, ours = loss_and_gradients(compiled)
    assert found == pytest.approx(expected, rel=1e-6)
    for name, gradient in gradients.items():
        other = ours[f"_orig_mod.{name}"]
        assert torch.allclose(other, gradient, rtol=1e-4, atol=1e-6), name


def test_generation_with_a_cache_gives_what_the_plain_form_gives():
    plain, lean = pair(torch.float32)
    how = {"max_new_tokens": 8, "do_sample": False, "num_beams": 2, "pad_token_id": 2}
    expected = plain.generate(input_ids=text(), **how)
    assert torch.equal(lean.generate(input_ids=text(), **how), expected)
    assert torch.equal(lean.generate(input_ids=text(), use_cache=False, **how), expected)


def test_disabling_and_switching_adapters_switches_the_fold():
    base = family_model(dtype=torch.float64)
    with torch.no_grad():
        at_base = base(text()).logits
        first = adapt(copy.deepcopy(base))(text()).logits
        second = adapt(copy.deepcopy(base), seed=2, links=("mlp",))(text()).logits
        model = adapt(copy.deepcopy(base))
        model.add_adapter("other", SanConfig(links=("mlp",)))
        shake(model, 2, "other")
        assert torch.equal(model(text()).logits, first)
        model.set_adapter("other")
        assert torch.equal(model(text()).logits, second)
        with model.disable_adapter():
            assert torch.equal(model(text()).logits, at_base)
        model.base_model.set_adapter(["default", "other"])
        both = model(text()).logits
        for options in model.peft_config.values():
            assert options.form == "lean"
        plain = adapt(copy.deepcopy(base), form="plain")
        plain.add_adapter("other", SanConfig(links=("mlp",), form="plain"))
        shake(plain, 2, "other")
        plain.base_model.set_adapter(["default", "other"])
        assert torch.equal(both, plain(text()).logits)


def test_a_copy_folds_its_own_scales():
    model = adapt(family_model())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        before = model(text()).logits
        for name, parameter in twin.named_parameters():
            if ".san_gamma." in name:
                parameter.zero_()
        assert torch.equal(model(text()).logits, before)
        assert not torch.allclose(twin(text()).logits, before)


def test_somebody_elses_patch_of_a_module_stays():
    model = family_model()
    calls = []
    block = model.model.layers[0]
    for module in (block.input_layernorm, block.mlp, block.self_attn):
        own = module.forward
        module.forward = lambda *a, own=own, **k: (calls.append(1), own(*a, **k))[1]
    expected = adapt(family_model(), form="plain")
    patched = adapt(model)
    with torch.no_grad():
        assert torch.allclose(patched(text()).logits, expected(text()).logits, atol=1e-5)
    assert len(calls) == 3


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (1, 1, 4)])
@pytest.mark.parametrize("on_strided", [False, True])
def test_the_functions_pass_gradcheck(shape, on_strided):
    generator = torch.Generator().manual_seed(0)

    def numbers(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_()

    def strided(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, -2).transpose(0, -2) if on_strided else tensor

    x, y, g, c = numbers(*shape), numbers(*shape), numbers(shape[-1]), numbers(shape[-1])
    check = torch.autograd.gradcheck
    assert check(lambda a, b: Scaled.apply(strided(a), b), (x, g))
    assert check(lambda a, b: ScaledNorm.apply(strided(a), b, 1e-5), (x, g))
    assert check(lambda *a: ScaledSwiGLU.apply(*a), (x, y, g, c))
    assert check(lambda a, b, g: ScaledSwiGLU.apply(a, b, g, None), (x, y, g))
    assert check(lambda a, b, c: ScaledSwiGLU.apply(a, b, None, c), (x, y, c))


ACTIVATIONS = {"gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "silu"}


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_an_activation_that_is_computed_again_passes_gradcheck(name, monkeypatch):
    monkeypatch.setattr("san_llm.ops.scale.BLOCK", 8)  # two tokens at a time, and one at last
    generator = torch.Generator().manual_seed(0)
    x, g, c = (
        torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_()
        for size in ((5, 4), (4,), (4,))
    )
    act = ACT2FN[name]
    torch.testing.assert_close(ScaledActivation.apply(x, g, c, act), act(g * x) * c)
    torch.testing.assert_close(ScaledActivation.apply(x, None, None, act), act(x))
    check = torch.autograd.gradcheck
    assert check(lambda *a: ScaledActivation.apply(*a, act), (x, g, c))
    assert check(lambda x, g: ScaledActivation.apply(x, g, None, act), (x, g))
    assert check(lambda x, c: ScaledActivation.apply(x, None, c, act), (x, c))


@pytest.mark.parametrize("biased", [True, False])
def test_a_layer_norm_of_two_dtypes_is_torchs_own(biased):
    """A GPU has none; on a CPU both can be had."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*size, generator=generator) for size in ((3, 5, 8), (8,), (8,)))
    bias = bias if biased else None
    given = [t for t in (x.to(torch.bfloat16), weight, bias) if t is not None]
    results = []
    for function in (ScaledLayerNorm.apply, layer_norm):
        leaves = [t.clone().requires_grad_() for t in given]
        out = function(leaves[0], leaves[1], leaves[2] if biased else None, 1e-5)
        (out.float() * out.float().detach().cos()).sum().backward()
        results.append([out.float(), *(leaf.grad.float() for leaf in leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


def rotations(dtype: torch.dtype, positions: int) -> tuple[Tensor, ...]:
    """Return queries of 2 sequences, 3 heads, 5 tokens, a scale, and the rotation's numbers."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 12, generator=generator, dtype=torch.float64)
    scale = torch.randn(12, generator=generator, dtype=torch.float64)
    angles = torch.randn(positions, 5, 2, generator=generator, dtype=torch.float64).repeat(1, 1, 2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, cos, sin = x.to(dtype), angles.cos().to(dtype), angles.sin().to(dtype)
    return x.view(2, 5, 3, 4).transpose(1, 2), scale.to(wide), cos, sin


@pytest.mark.parametrize("positions", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scaled_queries_are_rotated_to_the_bits_of_the_stock_function(dtype, positions):
    x, scale, cos, sin = rotations(dtype, positions)
    by_head = scale.view(3, 1, 4)
    for factor, product in ((None, x), (scale, scaled(x, by_head))):
        expected, _ = apply_rotary_pos_emb(product, product, cos, sin)
        assert torch.equal(ScaledRotary.apply(x, factor, cos, sin), expected)


@pytest.mark.parametrize("positions", [1, 2])
def test_the_rotary_function_passes_gradcheck(positions):
    x, scale, cos, sin = rotations(torch.float64, positions)
    given = x.detach().requires_grad_(), scale.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, g: ScaledRotary.apply(x, g, cos, sin), given)
    assert torch.autograd.gradcheck(lambda x: ScaledRotary.apply(x, None, cos, sin), given[:1])


def test_blocks_of_tokens_change_nothing(monkeypatch):
    plain, lean = pair(torch.float64)
    monkeypatch.setattr("san_llm.ops.scale.BLOCK", 100)  # three tokens at a time
    assert_same(plain, lean, torch.float64, floor=1e-3)


def test_an_adapted_model_can_be_pickled_whole():
    model = adapt(family_model())
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    with torch.no_grad():
        expected = model(text()).logits
        assert torch.equal(torch.load(stored, weights_only=False)(text()).logits, expected)


def test_norms_of_another_make_are_left_alone():
    model = family_model()
    for block in model.model.layers:
        block.input_layernorm = nn.RMSNorm(32, eps=1e-6)
    plain, lean = (adapt(copy.deepcopy(model), form=form) for form in ("plain", "lean"))
    assert_same(plain, lean, torch.float32)


def test_an_mlp_of_another_activation_keeps_its_own_forward():
    model = adapt(family_model(hidden_act="gelu"))
    assert isinstance(model.get_submodule("base_model.model.model.layers.0.mlp"), nn.Module)
    assert not hasattr(model.base_model.model.model.layers[0].mlp, "san_fold")
    plain = adapt(family_model(hidden_act="gelu"), form="plain")
    assert_same(plain, model, torch.float32)
