"""The tuner against the dense reference, and everything PEFT lets a person do with an adapter."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from copy import deepcopy
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from itertools import permutations, product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from reference import ALL_LINKS, SEVEN, dense_logits, dense_model, module_name
from safetensors import safe_open
from safetensors.torch import load_file
from san.adapted import adapt, family_model, logits, relative, shake, text, vectors
from tiny import tiny_config, tiny_model
from transformers import (
    AutoModelForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    Siglip2Config,
    Siglip2Model,
)

from san_llm import SanConfig, propagation_graph
from san_llm.errors import InputError, SanError
from san_llm.san import register
from san_llm.san.merging import bias_dtype, hold_biases
from san_llm.san.options import CARRIERS

pytestmark = pytest.mark.filterwarnings("ignore:shift=True:UserWarning")

LIKE_LLAMA = ("llama", "mistral", "qwen2")
HEADS = {"MHA": (4, 4), "GQA": (4, 2), "MQA": (4, 1)}
OPTIONS = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(["both", "neuron", "synapse"]),
        "links": st.lists(st.sampled_from(ALL_LINKS), unique=True).map(tuple),
        "adapt_embedding": st.booleans(),
        "form": st.sampled_from(["lean", "plain"]),
    }
)


def split(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options as the reference names them."""
    return {
        "targets": tuple(options["target_modules"]),
        **{key: options[key] for key in ("mode", "links", "adapt_embedding")},
    }


def trains_something(options: dict[str, Any], shift: bool) -> bool:
    """Whether synapse mode, where a gamma acts only through a link, has anything to train."""
    if options["mode"] != "synapse":
        return True
    links, targets = options["links"], options["target_modules"]
    linked = (
        ("attention" in links and {"v_proj", "o_proj"} <= set(targets))
        or ("mlp" in links and {"up_proj", "down_proj"} <= set(targets))
        or ("residual" in links and "o_proj" in targets and {"gate_proj", "up_proj"} & set(targets))
        or (
            "residual" in links
            and {"q_proj", "k_proj", "v_proj"} & set(targets)
            and ("down_proj" in targets or options["adapt_embedding"])
        )
    )
    return bool(links) and (linked or shift)


@pytest.mark.holds("dense", families=LIKE_LLAMA)
@settings(max_examples=150, deadline=None)
@given(
    family=st.sampled_from(LIKE_LLAMA),
    heads=st.sampled_from(sorted(HEADS)),
    head_dim=st.sampled_from([None, 4]),
    biases=st.booleans(),
    tied=st.booleans(),
    shift=st.booleans(),
    targets=st.lists(st.sampled_from(SEVEN), min_size=1, unique=True),
    options=OPTIONS,
    seed=st.integers(0, 2**16),
)
def test_logits_and_gradients_equal_the_dense_reference(
    family, heads, head_dim, biases, tied, shift, targets, options, seed
):
    options = options | {"target_modules": targets}
    assume(trains_something(options, shift))
    changes: dict[str, Any] = {
        "num_hidden_layers": 3,
        "num_attention_heads": HEADS[heads][0],
        "num_key_value_heads": HEADS[heads][1],
        "tie_word_embeddings": tied,
    }
    if family == "llama" and biases:
        changes |= {"attention_bias": True, "mlp_bias": True}
    if head_dim is not None and family != "qwen2":
        changes["head_dim"] = head_dim
    plain = family_model(family, torch.float64, seed, **changes)
    model = adapt(deepcopy(plain), seed + 1, shift=shift, **options)
    gammas, betas = vectors(model)
    found = model(input_ids=text()).logits
    expected = dense_logits(plain, text(), gammas, betas, **split(options))
    assert relative(found, expected) < 1e-12
    trained = [*gammas.values(), *betas.values()]
    assert trained
    weights = torch.randn(found.shape, dtype=found.dtype)
    mine = torch.autograd.grad((found * weights).sum(), trained, allow_unused=True)
    theirs = torch.autograd.grad((expected * weights).sum(), trained, allow_unused=True)
    for name, one, other in zip([*gammas, *betas], mine, theirs, strict=True):
        assert one is not None, f"{name} gets no gradient"
        # relative to the largest of all: a small gradient carries the rounding of large ones
        assert (one - other).abs().max() < 1e-11 * max(g.abs().max() for g in theirs), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"shift": True}, {"mode": "neuron"}, {"mode": "synapse"}])
