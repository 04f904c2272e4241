"""The lean form of models that no table knows: where scales were found to move, and do."""

from collections import Counter
from copy import deepcopy

import pytest
import torch
from peft import get_peft_model
from san import test_measured, test_pictures
from san.adapted import DoubleNorm, moved
from transformers import AutoConfig, AutoModelForCausalLM

from san_llm import SanConfig
from san_llm.measure.run import measure
from san_llm.san.layer import SanLayer
from san_llm.san.measured import form_of, measured_graph
from san_llm.san.options import Options

LLAMA = {"norm": 5, "rotation": 3, "attention": 3, "gated": 3}  # nothing feeds the first q, k, v
PLAIN_MLP = {"norm": 5, "attention": 3, "activation": 3}
PICTURES = {"norm": 3, "product": 2, "attention": 2, "activation": 2}
# What stands in three blocks, or two of those that read pictures.
STANDING = {
    "granite": LLAMA,
    "smollm3": LLAMA,
    "ministral": LLAMA,
    # Norms stand behind attention and MLP, and on all heads of q and k.
    "olmo2": {"attention": 3, "gated": 3},
    "olmo3": {"attention": 3, "gated": 3},
    # A part of each head is rotated.
    "stablelm": {"norm": 5, "attention": 3, "gated": 3},
    "glm4": {"norm": 5, "attention": 3, "gated": 3},
    "starcoder2": PLAIN_MLP | {"rotation": 3},
    # q, k and v are one Linear; attention and MLP stand side by side.
    "gpt_neox": {"norm": 4, "activation": 3},
    "falcon": {"norm": 2, "activation": 3},
    "phi": {"norm": 2, "attention": 3, "activation": 3},
    "opt": PLAIN_MLP | {"product": 3},
    # The stream itself passes the norms.
    "bert": {"attention": 3, "activation": 3, "product": 3},
    # The router reads one norm; what experts wrote feeds nothing behind the other.
    "mixtral": {"attention": 3, "rotation": 3},
    "qwen3_moe": {"attention": 3},
    "olmoe": {"attention": 3},
    "phimoe": {"attention": 3, "rotation": 3},
    "qwen2_moe": {"attention": 3, "rotation": 3, "gated": 3},
    "gpt2": {"norm": 3, "activation": 2},
    "vit": PICTURES,
    "dinov2": PICTURES,
    "swin": {"norm": 8, "product": 4, "attention": 4, "activation": 4},
    "swinv2": {"attention": 2, "activation": 2},
    "convnext": {"norm": 4, "activation": 4},
    "deit": PICTURES,
    "clip": PICTURES,
    "siglip": PICTURES,
    "convnextv2": {"norm": 4},
}


def small(family):
    """Return a random model in float64, none of whose norms drops to float32, and its arguments."""
    if family in test_pictures.WIRED:
        return test_pictures.small(family), test_pictures.inputs(family)
    model = test_measured.small(family)
    for name, module in list(model.named_modules()):
        if hasattr(module, "variance_epsilon"):
            model.set_submodule(name, DoubleNorm(module))
    return model, {"input_ids": test_measured.IDS}


def folds(model):
    """Return by kind how many folds stand in a model."""
    layers = [layer for layer in model.modules() if isinstance(layer, SanLayer)]
    found = {id(f): f for x in layers for f in (x.columns_fold, x.rows_fold) if f is not None}
    return Counter(type(f).__name__ for f in found.values() if f.stands())


KINDS = {
    "NormFold": "norm",
    "ValueFold": "attention",
    "RotaryFold": "rotation",
    "ProductFold": "product",
    "GatedFold": "gated",
    "ActivationFold": "activation",
}


