"""Norms that are trained beside the scales, against dense references in float64."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from peft import PeftModel, get_peft_model
from reference import dense_parameters, logits_of
from safetensors.torch import load_file
from san.adapted import (
    FAMILIES,
    FUSED,
    adapt,
    assert_same_gradients,
    family_config,
    family_model,
    logits,
    moved,
    relative,
    text,
)
from san.test_pictures import dense, inputs, small
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from san_llm import SanConfig, propagation_graph
from san_llm.errors import InputError

NORMS = partial(SanConfig, train_norms=True)  # adapting a model fills one in


def llama():
    return family_model("llama", torch.float64, num_hidden_layers=2), {"input_ids": text()}


def vit():
    return small("vit"), inputs("vit")


def changes(model, adapter="default"):
    """Return what is added to norms, by the names of the base's tensors."""
    found = {}
    for name, parameter in model.named_parameters():
        module, _, kind = name.removeprefix("base_model.model.").partition(".san_")
        if kind in (f"weight.{adapter}", f"bias.{adapter}"):
            found[f"{module}.{kind.partition('.')[0]}"] = parameter
    return found


def shaken(model, adapter="default"):
    torch.manual_seed(4)
    for change in changes(model, adapter).values():
        change.data += 0.3 * torch.randn_like(change)
    return model


def dense_llama(plain, gammas, normed):
    return logits_of(plain, text(), dense_parameters(plain, gammas, {}) | normed)


def dense_vit(plain, gammas, normed):
    whole = deepcopy(plain)
    for name, tensor in normed.items():  # of the graph, not as parameters
        module, _, kind = name.rpartition(".")
        delattr(whole.get_submodule(module), kind)
        setattr(whole.get_submodule(module), kind, tensor)
    return dense(whole, gammas, "vit")


@pytest.mark.parametrize(
    ("make", "reference"), [(llama, dense_llama), (vit, dense_vit)], ids=["llama", "vit"]
)
@pytest.mark.parametrize("form", ["lean", "plain"])
def test_it_is_the_dense_model_in_logits_and_every_gradient(make, reference, form, tmp_path):
    base, given = make()
    plain = deepcopy(base)
    before = plain(**given).logits
    adapted = get_peft_model(base, SanConfig(train_norms=True, form=form))
    assert torch.equal(adapted(**given).logits, before)
    gammas, added = moved(adapted), changes(shaken(adapted))
    normed = {name.rpartition(".")[0] for name in added}
    assert normed == {name for name, _ in plain.named_modules() if "norm" in name.split(".")[-1]}
    weights = dict(plain.named_parameters())
    sums = {name: weights[name].detach() + change for name, change in added.items()}
    ours, theirs = adapted(**given).logits, reference(plain, gammas, sums)
    assert (theirs - before).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert_same_gradients(ours, theirs, gammas | added)

    adapted.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in file.values()) == sum(
        p.numel() for p in adapted.parameters() if p.requires_grad
    )
    loaded = PeftModel.from_pretrained(deepcopy(plain), tmp_path)
    torch.testing.assert_close(loaded(**given).logits, ours, rtol=1e-9, atol=1e-9)
    with loaded.disable_adapter():
        assert torch.equal(loaded(**given).logits, before)
    loaded.merge_adapter()
    torch.testing.assert_close(loaded(**given).logits, ours, rtol=1e-8, atol=1e-8)
    loaded.unmerge_adapter()
    with loaded.disable_adapter():
        assert torch.equal(loaded(**given).logits, before)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(**given).logits, ours, rtol=1e-8, atol=1e-8)
    assert [n for n, _ in merged.named_parameters()] == [n for n, _ in plain.named_parameters()]


@pytest.mark.parametrize("family", ["gemma2", "qwen3", "phi3"])
def test_the_lean_form_stands_over_trained_norms(family):
    lean, plain = (
        shaken(adapt(family_model(family, num_hidden_layers=2), train_norms=True, form=form))
        for form in ("lean", "plain")
    )
    folded = {n.rsplit(".", 1)[-1] for n, m in lean.named_modules() if hasattr(m, "san_fold")}
    assert "input_layernorm" in folded
    ours, theirs = (model(input_ids=text()).logits for model in (lean, plain))
    assert relative(ours, theirs) < 1e-5
    (ours.pow(2).sum() / 2).backward()
    (theirs.pow(2).sum() / 2).backward()
    for name, change in changes(plain).items():
        assert relative(changes(lean)[name].grad, change.grad) < 1e-4, name
    lean.unload()
    assert not any("san_fold" in vars(module) for module in lean.modules())