def test_a_merged_weight_is_the_reference_rounded_once(dtype, options):
    plain = tiny_model(dtype=dtype)
    model = adapt(deepcopy(plain), adapt_embedding=True, **options)
    reference = dense_model(
        deepcopy(plain).float(),
        *vectors(model),
        adapt_embedding=True,
        mode=options.get("mode", "both"),
    ).to(dtype)
    merged = model.merge_and_unload()
    assert type(merged) is type(plain)
    assert set(merged.state_dict()) == set(reference.state_dict())
    for name, weight in reference.state_dict().items():
        assert merged.state_dict()[name].dtype == dtype
        assert torch.equal(merged.state_dict()[name], weight), name


@pytest.mark.parametrize("bias", [False, True])
def test_a_merged_shift_loads_in_stock_transformers(tmp_path, bias):
    plain = tiny_model(attention_bias=bias)
    model = adapt(deepcopy(plain), shift=True, target_modules=["q_proj", "up_proj"])
    before = logits(model)
    model.merge_and_unload().save_pretrained(tmp_path)
    stock, problems = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(problems.values())
    assert stock.config.attention_bias
    assert stock.config.mlp_bias
    assert relative(logits(stock), before) < 1e-5


def test_a_merged_bias_has_the_dtype_of_the_old_one_or_else_of_the_arithmetic():
    base, codes = torch.nn.Linear(2, 2).half(), torch.zeros(2, 2, dtype=torch.int8)
    weight = torch.zeros(2, 2, dtype=torch.bfloat16)
    assert bias_dtype(base, weight) == torch.float16
    base.bias = None
    assert bias_dtype(base, weight) == torch.bfloat16
    assert bias_dtype(base, codes) == torch.float32  # 8 bits
    base.compute_dtype = None  # 4 bits, not computed with yet
    assert bias_dtype(base, codes) == torch.float32
    base.compute_dtype = torch.float16
    assert bias_dtype(base, codes) == torch.float16


def test_biases_are_held_by_all_linears_of_a_parent_or_by_none():
    model = tiny_model(num_hidden_layers=2, dtype=torch.bfloat16)
    first, second = (layer.self_attn for layer in model.model.layers)
    own = torch.nn.Parameter(torch.ones(32, dtype=torch.float32))
    first.q_proj.bias = own
    codes = torch.zeros(16, 16, dtype=torch.uint8)  # as 4 bits are stored
    second.k_proj.weight = torch.nn.Parameter(codes, requires_grad=False)
    second.o_proj.to("meta")  # stands for another device
    hold_biases(model)
    assert (model.config.attention_bias, model.config.mlp_bias) == (True, False)
    assert first.q_proj.bias is own
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or module is first.q_proj:
            continue
        if ".self_attn." not in name:
            assert module.bias is None
            continue
        assert module.bias.device == module.weight.device
        if module is not second.o_proj:
            assert module.bias.tolist() == [0] * module.out_features
        assert not module.bias.requires_grad
        assert module.bias.dtype == (torch.float32 if module is second.k_proj else torch.bfloat16)
    hold_biases(plain := tiny_model(num_hidden_layers=1))
    assert not any(name.endswith("bias") for name in plain.state_dict())
    assert not plain.config.attention_bias


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_family_that_cannot_hold_a_shift_says_so_first_and_refuses_the_merge(family):
    plain = family_model(family)
    with pytest.warns(UserWarning, match="will never merge"):
        model = get_peft_model(plain, SanConfig(shift=True))
    shake(model)
    before = logits(model)
    with pytest.raises(InputError, match=f"stock {family} cannot hold the biases"):
        model.merge_and_unload()
    assert torch.equal(logits(model), before)  # refused before anything was changed


def test_a_tied_head_is_untouched_by_a_scaled_embedding_and_untied_by_the_merge(tmp_path):
    plain = tiny_model(tie_word_embeddings=True)
    head = plain.lm_head.weight.detach().clone()
    model = adapt(deepcopy(plain), adapt_embedding=True)
    reference = dense_model(plain, *vectors(model), adapt_embedding=True)
    before = logits(model)
    assert relative(before, logits(reference)) < 1e-5
    with pytest.warns(UserWarning, match="no longer tied"):
        merged = model.merge_and_unload()
    assert torch.equal(merged.lm_head.weight, head)
    merged.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(stock.lm_head.weight, head)
    assert torch.equal(stock.model.embed_tokens.weight, reference.model.embed_tokens.weight)
    assert relative(logits(stock), before) < 1e-5


def test_a_tied_model_stays_tied_when_the_embedding_is_not_adapted(tmp_path):
    merged = adapt(tiny_model(tie_word_embeddings=True)).merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    merged.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert stock.config.tie_word_embeddings
    assert torch.equal(logits(stock), logits(merged))