@pytest.mark.holds("lean")
@pytest.mark.parametrize("family", STANDING)
def test_it_computes_what_the_plain_form_does(family):
    base, given = small(family)
    results = {}
    for form in ("plain", "lean"):
        model = get_peft_model(deepcopy(base), SanConfig(form=form))
        if form == "lean":
            found = folds(model)
            assert {KINDS[kind]: count for kind, count in found.items()} == STANDING[family]
        moved(model)
        logits = model(**given).logits
        logits.square().mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results[form] = logits, grads
    (wanted, theirs), (found, ours) = results["plain"], results["lean"]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert ours.keys() == theirs.keys()
    scale = max(g.norm().item() for g in theirs.values())
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= 1e-9 * scale, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["granite", "opt", "gpt2", "vit", "convnext"])
def test_it_starts_at_the_base_bit_for_bit(family, dtype):
    made = test_pictures if family in test_pictures.WIRED else test_measured
    base, (_, given) = made.small(family).to(dtype), small(family)
    given = {k: v if v.dtype == torch.long else v.to(dtype) for k, v in given.items()}
    wanted = base(**given).logits
    model = get_peft_model(base, SanConfig())
    assert folds(model)
    assert torch.equal(model(**given).logits, wanted)


def test_a_block_without_a_rotation_is_told_from_those_that_have_one():
    values = test_measured.SIZES | {"num_hidden_layers": 5, "no_rope_layer_interval": 4}
    config = AutoConfig.for_model("smollm3", **values)
    found = measure(config, AutoModelForCausalLM._model_mapping[type(config)]).folds
    rotated = {fold.at for fold in found if fold.kind == "rotation"}
    assert rotated == {f"model.layers.{n}.self_attn" for n in (0, 1, 2, 4)}


def test_an_adapter_that_was_made_before_there_were_folds_computes_the_plain_form():
    base, given = small("vit")
    model = get_peft_model(deepcopy(base), SanConfig())
    graph = dict(model.peft_config["default"].graph)
    moved(model)
    logits = model(**given).logits
    assert graph.pop("folds")
    older = get_peft_model(base, SanConfig(graph=graph))
    moved(older)
    assert not folds(older)
    torch.testing.assert_close(older(**given).logits, logits)


def test_a_fold_that_names_what_is_not_adapted_is_left_out():
    base, _ = small("vit")
    model = get_peft_model(base, SanConfig(target_modules=["q_proj", "v_proj", "fc1"]))
    assert not folds(model)


def test_merging_and_disabling_give_modules_their_own_forward_back():
    base, given = small("dinov2")
    wanted = base(**given).logits
    model = get_peft_model(base, SanConfig())
    moved(model)
    logits = model(**given).logits
    with model.disable_adapter():
        assert torch.equal(model(**given).logits, wanted)
    merged = model.merge_and_unload()
    assert not any("forward" in vars(module) for module in merged.modules())
    torch.testing.assert_close(merged(**given).logits, logits)


PICTURE = "lean: norms, q times k, attention, activation"


@pytest.mark.parametrize(
    ("family", "options", "form"),
    [
        ("vit", {}, PICTURE),
        ("vit", {"form": "plain"}, "plain"),
        ("vit", {"links": ("mlp",)}, "lean: q times k, activation"),
        ("vit", {"shift": True}, "lean: norms"),
        ("vit", {"target_modules": ["q_proj", "v_proj"]}, "plain: none of its scales can move"),
        ("mixtral", {}, "lean: rotation, attention, experts"),
        ("granite", {}, "lean: norms, rotation, attention, gated MLP"),
    ],
)
def test_the_form_is_told_as_it_is(family, options, form):
    base, _ = small(family)
    asked = Options(**options)
    assert form_of(measured_graph(base, asked), asked) == form


def test_experts_keep_little_in_the_lean_form():
    base, given = small("mixtral")
    kept = {}
    for form in ("plain", "lean"):
        model = get_peft_model(deepcopy(base), SanConfig(form=form, target_modules=".*experts"))
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        sizes = {}

        def pack(tensor, sizes=sizes, weights=weights):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = model(**given).logits
        assert logits.requires_grad
        kept[form] = sum(sizes.values())
    assert kept["lean"] < 0.7 * kept["plain"]
