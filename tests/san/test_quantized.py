"""SAN over real 4-bit and 8-bit bitsandbytes bases, on the CPU, compared when dequantized."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from reference import (
    SEVEN,
    dense_logits,
    dense_parameters,
    logits_of,
    low_rank_logits,
    low_rank_parameters,
    module_name,
    trained_tensors,
)
from san.adapted import adapt, centered, columns, logits, relative, shake, text, vectors
from tiny import tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from san_llm import SanConfig
from san_llm.errors import InputError

bnb = pytest.importorskip("bitsandbytes")

KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_use_double_quant": False},
    "nf4 double": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
FORMS = ["lean", "plain"]
ADAPTED = [module_name(block, projection) for block in range(3) for projection in SEVEN]
every_kind = pytest.mark.parametrize("kind", KINDS)
four_bit = pytest.mark.parametrize("kind", ["nf4", "nf4 double"])


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved base whose dimensions are whole blocks of 64."""
    folder = tmp_path_factory.mktemp("quantizable")
    tiny_model(hidden_size=64, intermediate_size=128, num_hidden_layers=3).save_pretrained(folder)
    return folder


def quantized(stored: Path, kind: str, compute: torch.dtype = torch.float32) -> Any:
    options = dict(KINDS[kind])
    if "load_in_4bit" in options:
        options |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": compute}
    return AutoModelForCausalLM.from_pretrained(
        stored, quantization_config=BitsAndBytesConfig(**options), dtype=compute, device_map="cpu"
    ).eval()


def dequantized_weight(linear: Any) -> torch.Tensor:
    if isinstance(linear, bnb.nn.Linear4bit):
        weight = linear.weight
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    scale = linear.state.SCB if linear.state.SCB is not None else linear.weight.SCB
    return linear.weight.data.float() * scale[:, None] / 127


def dequantized(stored: Path, kind: str) -> Any:
    """Return a full-precision model that holds the numbers of the quantized one."""
    plain = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float32).eval()
    model = quantized(stored, kind)
    for block in range(plain.config.num_hidden_layers):
        for projection in SEVEN:
            name = module_name(block, projection)
            weight = dequantized_weight(model.get_submodule(name))
            plain.get_submodule(name).weight.data.copy_(weight)
    return plain


def gradients(loss: torch.Tensor, trained: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


@every_kind
@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_starts_as_the_quantized_base_bit_for_bit(stored, kind, form):
    plain = quantized(stored, kind)
    for module in plain.modules():  # the base's own forward must not repack what is compared
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    expected = logits(plain)
    model = get_peft_model(quantized(stored, kind), SanConfig(form=form, shift=True))
    assert torch.equal(logits(model), expected)


@every_kind
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options", [{}, {"shift": True, "mode": "synapse"}, {"links": "free"}], ids=str
)
def test_logits_and_gradients_are_those_of_the_dequantized_reference(stored, kind, form, options):
    # train mode: an 8-bit layer rounds its inputs as well in eval mode
    model = adapt(quantized(stored, kind), form=form, **options).train()
    gammas, betas = vectors(model)
    sigmas = columns(model)
    trained = gammas | {f"{name} shift": beta for name, beta in betas.items()}
    trained |= {f"{name} columns": sigma for name, sigma in sigmas.items()}
    found = model(input_ids=text()).logits
    how = {key: options[key] for key in ("mode", "links") if key in options}
    plain = dequantized(stored, kind)
    expected = dense_logits(plain, text(), gammas, betas, sigmas=sigmas, **how)
    tolerance = 1e-4 if kind != "int8" else 2e-2
    assert relative(found, expected) < tolerance
    weights = torch.randn(found.shape)
    mine = gradients((found * weights).sum(), trained)
    theirs = gradients((expected * weights).sum(), trained)
    # relative to the largest of all: a small gradient carries the rounding of large ones
    largest = max(value.abs().max() for value in theirs.values())
    for name in trained:
        assert (mine[name] - theirs[name]).abs().max() < 2 * tolerance * largest, name


def low_rank(base: Any, carrier: str, **options: Any) -> Any:
    """Return a base with a low-rank carrier that has moved about as far as W is large."""
    return centered(adapt(base, carrier=carrier, r=4, lora_alpha=6, **options))


@every_kind
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["both", "synapse"])
@pytest.mark.parametrize("carrier", ["lora", "dora"])
def test_low_rank_gradients_are_those_of_the_dequantized_reference(
    stored, kind, form, mode, carrier
):
    model = low_rank(quantized(stored, kind), carrier, form=form, mode=mode).train()
    trained = trained_tensors(model)
    found = model(input_ids=text()).logits
    expected = low_rank_logits(
        dequantized(stored, kind), text(), trained, carrier=carrier, mode=mode, c=6 / 4
    )
    assert relative(found, expected) < 1e-4
    weights = torch.randn(found.shape)
    mine = gradients((found * weights).sum(), trained)
    theirs = gradients((expected * weights).sum(), trained)
    for name in trained:
        assert relative(mine[name], theirs[name]) < 5e-4, name