# --- saving and loading ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, torch.Tensor]:
    """A saved base, a saved adapter that uses every option, and the logits of both together."""
    root = tmp_path_factory.mktemp("saved")
    tiny_model().save_pretrained(root / "base")
    base = AutoModelForCausalLM.from_pretrained(root / "base")
    model = adapt(base, shift=True, adapt_embedding=True, links=["mlp", "residual"])
    model.save_pretrained(root / "adapter")
    return root / "base", root / "adapter", logits(model)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_an_adapter_loads_bit_for_bit(saved, low_cpu_mem_usage, is_trainable):
    base, adapter, expected = saved
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base),
        adapter,
        is_trainable=is_trainable,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    assert torch.equal(logits(model), expected)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".san_" in name for name in trained)
    assert bool(trained) == is_trainable


def test_the_auto_class_loads_bit_for_bit(saved):
    _, adapter, expected = saved
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(adapter)), expected)


def test_transformers_own_load_adapter_loads_bit_for_bit(saved):
    base, adapter, expected = saved
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(str(adapter))
    assert torch.equal(logits(model), expected)
    assert model.active_adapters() == ["default"]


def test_transformers_finds_the_base_of_an_adapters_folder(saved):
    _, adapter, expected = saved
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(adapter)), expected)


def test_transformers_own_adapter_methods_work(saved, tmp_path):
    base, adapter, expected = saved
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(str(adapter), "first")
    assert propagation_graph(model).trained == sum(
        value.numel() for value in load_file(adapter / "adapter_model.safetensors").values()
    )
    model.add_adapter(SanConfig(target_modules=["q_proj"]), "second")
    shake(model, 4, "second")
    model.set_adapter("second")
    second = logits(adapt(AutoModelForCausalLM.from_pretrained(base), 4, target_modules=["q_proj"]))
    assert torch.equal(logits(model), second)
    model.set_adapter("first")
    assert torch.equal(logits(model), expected)
    model.disable_adapters()
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(base)))
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path)), expected)
    model.delete_adapter("second")
    assert torch.equal(logits(model), expected)


def test_peft_reports_its_state():
    model = two_adapters()
    status = model.get_model_status()
    assert status.available_adapters == ["one", "two"]
    assert status.trainable_params == model.get_nb_trainable_parameters()[0]
    assert {layer.module_type for layer in model.get_layer_status()} == {"san.SanLinear"}


def test_loading_beside_another_adapter_is_bit_for_bit(saved):
    base, adapter, expected = saved
    model = adapt(AutoModelForCausalLM.from_pretrained(base), target_modules=["q_proj"])
    first = logits(model)
    model.load_adapter(adapter, "second", low_cpu_mem_usage=True)
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shift": True},
        {"mode": "synapse"},
        {"mode": "neuron"},
        {"adapt_embedding": True},
        {"target_modules": ["v_proj", "o_proj"]},
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_the_file_holds_each_trained_vector_once_and_nothing_else(tmp_path, options, tied):
    model = adapt(tiny_model(tie_word_embeddings=tied), **options)
    model.save_pretrained(tmp_path)
    gammas, betas = vectors(model)
    expected = {f"base_model.model.{name}.san_gamma": value for name, value in gammas.items()}
    expected |= {f"base_model.model.{name}.san_beta": value for name, value in betas.items()}
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value)
    trained, _ = model.get_nb_trainable_parameters()
    assert sum(value.numel() for value in found.values()) == trained


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("carrier", ["scale", "dora"])
def test_scales_are_saved_and_loaded_in_fp32_over_a_bf16_base(tmp_path, low_cpu_mem_usage, carrier):
    model = adapt(tiny_model(dtype=torch.bfloat16), carrier=carrier)
    before = logits(model)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float32}  # noqa: SIM118
    again = PeftModel.from_pretrained(
        tiny_model(dtype=torch.bfloat16), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(logits(again), before)
    again.load_adapter(tmp_path, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    again.set_adapter("second")
    assert torch.equal(logits(again), before)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"intermediate_size": 64}, r"gate_proj\.san_.* has shape \[48\].* needs \[64\]"),
        ({"num_key_value_heads": 4}, r"k_proj\.san_.* has shape \[16\].* needs \[32\]"),
        ({"num_hidden_layers": 3}, r"nothing here takes .*layers\.3\."),
        ({"num_hidden_layers": 6}, r"it has no .*layers\.4\."),
    ],
    ids=["width", "kv heads", "fewer blocks", "more blocks"],
)
def test_an_adapter_of_another_base_is_refused(saved, changes, said):
    _, adapter, _ = saved
    with pytest.raises(InputError, match="trained on another base: .*" + said):
        PeftModel.from_pretrained(tiny_model(**changes), adapter)


