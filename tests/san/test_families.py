"""Every family of the table: the dense reference, the lean form, and stock files of the result."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from reference import ALL_LINKS, FOUR, SEVEN, dense_logits, dense_model, module_name
from safetensors.torch import load_file
from san import test_encoders, test_measured, test_pictures, test_pictures_with_text
from san.adapted import FAMILIES, FUSED, adapt, family_model, logits, relative, text, vectors
from san.test_lean import LOW_RANK, assert_same, kept_for_backward, loss_and_gradients
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Phi3Config,
    Qwen3Config,
)

from san_llm import SanConfig, propagation_graph
from san_llm.architectures import decoders
from san_llm.data.encode import IGNORE
from san_llm.errors import InputError
from san_llm.models.adapter import add_adapter
from san_llm.ops.scale import ScaledNorm, ScaledSwiGLU
from san_llm.recipe.schema import DoraMethod, LoraMethod, SanMethod
from san_llm.train.loss import token_losses

EVERY = (*FAMILIES, *FUSED)
NEW = ("qwen3", "gemma", "gemma2", "gemma3_text", "phi3")
TWO_BLOCKS = {"num_hidden_layers": 2}
every_family = pytest.mark.parametrize("family", EVERY)
new_families = pytest.mark.parametrize("family", NEW)


def projections(family: str) -> tuple[str, ...]:
    return FOUR if family in FUSED else SEVEN


def test_every_family_of_the_table_is_tested_here_and_described():
    assert set(EVERY) == set(decoders.FAMILIES)
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \| [A-Z]", page, re.MULTILINE) == list(decoders.FAMILIES)


def test_the_page_says_of_every_model_type_what_is_held_of_it():
    """Its table is written by scripts/make_families.py from what the tests came to."""
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([\w-]+) \| (yes|NO|refused)", page, re.MULTILINE))
    by_hand = (test_measured, test_encoders, test_pictures)
    tested = {*EVERY, *test_pictures_with_text.FAMILIES}.union(*(made.WIRED for made in by_hand))
    assert {family for family, held in rows.items() if held == "yes"} == tested


@every_family
@pytest.mark.parametrize("form", ["plain", "lean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_starts_at_the_base_bit_for_bit(family, form, dtype):
    # 64 is a whole number of vectors. Of other widths torch's own silu rounds the last channels by
    # other instructions, and which those are depends on how its input lies in memory.
    base = family_model(family, intermediate_size=64).to(dtype)  # with the family's own norms
    expected = logits(base)
    model = get_peft_model(base, SanConfig(form=form, adapt_embedding=True))
    assert torch.equal(logits(model), expected)


@pytest.mark.holds("dense", families=NEW)
@settings(deadline=None, max_examples=40)
@given(
    family=st.sampled_from(NEW),
    form=st.sampled_from(["plain", "lean"]),
    mode=st.sampled_from(["both", "neuron", "synapse"]),
    links=st.lists(st.sampled_from(ALL_LINKS), min_size=1, unique=True).map(tuple),
    shift=st.booleans(),
    kv_heads=st.sampled_from([1, 2, 4]),
    embedding=st.booleans(),
    data=st.data(),
)
def test_logits_and_gradients_are_those_of_the_dense_weights(
    family, form, mode, links, shift, kv_heads, embedding, data
):
    every = projections(family)
    some = st.lists(st.sampled_from(every), min_size=1, unique=True)
    targets = data.draw(st.one_of(st.just(list(every)), some)) if mode != "synapse" else list(every)
    plain = family_model(family, torch.float64, num_key_value_heads=kv_heads, **TWO_BLOCKS)
    options: dict[str, Any] = {"mode": mode, "links": links, "adapt_embedding": embedding}
    model = adapt(deepcopy(plain), form=form, shift=shift, target_modules=targets, **options)
    gammas, betas = vectors(model)
    dense = dense_logits(plain, text(), gammas, betas, targets=tuple(targets), **options)
    adapted = model(input_ids=text()).logits
    assert relative(adapted, dense) < 1e-11
    weights = torch.randn(dense.shape, generator=torch.Generator().manual_seed(0)).double()
    trained = [*gammas.values(), *betas.values()]
    expected = torch.autograd.grad((dense * weights).sum(), trained, allow_unused=True)
    found = torch.autograd.grad((adapted * weights).sum(), trained, allow_unused=True)
    largest = max(g.abs().max().item() for g in expected if g is not None)
    for ours, theirs in zip(found, expected, strict=True):
        ours, theirs = (torch.zeros(1) if g is None else g for g in (ours, theirs))
        assert (ours - theirs).abs().max().item() < 1e-11 * largest


@pytest.mark.holds("lean")
@new_families
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("carrier", ["scale", "lora", "dora"])
@pytest.mark.parametrize("mode", ["both", "synapse"])
def test_the_lean_form_is_the_plain_one(family, dtype, carrier, mode):
    plain, lean = (
        adapt(
            family_model(family, dtype, **TWO_BLOCKS),
            form=form,
            carrier=carrier,
            mode=mode,
            **LOW_RANK,
        )
        for form in ("plain", "lean")
    )
    for model in (plain, lean):
        for name, parameter in model.named_parameters():
            if ".san_lora_" in name:
                parameter.data.mul_(0.3)
    assert_same(plain, lean, dtype)


@new_families
def test_it_trains_with_gradient_checkpointing(family):
    model = adapt(family_model(family, **TWO_BLOCKS)).train()
    expected, gradients = loss_and_gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found, ours = loss_and_gradients(model)
    assert found == expected
    for name, gradient in gradients.items():
        assert relative(ours[name], gradient) < 1e-5, name


@every_family
def test_the_loss_from_learned_positions_is_that_of_all_logits(family):
    model = adapt(family_model(family, **TWO_BLOCKS))
    head = model.base_model.model.lm_head
    head.weight.data.mul_(20)  # so that a cap on the logits matters
    inputs = {"input_ids": text(), "attention_mask": torch.ones_like(text()), "labels": text()}
    inputs["labels"][:, :3] = IGNORE
    for trained in (False, True):
        head.weight.requires_grad_(trained)
        plain = model(input_ids=text()).logits[:, 2:-1].flatten(0, 1)
        expected = F.cross_entropy(plain, text()[:, 3:].flatten(), reduction="sum")
        gammas = list(vectors(model)[0].values())
        wanted = torch.autograd.grad(expected, gammas)
        loss = token_losses(model, inputs)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        for ours, theirs in zip(torch.autograd.grad(loss, gammas), wanted, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max())
    assert torch.equal(model(input_ids=text()).logits[:, 2:-1].flatten(0, 1), plain)


FOLDED = {
    "qwen3": {"input_layernorm", "post_attention_layernorm", "mlp"},
    "gemma": {"input_layernorm", "post_attention_layernorm", "self_attn", "mlp"},
    "gemma2": {"input_layernorm", "pre_feedforward_layernorm", "self_attn", "mlp"},
    "gemma3_text": {"input_layernorm", "pre_feedforward_layernorm", "mlp"},
    "phi3": {"input_layernorm", "post_attention_layernorm", "mlp"},
}


@new_families
def test_what_can_be_folded_is(family):
    model = adapt(family_model(family, **TWO_BLOCKS))
    block = "base_model.model.model.layers.1."
    found = {
        name.removeprefix(block)
        for name, module in model.named_modules()
        if name.startswith(block) and hasattr(module, "san_fold")
    }
    assert found == FOLDED[family]


@new_families
def test_the_lean_form_keeps_less_for_the_backward_pass(family):
    wide = {"hidden_size": 64, "intermediate_size": 172}
    plain, lean = (adapt(family_model(family, **wide), form=form) for form in ("plain", "lean"))
    frozen = family_model(family, **wide).requires_grad_(False)
    frozen.enable_input_require_grads()
    assert kept_for_backward(lean) < 0.75 * kept_for_backward(plain)
    # A row scale around attention stays where q, k and v come out of one Linear.
    limit = 1.2 if family in FUSED else 1.1
    assert kept_for_backward(lean) < limit * kept_for_backward(frozen)


@pytest.mark.holds("files")
@every_family
@pytest.mark.parametrize("carrier", ["scale", "dora"])
def test_stock_transformers_loads_the_merged_model(family, carrier, tmp_path):
    tied = family.startswith("gemma")
    plain = family_model(family, tie_word_embeddings=tied, **TWO_BLOCKS)
    plain.save_pretrained(tmp_path / "base")
    model = adapt(deepcopy(plain), carrier=carrier, **LOW_RANK)
    expected = logits(model)
    merged = model.merge_and_unload()
    assert type(merged) is type(plain)
    merged.save_pretrained(tmp_path / "merged")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not any("san" in type(module).__module__ for module in stock.modules())
    base, again = (load_names(tmp_path / folder) for folder in ("base", "merged"))
    assert again == base
    assert relative(logits(stock), expected) < 2e-5
    assert relative(logits(plain), expected) > 1e-2


@new_families
def test_a_scaled_embedding_that_was_tied_leaves_the_head_as_it_is(family, tmp_path):
    plain = family_model(family, tie_word_embeddings=True, **TWO_BLOCKS)
    model = adapt(deepcopy(plain), adapt_embedding=True)
    expected = logits(model)
    model.merge_and_unload().save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(stock.lm_head.weight, plain.lm_head.weight)
    assert relative(logits(stock), expected) < 2e-5


def load_names(folder: Path) -> dict[str, tuple[int, ...]]:
    return {n: tuple(v.shape) for n, v in load_file(folder / "model.safetensors").items()}


@new_families
def test_merged_weights_are_the_dense_ones(family):
    plain = family_model(family, torch.float64, **TWO_BLOCKS)
    model = adapt(deepcopy(plain), adapt_embedding=True)
    gammas, betas = vectors(model)
    dense = dense_model(
        plain, gammas, betas, targets=projections(family), adapt_embedding=True
    ).state_dict()
    merged = model.merge_and_unload().state_dict()
    for name in (n for n in dense if "_proj" in n or "embed_tokens.weight" in n):
        assert relative(merged[name], dense[name]) < 1e-14, name


@pytest.mark.holds("files")
@every_family
def test_the_adapter_comes_back_from_its_files(family, tmp_path):
    model = adapt(family_model(family, **TWO_BLOCKS))
    assert model.peft_config["default"].target_modules == list(projections(family))
    model.save_pretrained(tmp_path)
    config = SanConfig.from_pretrained(tmp_path)
    assert config.target_modules == list(projections(family))
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert len(stored) == 2 * len(projections(family))
    assert sum(v.numel() for v in stored.values()) == propagation_graph(model).trained
    again = PeftModel.from_pretrained(family_model(family, **TWO_BLOCKS), tmp_path)
    assert torch.equal(logits(again), logits(model))


@new_families
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 1}, {"intermediate_size": 40}])
def test_the_graph_has_the_shapes_of_the_real_model(family, changes):
    plain = family_model(family, **changes)
    linears = {
        name: tuple(module.weight.shape)
        for name, module in plain.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    for config in (plain.config, plain.config.to_dict()):
        found = propagation_graph(config)
        assert {node.name: (node.d_out, node.d_in) for node in found} == linears
        for node in found:
            if node.carry is not None:
                assert (node.carry.stop - node.carry.start) * node.carry.groups == node.d_in
    assert propagation_graph(adapt(plain)).trained == sum(d_out for d_out, _ in linears.values())


# Rows of each Linear of a block, from the models' own pages.
REAL = [
    (Qwen3Config(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
                 num_attention_heads=16, num_key_value_heads=8, head_dim=128),
     28 * (2048 + 2 * 1024 + 1024 + 2 * 3072 + 1024)),  # 0.6B
    (GemmaConfig(hidden_size=2048, intermediate_size=16384, num_hidden_layers=18,
                 num_attention_heads=8, num_key_value_heads=1, head_dim=256),
     18 * (2048 + 2 * 256 + 2048 + 2 * 16384 + 2048)),  # 2B
    (Gemma2Config(), 26 * (2048 + 2 * 1024 + 2304 + 2 * 9216 + 2304)),  # 2B
    (Gemma3TextConfig(hidden_size=1152, intermediate_size=6912, num_hidden_layers=26,
                      num_attention_heads=4, num_key_value_heads=1, head_dim=256),
     26 * (1024 + 2 * 256 + 1152 + 2 * 6912 + 1152)),  # 1B
    (Phi3Config(), 32 * (3 * 3072 + 3072 + 2 * 8192 + 3072)),  # mini
]  # fmt: skip


@pytest.mark.parametrize(("config", "trained"), REAL, ids=NEW)
def test_a_real_model_trains_as_many_numbers_as_its_linears_have_rows(config, trained):
    assert propagation_graph(config).trained == trained
    with torch.device("meta"):
        model = get_peft_model(AutoModelForCausalLM.from_config(config), SanConfig())
    assert model.get_nb_trainable_parameters()[0] == trained


@every_family
def test_generation_with_a_cache_is_that_of_the_merged_model(family):
    model = adapt(family_model(family, torch.float64, **TWO_BLOCKS))
    how = {"max_new_tokens": 8, "do_sample": False, "num_beams": 2, "pad_token_id": 2}
    found = model.generate(input_ids=text(), **how)
    merged = deepcopy(model).merge_and_unload()
    assert torch.equal(found, merged.generate(input_ids=text(), **how))


@new_families
def test_a_shift_that_no_stock_model_can_hold_is_not_merged(family):
    with pytest.warns(UserWarning, match="never merge"):
        model = adapt(family_model(family, **TWO_BLOCKS), shift=True)
    with pytest.raises(InputError, match=f"a stock {family} cannot hold"):
        model.merge_and_unload()


@new_families
def test_adapters_switch_off_and_go_without_a_trace(family):
    base = family_model(family, **TWO_BLOCKS)
    expected = logits(base)
    model = adapt(base)
    assert not torch.allclose(logits(model), expected, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    base = model.unload()
    assert torch.equal(logits(base), expected)
    assert not any(hasattr(module, "san_fold") for module in base.modules())


# --- Gemma: GELU, and norms of 1 + weight ------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
def test_geglu_and_the_norm_that_rounds_once_pass_gradcheck(shape):
    generator = torch.Generator().manual_seed(0)

    def numbers(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_()

    x, y, g, c = numbers(*shape), numbers(*shape), numbers(shape[-1]), numbers(shape[-1])
    check = torch.autograd.gradcheck
    assert check(lambda a, b: ScaledNorm.apply(a, b, 1e-5, True), (x, g))
    assert check(lambda *a: ScaledSwiGLU.apply(*a, True), (x, y, g, c))
    assert check(lambda a, b: ScaledSwiGLU.apply(a, b, None, None, True), (x, y))
    # The halves of one tensor, as a fused Linear gives them.
    assert check(lambda xy, g, c: ScaledSwiGLU.apply(*xy.chunk(2, -1), g, c), (
        numbers(*shape[:-1], 8), g, c))  # fmt: skip


@pytest.mark.parametrize("activation", ["gelu", "gelu_python_tanh"])
def test_a_gelu_computed_otherwise_keeps_the_mlps_own_forward(activation):
    base = family_model("gemma2", hidden_activation=activation, **TWO_BLOCKS)
    expected = logits(base)
    model = get_peft_model(base, SanConfig())
    assert torch.equal(logits(model), expected)
    assert not hasattr(base.model.layers[0].mlp, "san_fold")
    plain, lean = (
        adapt(family_model("gemma2", hidden_activation=activation, **TWO_BLOCKS), form=form)
        for form in ("plain", "lean")
    )
    assert_same(plain, lean, torch.float32)


def test_a_norm_of_another_make_in_a_gemma_is_left_alone():
    def patched(form: str) -> Any:
        model = family_model("gemma2", **TWO_BLOCKS)
        for block in model.model.layers:
            block.input_layernorm = nn.RMSNorm(32, eps=1e-6)  # which multiplies by its weight
        return adapt(model, form=form)

    assert_same(patched("plain"), patched("lean"), torch.float32)


# --- Phi-3: several projections in one Linear --------------------------------------------------


def test_the_seven_names_mean_the_linears_that_compute_them():
    model = get_peft_model(family_model("phi3"), SanConfig(target_modules=list(SEVEN)))
    assert model.peft_config["default"].target_modules == list(FOUR)
    adapted = {module_name(block, name) for block in range(4) for name in FOUR}
    assert set(vectors(model)[0]) == adapted
    config = SanConfig(target_modules=["up_proj", "gate_proj", "o_proj"])
    names = {node.name.rsplit(".", 1)[-1] for node in propagation_graph(Phi3Config(), config)}
    assert names == {"gate_up_proj", "o_proj"}


@pytest.mark.parametrize(
    "method", [SanMethod(name="san"), LoraMethod(name="lora"), DoraMethod(name="dora")]
)
def test_a_recipe_that_names_no_targets_adapts_all_linears_whatever_the_method(method):
    model = add_adapter(family_model("phi3"), method)
    base = "base_model.model."
    adapted = {
        name.removeprefix(base).partition(".san_")[0].partition(".lora_")[0]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert adapted == {module_name(block, name) for block in range(4) for name in FOUR}


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["q_proj", "v_proj"], r"'q_proj' is a part of 'qkv_proj' in a phi3 model: name that"),
        (["o_proj", "up_proj"], r"'up_proj' is a part of 'gate_up_proj' in a phi3 model"),
        (["qkv_porj"], r"'qkv_porj' is not one of .*did you mean 'qkv_proj'"),
        (["gate_up_porj"], r"'gate_up_porj' is not one of .*did you mean 'gate_up_proj'"),
    ],
)
def test_a_part_of_a_linear_and_a_misspelt_one_are_refused(targets, said):
    with pytest.raises(InputError, match=said):
        get_peft_model(family_model("phi3"), SanConfig(target_modules=targets))
    with pytest.raises(InputError, match=said):
        propagation_graph(Phi3Config(), SanConfig(target_modules=targets))


def test_a_fused_name_is_refused_where_there_is_no_such_linear():
    with pytest.raises(InputError, match="'qkv_proj' matches no module"):
        get_peft_model(family_model("llama"), SanConfig(target_modules=["qkv_proj", "o_proj"]))


def test_all_linear_is_the_familys_own_list(tmp_path):
    model = get_peft_model(family_model("phi3"), SanConfig(target_modules="all-linear"))
    assert model.peft_config["default"].target_modules == list(FOUR)


def test_only_the_rows_of_v_and_of_up_are_propagated():
    model = adapt(family_model("phi3", torch.float64, **TWO_BLOCKS), mode="synapse")
    gammas, _ = vectors(model)
    gradients = torch.autograd.grad(model(input_ids=text()).logits.sum(), list(gammas.values()))
    by_name = dict(zip(gammas, gradients, strict=True))
    qkv = by_name[module_name(0, "qkv_proj")]  # 32 rows of q, 16 of k, 16 of v
    assert (qkv[:48] == 0).all()
    assert (qkv[48:] != 0).all()
    gate_up = by_name[module_name(0, "gate_up_proj")]  # 48 of each
    assert (gate_up[:48] == 0).all()
    assert (gate_up[48:] != 0).all()