@pytest.mark.parametrize("family", [*FAMILIES, *FUSED])
def test_the_table_has_the_norms_of_the_real_model(family):
    found = propagation_graph(family_config(family), NORMS())
    model = family_model(family)
    real = {name: module.weight.numel() for name, module in model.named_modules() if "norm" in name}
    assert {norm.name: norm.trained for norm in found.norms} == real
    adapted = get_peft_model(model, NORMS())
    assert found.trained == adapted.get_nb_trainable_parameters()[0]
    assert propagation_graph(adapted) == found


def test_a_measured_graph_counts_them_by_the_model_or_by_its_config():
    base = small("vit")
    found = propagation_graph(base, NORMS())
    assert propagation_graph(base.config.to_dict(), NORMS()) == found
    assert found.trained == get_peft_model(base, NORMS()).get_nb_trainable_parameters()[0]
    assert len(found.norms) == 5
    assert found.norms[-1].name == "vit.layernorm"


def test_those_of_blocks_that_are_not_adapted_stay_as_they_are():
    some = SanConfig(train_norms=True, target_modules=r".*layers\.1\..*_proj")
    graph = propagation_graph(family_config("llama"), some)
    assert [norm.name for norm in graph.norms] == [
        "model.layers.1.input_layernorm",
        "model.layers.1.post_attention_layernorm",
        "model.norm",
    ]
    adapted = get_peft_model(family_model(), some)
    assert list(changes(adapted)) == [f"{norm.name}.weight" for norm in graph.norms]


def test_of_a_model_for_pictures_with_text_the_language_models_are_trained():
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4}
    config = AutoConfig.for_model(
        "llava",
        text_config={"model_type": "llama", "vocab_size": 97, **sizes},
        vision_config={
            "model_type": "clip_vision_model",
            **sizes,
            "image_size": 8,
            "patch_size": 4,
        },
    )
    adapted = get_peft_model(AutoModelForImageTextToText.from_config(config), NORMS())
    assert len(changes(adapted)) == 5
    assert all(name.startswith("model.language_model.") for name in changes(adapted))


@pytest.mark.parametrize("make", [llama, vit])
def test_each_of_two_adapters_has_its_own_and_active_together_they_add_up(make):
    base, given = make()
    bare = {name: p.detach().clone() for name, p in base.named_parameters()}
    adapted = shaken(get_peft_model(base, NORMS(), "one"), "one")
    one = adapted(**given).logits
    adapted.add_adapter("two", NORMS())
    adapted.add_adapter("none", SanConfig())
    for change in changes(adapted, "two").values():
        change.data -= 0.2
    adapted.set_adapter("one")
    assert torch.equal(adapted(**given).logits, one)
    assert {n.rsplit(".", 1)[-1] for n, p in adapted.named_parameters() if p.requires_grad} == {
        "one"
    }
    adapted.set_adapter("none")
    with adapted.disable_adapter():
        before = adapted(**given).logits
    assert torch.equal(adapted(**given).logits, before)
    adapted.base_model.set_adapter(["one", "two", "none"])
    both = adapted(**given).logits
    assert relative(both, one) > 1e-3
    merged = adapted.merge_and_unload(adapter_names=["one", "two", "none"])
    torch.testing.assert_close(merged(**given).logits, both, rtol=1e-9, atol=1e-9)
    for name, change in changes(adapted, "one").items():
        assert torch.equal(merged.get_parameter(name), bare[name] + change - 0.2)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_over_bf16_a_small_step_is_kept_and_seen(family):
    base = family_model(family).to(torch.bfloat16)
    adapted = get_peft_model(base, NORMS())
    for change in changes(adapted).values():
        assert change.dtype == torch.float32
        change.data += 1e-3  # a fourth of bf16's step below 1
    assert not torch.equal(logits(adapted), logits(adapted.unload()))


def test_over_bf16_a_model_of_torchs_own_norms_starts_at_the_base_and_learns():
    base = small("vit").bfloat16()
    given = {"pixel_values": inputs("vit")["pixel_values"].bfloat16()}
    before = base(**given).logits
    adapted = get_peft_model(base, NORMS())
    out = adapted(**given).logits
    assert torch.equal(out, before)
    out.float().pow(2).sum().backward()
    assert all(change.grad.abs().max() > 0 for change in changes(adapted).values())


def test_a_norm_that_is_also_saved_whole_is_refused():
    options = SanConfig(train_norms=True, modules_to_save=["input_layernorm"])
    with pytest.raises(InputError, match=r"'input_layernorm' names model\.layers\.0\.input_layer"):
        get_peft_model(family_model(), options)
    get_peft_model(family_model(), SanConfig(train_norms=True, modules_to_save=["lm_head"]))


def test_a_model_without_norms_is_refused():
    model = small("vit")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.LayerNorm):
            model.set_submodule(name, nn.Identity())
    with pytest.raises(InputError, match="train_norms: ViTForImageClassification has no norm"):
        get_peft_model(model, NORMS())