def test_a_state_without_vectors_still_loads_into_an_adapted_model():
    model = adapt(tiny_model(seed=1), target_modules=["q_proj"])
    base = {
        name: value
        for name, value in adapt(tiny_model(), target_modules=["q_proj"]).state_dict().items()
        if ".san_" not in name
    }
    model.load_state_dict(base, strict=False)
    assert torch.equal(logits(model), logits(adapt(tiny_model(), target_modules=["q_proj"])))


# --- several adapters --------------------------------------------------------------------------

SECOND = {"shift": True, "target_modules": ["v_proj", "o_proj", "down_proj"], "mode": "synapse"}


def two_adapters() -> Any:
    model = adapt(tiny_model(), adapter="one")
    model.add_adapter("two", SanConfig(**SECOND))
    return shake(model, 2, "two")


def alone(name: str) -> torch.Tensor:
    if name == "one":
        return logits(adapt(tiny_model()))
    return logits(adapt(tiny_model(), 2, **SECOND))


def test_each_named_adapter_acts_as_if_it_were_alone():
    model = two_adapters()
    assert torch.equal(logits(model), alone("one"))
    model.set_adapter("two")
    assert torch.equal(logits(model), alone("two"))
    model.set_adapter("one")
    assert torch.equal(logits(model), alone("one"))
    assert not torch.equal(alone("one"), alone("two"))


def test_only_the_active_adapter_trains():
    model = two_adapters()
    for active in ("one", "two", "one"):
        model.set_adapter(active)
        trained = {n for n, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained
        assert all(name.endswith(f".{active}") for name in trained)


def test_a_new_adapter_does_not_change_what_trains():
    model = adapt(tiny_model(), adapter="one")
    before = {n for n, parameter in model.named_parameters() if parameter.requires_grad}
    model.add_adapter("two", SanConfig(shift=True))
    assert {n for n, parameter in model.named_parameters() if parameter.requires_grad} == before


def test_two_active_adapters_multiply_in_order():
    plain = tiny_model(dtype=torch.float64)
    model = two_adapters()
    model.base_model.set_adapter(["one", "two"])
    found = logits(model)
    once = dense_model(plain, *double(vectors(model, "one")))
    twice = dense_model(
        once,
        *double(vectors(model, "two")),
        mode="synapse",
        targets=tuple(SECOND["target_modules"]),
    )
    assert relative(found.double(), logits(twice)) < 1e-5
    merged = model.merge_and_unload(adapter_names=["one", "two"])
    assert relative(logits(merged), found) < 1e-5


TWO = st.fixed_dictionaries(
    {
        "target_modules": st.lists(st.sampled_from(SEVEN), min_size=1, unique=True),
        "shift": st.booleans(),
        "mode": st.sampled_from(["both", "neuron", "synapse"]),
        "links": st.lists(st.sampled_from(ALL_LINKS), unique=True).map(tuple),
        "adapt_embedding": st.booleans(),
        "form": st.sampled_from(["lean", "plain"]),
    }
)


@settings(max_examples=80, deadline=None)
@given(first=TWO, second=TWO, order=st.permutations(["one", "two"]), merge=st.booleans())
def test_any_two_adapters_act_alone_and_together(first, second, order, merge):
    assume(trains_something(first, first["shift"]) and trains_something(second, second["shift"]))
    plain = family_model(dtype=torch.float64, num_hidden_layers=2)
    model = get_peft_model(deepcopy(plain), SanConfig(**first), "one")
    model.add_adapter("two", SanConfig(**second))
    shake(model, 1, "one")
    shake(model, 2, "two")
    references = {}
    for name, options in (("one", first), ("two", second)):
        model.set_adapter(name)
        references[name] = (vectors(model, name), split(options))
        pair, how = references[name]
        assert relative(logits(model), logits(dense_model(plain, *pair, **how))) < 1e-12
    model.base_model.set_adapter(order)
    together = plain
    for name in order:
        pair, how = references[name]
        together = dense_model(together, *pair, **how)
    # Where both scale a Linear's features and shift them, the order counts, as it does here.
    expected = logits(together)
    assert relative(logits(model), expected) < 1e-12
    if merge:
        merged = model.merge_and_unload()
        assert relative(logits(merged), expected) < 1e-12


@pytest.mark.parametrize("form", ["lean", "plain"])
@pytest.mark.parametrize("modes", [("both", "both"), ("both", "synapse"), ("neuron", "both")])
@pytest.mark.parametrize(("first", "second"), product(CARRIERS, repeat=2))
def test_any_two_carriers_together_answer_as_they_merge(first, second, modes, form):
    plain = family_model(
        dtype=torch.float64, num_hidden_layers=2, attention_bias=True, mlp_bias=True
    )
    model = plain
    for number, (carrier, mode) in enumerate(zip((first, second), modes, strict=True)):
        options = {"mode": mode, "form": form, "adapt_embedding": bool(number)}
        low_rank = {"shift": True} if carrier == "scale" else {"r": 3, "lora_alpha": 2}
        config = SanConfig(carrier=carrier, **options, **low_rank)
        if number:
            model.add_adapter(str(number), config)
        else:
            model = get_peft_model(plain, config, "0")
        shake(model, number, str(number))
    for order in (["0", "1"], ["1", "0"]):  # shifts and products know which comes first
        model.base_model.set_adapter(order)
        expected = logits(model)
        model.merge_adapter(order)
        assert relative(logits(model), expected) < 1e-12
        model.unmerge_adapter()
        assert torch.equal(logits(model), expected)


def double(pair: tuple[dict[str, torch.Tensor], ...]) -> list[dict[str, torch.Tensor]]:
    return [{name: value.double() for name, value in part.items()} for part in pair]


def test_a_deleted_adapter_leaves_no_vector_and_the_other_one_intact():
    model = two_adapters()
    model.delete_adapter("two")
    assert torch.equal(logits(model), alone("one"))
    assert not [name for name, _ in model.named_parameters() if name.endswith(".two")]
    model.add_adapter("two", SanConfig(**SECOND))  # the name is free again
    shake(model, 2, "two").set_adapter("two")
    assert torch.equal(logits(model), alone("two"))


def test_deleting_the_active_adapter_activates_the_other_one():
    model = adapt(tiny_model(), adapter="one")
    model.add_adapter("two", SanConfig(mode="synapse"))
    shake(model, 2, "two")
    with pytest.warns(UserWarning, match="Setting active adapter to two"):
        model.delete_adapter("one")
    assert torch.equal(logits(model), logits(adapt(tiny_model(), 2, mode="synapse")))


def test_an_adapter_name_is_saved_in_a_folder_of_its_own(tmp_path):
    two_adapters().save_pretrained(tmp_path)
    for name in ("one", "two"):
        loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / name)
        assert torch.equal(logits(loaded), alone(name))