@four_bit
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_an_inference_forward_does_not_spoil_later_gradients(stored, kind, compute):
    # A CPU with AVX512-BF16 repacks a 4-bit weight in place at its first forward without gradient.
    model = adapt(quantized(stored, kind, compute))
    fresh = adapt(quantized(stored, kind, compute))
    weights = torch.randn(*text().shape, model.config.vocab_size)

    def all_gradients(one: Any) -> dict[str, torch.Tensor]:
        return gradients((one(input_ids=text()).logits * weights).sum(), vectors(one)[0])

    logits(model)
    model.generate(input_ids=text(), max_new_tokens=2, do_sample=False)
    found, expected = all_gradients(model), all_gradients(fresh)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for block in range(3):
        linear = model.get_submodule(f"base_model.model.{module_name(block, 'up_proj')}.base_layer")
        assert not getattr(linear.weight.quant_state, "packing_format_for_cpu", False)


@four_bit
def test_a_base_that_was_already_repacked_is_refused(stored, kind, tmp_path):
    get_peft_model(quantized(stored, kind), SanConfig()).save_pretrained(tmp_path)
    plain = quantized(stored, kind)
    logits(plain)
    state = plain.model.layers[0].self_attn.q_proj.weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        pytest.skip("this CPU does not repack 4-bit weights")
    with pytest.raises(InputError, match=r"q_proj was repacked.*Load the model again"):
        get_peft_model(plain, SanConfig())
    with pytest.raises(InputError, match="repacked"):
        PeftModel.from_pretrained(plain, tmp_path)
    with pytest.raises(InputError, match="repacked"):
        plain.load_adapter(str(tmp_path))


@every_kind
def test_unmerging_restores_every_bit(stored, kind):
    model = adapt(quantized(stored, kind), shift=True)
    before, state = logits(model), deepcopy(model.state_dict())
    model.merge_adapter()
    assert not torch.equal(logits(model), before)  # quantized again, so not the same numbers
    model.unmerge_adapter()
    after = model.state_dict()
    assert set(after) == set(state)
    for name, value in state.items():
        assert not isinstance(value, torch.Tensor) or torch.equal(after[name], value), name
    assert torch.equal(logits(model), before)
    model.merge_adapter()  # and once more, from the restored weights
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(adapt(quantized(stored, kind)).unload()))


def quantize_again(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Return what a weight becomes by going through the quantizer once."""
    if kind == "int8":
        rows, scale, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        return rows.float() * scale[:, None] / 127
    packed, state = bnb.functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=kind == "nf4 double", quant_type="nf4"
    )
    return bnb.functional.dequantize_4bit(packed, state)


def quantized_once(expected: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """Return the parameters with every weight gone through the quantizer."""
    weights = {f"{name}.weight": expected[f"{name}.weight"].detach() for name in ADAPTED}
    return expected | {name: quantize_again(weight, kind) for name, weight in weights.items()}


def assert_holds(merged: Any, weights: dict[str, torch.Tensor]) -> None:
    """Check every quantized weight of a merged model."""
    for name in ADAPTED:
        weight = weights[f"{name}.weight"]
        difference = (dequantized_weight(merged.get_submodule(name)) - weight).abs()
        # a number halfway between two levels may fall to either side
        assert (difference > 1e-5 * weight.abs().max()).float().mean() < 0.01, name


@every_kind
def test_a_merge_quantizes_the_reference_once(stored, kind):
    plain = dequantized(stored, kind)
    model = adapt(quantized(stored, kind), shift=True)
    expected = dense_parameters(plain, *vectors(model))
    merged = model.merge_and_unload()
    assert_holds(merged, quantized_once(expected, kind))
    for name in ADAPTED:
        torch.testing.assert_close(merged.get_submodule(name).bias, expected[f"{name}.bias"])
    first = logits(merged)
    assert torch.equal(logits(merged), first)


@every_kind
@pytest.mark.parametrize("carrier", ["lora", "dora"])
def test_a_low_rank_carrier_answers_and_merges_as_the_reference(stored, kind, carrier):
    plain = dequantized(stored, kind)
    model = low_rank(quantized(stored, kind), carrier)
    expected = low_rank_parameters(plain, trained_tensors(model), carrier=carrier, c=6 / 4)
    # train mode: an 8-bit layer rounds its inputs as well in eval mode
    found = model.train()(input_ids=text()).logits
    assert relative(found, logits_of(plain, text(), expected)) < 1e-4
    merged = model.merge_and_unload().train()
    weights = quantized_once(expected, kind)
    assert_holds(merged, weights)
    found = merged(input_ids=text()).logits
    assert relative(found, logits_of(plain, text(), weights)) < 1e-2


@every_kind
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_loads_bit_for_bit(stored, kind, low_cpu_mem_usage, tmp_path):
    model = adapt(quantized(stored, kind), shift=True)
    before = logits(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(
        quantized(stored, kind), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(logits(again), before)
    native = quantized(stored, kind)
    native.load_adapter(str(tmp_path))
    assert torch.equal(logits(native), before)


@every_kind
def test_a_step_moves_the_scales_and_leaves_the_base(stored, kind):
    model = get_peft_model(quantized(stored, kind), SanConfig()).train()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=text(), labels=text()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    named = dict(model.named_parameters())
    assert all(torch.equal(named[name], value) for name, value in frozen.items())


def test_an_adapter_trained_over_4_bits_fits_the_full_precision_base(stored, tmp_path):
    model = adapt(quantized(stored, "nf4"))
    model.save_pretrained(tmp_path)
    full = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(full, tmp_path)
    twin = shake(get_peft_model(AutoModelForCausalLM.from_pretrained(stored), SanConfig()))
    assert torch.equal(logits(loaded), logits(twin))