# --- switching off, copying, merging in place --------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_disabled_adapter_is_the_base_bit_for_bit(dtype):
    expected = logits(tiny_model(dtype=dtype))
    model = adapt(tiny_model(dtype=dtype), shift=True, adapt_embedding=True)
    before = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), before)
    assert not torch.equal(before, expected)


def test_a_copy_is_independent_and_reads_its_own_scales():
    model = adapt(tiny_model())
    before = logits(model)
    copy = deepcopy(model)
    shake(model, 5)
    assert torch.equal(logits(copy), before)
    shake(copy, 5)
    assert torch.equal(logits(copy), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_unmerging_restores_every_bit(dtype, tied):
    model = adapt(
        tiny_model(dtype=dtype, tie_word_embeddings=tied), shift=True, adapt_embedding=True
    )
    before, state = logits(model), deepcopy(model.state_dict())
    model.merge_adapter()
    merged = logits(model)
    # half precision rounds W' once; 4 blocks of rounding differences are some percent
    assert relative(merged, before) < (1e-5 if dtype == torch.float32 else 0.1)
    assert not torch.equal(
        model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight,
        state["base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"],
    )
    model.unmerge_adapter()
    after = model.state_dict()
    assert set(after) == set(state)
    assert all(torch.equal(after[name], value) for name, value in state.items())
    assert torch.equal(logits(model), before)


def test_merging_one_by_one_and_unmerging_restores_every_bit():
    model = two_adapters()
    state = deepcopy(model.state_dict())
    model.merge_adapter(["one"])
    assert relative(logits(model), alone("one")) < 1e-5
    model.merge_adapter(["two"])
    both = logits(model)
    model.unmerge_adapter()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    model.base_model.set_adapter(["one", "two"])
    assert relative(logits(model), both) < 1e-5


@pytest.mark.parametrize("carrier", ["lora", "dora"])
def test_a_low_rank_adapter_added_while_another_is_merged_starts_at_the_base(carrier):
    model = adapt(tiny_model())
    model.merge_adapter()
    model.add_adapter("two", SanConfig(carrier=carrier))
    model.unmerge_adapter()
    model.set_adapter("two")
    assert relative(logits(model), logits(tiny_model())) < 1e-5


def test_disabling_a_merged_adapter_gives_the_base_bit_for_bit():
    model = adapt(tiny_model())
    before = logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_model()))
    assert relative(logits(model), before) < 1e-5


@pytest.mark.parametrize("merge_first", [False, True])
def test_unloading_gives_back_the_base_bit_for_bit(merge_first):
    plain = tiny_model()
    model = adapt(deepcopy(plain), shift=True, adapt_embedding=True)
    if merge_first:
        model.merge_adapter()
    base = model.unload()
    assert set(base.state_dict()) == set(plain.state_dict())
    assert all(torch.equal(base.state_dict()[k], v) for k, v in plain.state_dict().items())


def test_merging_in_place_before_unloading_changes_nothing():
    model = adapt(tiny_model())
    twin = deepcopy(model)
    model.merge_adapter()
    one, other = model.merge_and_unload().state_dict(), twin.merge_and_unload().state_dict()
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_safe_merge_refuses_numbers_that_are_not_finite():
    model = adapt(tiny_model())
    gammas, _ = vectors(model)
    gammas[module_name(2, "up_proj")].data[3] = float("inf")
    with pytest.raises(SanError, match="not finite"):
        model.merge_and_unload(safe_merge=True)


def test_a_merge_never_changes_a_tensor_that_someone_else_holds():
    plain = tiny_model()
    held = dict(plain.named_parameters())
    values = {name: value.detach().clone() for name, value in held.items()}
    adapt(plain, shift=True, adapt_embedding=True).merge_and_unload()
    assert all(torch.equal(held[name], value) for name, value in values.items())


# --- what it says and what it refuses ----------------------------------------------------------


def test_trainable_parameters_are_counted_once(capsys):
    model = get_peft_model(tiny_model(), SanConfig())
    model.print_trainable_parameters()
    hidden, kv, inter, blocks = 32, 16, 48, 4
    trained = blocks * (3 * hidden + 2 * kv + 2 * inter)  # q, o, down; k, v; gate, up
    assert f"trainable params: {trained:,} ||" in capsys.readouterr().out


@pytest.mark.parametrize("targets", [None, r".*q_proj", "all-linear"])
def test_a_model_that_cannot_be_measured_is_refused_and_left_as_it_was(targets):
    width = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    pair = Siglip2Model(Siglip2Config(text_config=width, vision_config=width))
    names = [name for name, _ in pair.named_modules()]
    with pytest.raises(InputError, match="'siglip2': no small copy of it can be made"):
        get_peft_model(pair, SanConfig(target_modules=targets))
    assert [name for name, _ in pair.named_modules()] == names


def test_every_linear_can_be_asked_for_by_one_word():
    everything = get_peft_model(tiny_model(), SanConfig(target_modules="all-linear"))
    seven = get_peft_model(tiny_model(), SanConfig())
    assert set(vectors(everything)[0]) == set(vectors(seven)[0])
    assert torch.equal(logits(shake(everything)), logits(shake(seven)))


def test_a_regular_expression_picks_blocks(tmp_path):
    expression = r"model\.layers\.[12]\..*(v_proj|o_proj)"
    model = adapt(tiny_model(), target_modules=expression)
    assert set(vectors(model)[0]) == {
        module_name(block, projection) for block in (1, 2) for projection in ("v_proj", "o_proj")
    }
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), logits(model))


def test_full_names_pick_single_modules():
    names = [module_name(1, "v_proj"), module_name(1, "o_proj"), module_name(3, "v_proj")]
    assert set(vectors(adapt(tiny_model(), target_modules=names))[0]) == set(names)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["model.layers.9.self_attn.q_proj"], "matches no module"),
        (["mlp.q_proj"], "matches no module"),
        (r".*nowhere", "matches no module"),
        (r".*(q_proj|lm_head)", "lm_head"),
        (r".*(q_proj|embed_tokens)", "embed_tokens"),
        ("q_proj", r"write \['q_proj'\]"),
        (r".*(q_proj", "not a regular expression"),
    ],
)
def test_a_target_that_cannot_be_adapted_is_refused_before_anything_changes(targets, said):
    plain = tiny_model()
    names = [name for name, _ in plain.named_modules()]
    with pytest.raises(InputError, match=said):
        get_peft_model(plain, SanConfig(target_modules=targets))
    assert [name for name, _ in plain.named_modules()] == names


def test_synapse_mode_without_a_link_between_targets_is_refused():
    with pytest.raises(InputError, match="trains nothing"):
        get_peft_model(tiny_model(), SanConfig(mode="synapse", target_modules=["q_proj"]))


def test_modules_to_save_train_and_come_back_bit_for_bit(tmp_path):
    model = adapt(tiny_model(), modules_to_save=["lm_head"])
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    assert head.requires_grad
    head.data.mul_(2)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert relative(logits(model.merge_and_unload()), logits(again)) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["q_proj"]},
        {"modules_to_save": ["embed_tokens"], "adapt_embedding": True},
    ],
)
def test_a_module_cannot_be_scaled_and_saved_whole_at_once(options):
    with pytest.raises(InputError, match="modules_to_save"):
        SanConfig(**options)


@pytest.mark.parametrize("norm", ["input_layernorm", "post_attention_layernorm", "norm"])
def test_norms_may_train_beside_the_scales(norm, tmp_path):
    outputs = []
    for form in ("lean", "plain"):
        model = adapt(tiny_model(), form=form, modules_to_save=[norm])
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                assert parameter.requires_grad
                parameter.data.mul_(1.5)
        model(input_ids=text()).logits.pow(2).sum().backward()
        trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        outputs.append((logits(model), trained))
        model.save_pretrained(tmp_path / form)
        again = PeftModel.from_pretrained(tiny_model(), tmp_path / form)
        assert torch.equal(logits(again), logits(model))
        assert relative(logits(model.merge_and_unload()), logits(again)) < 1e-5
    (lean, lean_gradients), (plain, plain_gradients) = outputs
    assert relative(lean, plain) < 1e-5
    for name, gradient in plain_gradients.items():
        assert gradient is not None, name
        assert lean_gradients[name] is not None, name
        assert relative(lean_gradients[name], gradient) < 1e-3, name


def test_norms_may_train_in_a_second_adapter():
    outputs = []
    for form in ("lean", "plain"):
        model = adapt(tiny_model(), adapter="one", form=form)
        saved = ["input_layernorm", "post_attention_layernorm"]
        model.add_adapter("two", SanConfig(form=form, modules_to_save=saved))
        model.set_adapter("two")
        shake(model, 2, "two")
        for name, parameter in model.named_parameters():
            if name.endswith(".modules_to_save.two.weight"):
                parameter.data.mul_(1.5)
        two = logits(model)
        model.set_adapter("one")
        assert torch.equal(logits(model), logits(adapt(tiny_model(), form=form)))
        outputs.append(two)
        wrapper = model.base_model.model.model.layers[1].input_layernorm
        assert not hasattr(wrapper.modules_to_save["two"], "san_fold")  # it would copy its readers
    assert relative(*outputs) < 1e-5


def test_a_classifiers_new_head_trains_and_is_saved(tmp_path):
    def classifier() -> Any:
        torch.manual_seed(0)
        return LlamaForSequenceClassification(tiny_config(num_labels=3)).eval()

    model = adapt(classifier(), task_type="SEQ_CLS")
    head = [p for n, p in model.named_parameters() if "score.modules_to_save" in n]
    assert len(head) == 1
    assert head[0].requires_grad
    head[0].data.mul_(2)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(classifier(), tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_unloading_and_merging_leave_no_trace_on_the_modules():
    plain = tiny_model()
    attributes = {name: set(vars(module)) for name, module in plain.named_modules()}
    for end in ("merge_and_unload", "unload"):
        base = getattr(adapt(tiny_model()), end)()
        assert {name: set(vars(module)) for name, module in base.named_modules()} == attributes


def test_a_base_can_be_adapted_again_after_unloading():
    base = adapt(tiny_model(), seed=5, shift=True).unload()
    assert torch.equal(logits(adapt(base)), logits(adapt(tiny_model())))


def test_a_model_without_a_head_is_adapted_alike():
    plain = tiny_model()
    headless = LlamaModel(plain.config).eval()
    headless.load_state_dict(plain.model.state_dict())
    whole = adapt(plain, adapt_embedding=True)
    model = adapt(headless, adapt_embedding=True)
    expected = whole.base_model.model.model(input_ids=text()).last_hidden_state
    assert torch.equal(model(input_ids=text()).last_hidden_state, expected)


def test_it_can_be_injected_without_a_wrapper():
    model = shake(inject_adapter_in_model(SanConfig(), tiny_model()))
    assert torch.equal(logits(model), logits(adapt(tiny_model())))
    again = inject_adapter_in_model(SanConfig(), tiny_model())
    set_peft_model_state_dict(again, get_peft_model_state_dict(model))
    assert torch.equal(logits(again), logits(model))


def test_mixing_it_with_other_methods_is_refused():
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        get_peft_model(tiny_model(), SanConfig(), mixed=True)


def test_tying_weights_again_keeps_the_scaled_embedding():
    model = adapt(tiny_model(tie_word_embeddings=True), adapt_embedding=True)
    before = logits(model)
    model.base_model.model.tie_weights()
    assert torch.equal(logits(model), before)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_rows_cannot_each_take_an_adapter_of_their_own():
    model = two_adapters()
    with pytest.raises((InputError, ValueError), match="adapter_names"):
        model(input_ids=text(), adapter_names=["one", "two"])


def test_generation_uses_the_adapter():
    model = adapt(tiny_model())
    merged = deepcopy(model).merge_and_unload()
    found = model.generate(input_ids=text(), max_new_tokens=8, do_sample=False)
    assert torch.equal(found, merged.generate(input_ids=text(), max_new_tokens=8, do_sample=False))


def test_the_saved_config_names_its_method(saved):
    _, adapter, _ = saved
    written = json.loads((adapter / "adapter_config.json").read_text())
    assert written["peft_type"] == "SAN"
    assert written["links"] == ["mlp", "residual"]


def test_a_saved_adapter_says_what_loads_it(tmp_path, monkeypatch):
    model = tiny_model()
    model.save_pretrained(tmp_path / "base")
    model = adapt(model)
    model.add_adapter("other", SanConfig())
    for _ in range(2):  # saved again, it is not said twice
        model.save_pretrained(tmp_path / "adapter")
    for folder in (tmp_path / "adapter", tmp_path / "adapter" / "other"):
        note = json.loads((folder / "adapter_config.json").read_text())["how_to_load"]
        assert "pip install san-llm" in note
        assert "import san_llm" in note
        card = (folder / "README.md").read_text()
        assert card.count("import san_llm") == card.count("pip install san-llm") == 1
        assert re.match(r"(---\n[^#]*\n---\n\n)?# A SAN adapter\n", card)
    assert ModelCard.load(tmp_path / "adapter" / "README.md").data.library_name == "peft"
    code = (tmp_path / "adapter" / "README.md").read_text().partition("```python\n")[2]
    code = code.partition("```")[0].replace("THE BASE", "base").replace("THIS FOLDER", "adapter")
    assert code.startswith("import san_llm")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert torch.equal(logits(names["model"]), logits(model))


def test_adapting_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(tiny_model(), SanConfig())


LOAD = """
import torch
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter")
print(model(torch.arange(9)[None]).logits.double().abs().sum().item())
"""


IMPORTS = ["import san_llm", "from peft import PeftModel"]
# What asks whether PEFT is there, or knows who feeds whom, before PEFT is imported.
BETWEEN = "from transformers import LlamaModel; san_llm.propagation_graph"


@pytest.mark.parametrize("imports", [*permutations(IMPORTS), (IMPORTS[0], BETWEEN, IMPORTS[1])])
def test_a_process_that_has_imported_the_package_loads_an_adapter(tmp_path, imports):
    model = tiny_model()
    model.save_pretrained(tmp_path / "base")
    model = adapt(model)
    model.save_pretrained(tmp_path / "adapter")
    code = "\n".join([*imports, LOAD])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told = model(torch.arange(9)[None]).logits.double().abs().sum().item()
    assert float(done.stdout) == pytest.approx(told, rel=1e-6)


OURS = ("config", "layer", "model")  # what imports PEFT


@pytest.fixture
def another_peft(tmp_path, monkeypatch):
    """Make a PEFT of a line importable, as if none had been; the method registered behind it."""
    (tmp_path / "peft.py").write_text("ready = True\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.delitem(sys.modules, "peft")
    for name in OURS:
        monkeypatch.delitem(sys.modules, f"san_llm.san.{name}")
    registered = []
    monkeypatch.setattr(
        register, "import_module", lambda name: registered.append((name, sys.modules["peft"].ready))
    )
    return registered


def test_the_method_is_registered_behind_peft_whenever_that_is_imported(another_peft, monkeypatch):
    before = [*sys.meta_path]
    register.register_with_peft()
    assert sys.meta_path[1:] == before
    for _ in range(2):  # many ask long before they import it
        assert find_spec("peft").name == "peft"
        assert sys.meta_path[1:] == before
    assert find_spec("json").name == "json"
    assert another_peft == []
    finder = sys.meta_path[0]
    import_module("peft")
    assert another_peft == [("san_llm.san.model", True)]
    assert sys.meta_path == before
    assert finder.find_spec("peft", None) is None
    register.register_with_peft()
    assert another_peft == [("san_llm.san.model", True)] * 2
    assert sys.meta_path == before
    for name in OURS:  # which registers the method itself, as soon as PEFT is ready for it
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, f"san_llm.san.{name}", ModuleType(name))
            register.register_with_peft()
        assert len(another_peft) == 2, name


def test_without_peft_nothing_is_found_and_nothing_breaks(another_peft, tmp_path, monkeypatch):
    (tmp_path / "peft.py").unlink()
    register.register_with_peft()
    assert find_spec("peft") is None
    with pytest.raises(ModuleNotFoundError):
        import_module("peft")
    spec = ModuleSpec("peft", None, is_package=True)  # a folder without code
    monkeypatch.setattr(register, "find_spec", lambda name: spec)
    assert sys.meta_path[0].find_spec("peft", None) is spec
    assert another_peft == []
