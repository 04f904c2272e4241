"""SAN on models for pictures with text, against dense references with a picture in the row."""

import json
import re
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from san.adapted import DoubleGemmaNorm, DoubleNorm, dense_linear, held_against_dense, moved
from torch.func import functional_call
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from san_llm import SanConfig, propagation_graph
from san_llm.errors import InputError
from san_llm.measure.run import measure
from san_llm.plan.wiring import differences
from san_llm.san.graph import PropagationGraph

IMAGE = 90  # the token that stands for a patch of a picture
HEAD = 8
TEXT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
TOWER |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
LLAMA = TEXT | {"model_type": "llama"}
CLIP = TOWER | {"model_type": "clip_vision_model"}
MULTI = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
QWEN = TEXT | {"rope_parameters": MULTI}
# What the config of each family says, its connector's name and how many tokens its picture has.
FAMILIES = {
    "llava": ({"text_config": LLAMA, "vision_config": CLIP}, "multi_modal_projector", 4),
    "llava_next": (
        {
            "text_config": TEXT | {"model_type": "mistral"},
            "vision_config": CLIP,
            "image_grid_pinpoints": [[8, 8]],
        },
        "multi_modal_projector",
        10,
    ),
    "smolvlm": ({"text_config": LLAMA, "vision_config": TOWER}, "connector", 1),
    "idefics3": ({"text_config": LLAMA, "vision_config": TOWER}, "connector", 1),
    "qwen2_vl": (
        {
            "text_config": QWEN,
            "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2,
                              "patch_size": 4, "mlp_ratio": 2},
        },
        "merger",
        4,
    ),
    "qwen2_5_vl": (
        {
            "text_config": QWEN,
            "vision_config": {"depth": 2, "hidden_size": 16, "intermediate_size": 24,
                              "num_heads": 2, "patch_size": 4, "out_hidden_size": 32,
                              "fullatt_block_indexes": [1], "window_size": 8},
        },
        "merger",
        4,
    ),
    "gemma3": (
        {
            "text_config": TEXT | {"head_dim": HEAD, "query_pre_attn_scalar": HEAD},
            "vision_config": TOWER | {"model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
        },
        "multi_modal_projector",
        4,
    ),
}  # fmt: skip
EAGER = {"attn_implementation": "eager"}


def config_of(family):
    values = FAMILIES[family][0]
    if family in ("smolvlm", "idefics3"):
        values = values | {"scale_factor": 2}
    token = "image_token_index" if "llava" in family else "image_token_id"
    return AutoConfig.for_model(family, **deepcopy(values) | {token: IMAGE})


def small(family):
    """Return a random model in float64, with norms and biases that are none of 0 and 1."""
    torch.manual_seed(3)
    model = AutoModelForImageTextToText.from_config(config_of(family), **EAGER).double().eval()
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.data = 1 + 0.3 * torch.randn_like(parameter)
        else:
            parameter.data = torch.randn_like(parameter) / parameter[0].numel() ** 0.5
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):  # which drops to float32
            double = DoubleGemmaNorm if family == "gemma3" else DoubleNorm
            model.set_submodule(name, double(module))
    return model.requires_grad_(False)


def row(family):
    """Return a row of text with a picture in it."""
    torch.manual_seed(8)
    tokens = FAMILIES[family][2]
    ids = torch.tensor([[5, 7, 11, *[IMAGE] * tokens, 13, 17, 19, 23]])
    if family.startswith("qwen"):
        pixels = torch.randn(16, 3 * 2 * 16, dtype=torch.float64)
        kinds = (ids == IMAGE).int()
        grid = torch.tensor([[1, 4, 4]])
        return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid,
                "mm_token_type_ids": kinds}  # fmt: skip
    if family == "llava_next":
        pixels = torch.randn(1, 2, 3, 8, 8, dtype=torch.float64)
        return {"input_ids": ids, "pixel_values": pixels, "image_sizes": torch.tensor([[8, 8]])}
    pixels = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    if family in ("smolvlm", "idefics3"):
        pixels = pixels[None]
    if family == "gemma3":
        return {"input_ids": ids, "pixel_values": pixels, "token_type_ids": (ids == IMAGE).long()}
    return {"input_ids": ids, "pixel_values": pixels}


def shared_heads(gamma):  # each value head stands for two query heads
    return gamma.view(-1, HEAD).repeat_interleave(2, dim=0).reshape(-1)


def dense(model, gammas, family):
    """Return logits of diag(gamma) W diag(s) and gamma b: no s in q, k and v of the first block."""
    where = "model.text_model" if FAMILIES[family][1] == "connector" else "model.language_model"
    assert len(gammas) == 14
    weights = {}
    for name, gamma in gammas.items():
        block, last = re.fullmatch(rf"{where}\.layers\.(\d)\.\w+\.(\w+)", name).groups()
        here = f"{where}.layers.{block}"
        if last in ("q_proj", "k_proj", "v_proj"):
            s = gammas[f"{where}.layers.0.mlp.down_proj"] if block == "1" else torch.ones(32)
        elif last == "o_proj":
            s = shared_heads(gammas[f"{here}.self_attn.v_proj"])
        else:
            s = gammas[f"{here}.{'mlp.up' if last == 'down_proj' else 'self_attn.o'}_proj"]
        weights |= dense_linear(model, name, gamma, s)
    return functional_call(model, weights, kwargs=row(family)).logits


@pytest.mark.holds("dense", "files")
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_dense_model_in_logits_and_every_gradient(family, tmp_path):
    given = row(family)
    merged, theirs, _ = held_against_dense(
        small(family),
        given,
        SanConfig(),
        partial(dense, family=family),
        tmp_path,
        gradients={"rtol": 1e-5, "atol": 1e-7},
        merges=1e-7,
        moves=0.05,
    )
    # The picture is read, and its rows come to the last logits.
    other = merged(**given | {"pixel_values": given["pixel_values"] + 1}).logits
    assert (other - theirs)[:, -1].abs().max() > 1e-3

    small(family).save_pretrained(tmp_path / "base")
    merged.save_pretrained(tmp_path / "merged")
    names = []
    for folder in ("base", "merged"):
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as file:
            names.append(set(file.keys()))
    assert names[0] == names[1]
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", **EAGER)
    torch.testing.assert_close(stock(**given).logits, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llava", "smolvlm", "qwen2_vl", "gemma3"])
def test_the_connector_is_trained_whole_saved_loaded_and_merged(family, tmp_path):
    base, given, connector = small(family), row(family), FAMILIES[family][1]
    adapted = get_peft_model(deepcopy(base), SanConfig(modules_to_save=[connector]))
    adapted(**given).logits.sum().backward()
    whole = {n: p for n, p in adapted.named_parameters() if p.requires_grad and ".san_" not in n}
    assert len(whole) == len(dict(base.get_submodule(path_of(base, connector)).named_parameters()))
    for name, parameter in whole.items():
        assert f".{connector}.modules_to_save.default." in name
        assert parameter.grad.abs().max() > 0
        parameter.data += 0.3 * torch.randn_like(parameter)
    moved(adapted)
    logits = adapted(**given).logits
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(loaded(**given).logits, logits, rtol=1e-9, atol=1e-9)
    with loaded.disable_adapter():
        assert torch.equal(loaded(**given).logits, small(family)(**given).logits)
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", **EAGER)
    torch.testing.assert_close(stock(**given).logits, logits, rtol=1e-5, atol=1e-5)


def path_of(model, last):
    return next(name for name, _ in model.named_modules() if name.endswith(f".{last}"))


def test_two_adapters_and_modes_beside_each_other():
    base, given = small("llava"), row("llava")
    adapted = get_peft_model(deepcopy(base), SanConfig())
    moved(adapted)
    first = adapted(**given).logits
    adapted.add_adapter("neuron", SanConfig(mode="neuron", target_modules=["q_proj", "v_proj"]))
    adapted.set_adapter("neuron")
    assert torch.equal(adapted(**given).logits, base(**given).logits)
    assert sum("san_gamma.neuron" in name for name, _ in adapted.named_parameters()) == 4
    adapted.set_adapter("default")
    torch.testing.assert_close(adapted(**given).logits, first)


TOWERS = "model.vision_tower.encoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_modules": r".*\.q_proj"}, f"names {TOWERS}: the vision tower is left frozen"),
        ({"target_modules": [TOWERS]}, "cannot be adapted: the vision tower is left frozen"),
        ({"target_modules": ["q_proj", "fc1"]}, "fc1 cannot be adapted: the vision tower is left"),
        ({"target_modules": ["multi_modal_projector"]},
         r"the connector is left frozen; modules_to_save=\['multi_modal_projector'\] trains it"),
        ({"adapt_embedding": True}, "adapt_embedding: .*embed_tokens cannot be adapted: pictures"),
    ],
)  # fmt: skip
def test_what_is_left_frozen_is_refused(options, said):
    with pytest.raises(InputError, match=said):
        propagation_graph(config_of("llava"), SanConfig(**options))


def test_short_names_never_match_in_the_tower(tmp_path):
    adapted = get_peft_model(small("llava"), SanConfig(target_modules=["q_proj", "v_proj"]))
    adapted.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    names = [name for name, _ in small("llava").named_modules() if re.fullmatch(saved, name)]
    assert names == [
        f"model.language_model.layers.{block}.self_attn.{last}_proj"
        for block in (0, 1)
        for last in "qv"
    ]


@pytest.mark.parametrize("family", ["llava", "llava_next", "smolvlm", "gemma3"])
def test_the_table_of_its_language_model_says_what_is_measured(family):
    config = config_of(family)
    whole = propagation_graph(config)
    where = "text_model" if family == "smolvlm" else "language_model"

    def there(name):
        return name and name.replace("model.", f"model.{where}.", 1)

    declared = PropagationGraph(
        tuple(
            replace(node, name=there(node.name), anterior=there(node.anterior))
            for node in propagation_graph(config.get_text_config())
        )
    )
    assert differences(declared, whole) == []
    assert propagation_graph(small(family)) == whole


def test_the_first_block_reads_text_and_pictures_and_nothing_feeds_it():
    graph = measure(config_of("llava"))
    for block, fed in ((0, False), (1, True)):
        for last in "qkv":
            name = f"model.language_model.layers.{block}.self_attn.{last}_proj"
            assert (name in graph.into) == fed
            assert fed or "text from the embedding" in graph.by_name[name].note


def test_names_are_those_of_the_model_that_is_given():
    config = config_of("llava")
    bare = AutoModel.from_config(config)  # without a head
    assert {node.name.partition(".layers.")[0] for node in propagation_graph(bare)} == {
        "language_model"
    }


@pytest.mark.holds("refused", families=["mllama"])
def test_a_language_model_that_pictures_run_more_of_is_refused(record_property):
    tower = TOWER | {"num_global_layers": 1, "intermediate_layers_indices": [0]}
    config = AutoConfig.for_model(
        "mllama", text_config=TEXT | {"cross_attention_layers": [1]}, vision_config=tower
    )
    with pytest.raises(InputError, match=r"text alone does not run .*layers\.1\.cross_attn") as no:
        propagation_graph(config)
    record_property("why", str(no.value))


@pytest.mark.parametrize("family", ["llava", "llava_next", "smolvlm", "gemma3", "qwen2_vl"])
def test_the_lean_form_is_that_of_the_language_model(family):
    given = row(family)
    logits = {}
    for form in ("lean", "plain"):
        adapted = get_peft_model(small(family), SanConfig(form=form))
        moved(adapted)
        logits[form] = adapted(**given).logits
        stand = {
            name.rpartition(".")[2]
            for name, module in adapted.named_modules()
            if hasattr(module, "san_fold") and module.san_fold.stands()
        }
        norms = ["pre_feedforward_layernorm" if family == "gemma3" else "post_attention_layernorm"]
        folded = {*norms, "input_layernorm", "mlp", "self_attn"}
        if family == "gemma3":  # whose queries and keys pass a norm before they are rotated
            folded -= {"self_attn"}
        if family == "qwen2_vl":  # which transformers has rotated in another way before
            folded, stand = folded - {"self_attn"}, stand - {"self_attn"}
        assert stand == (folded if form == "lean" else set())
    torch.testing.assert_close(logits["lean"], logits["plain"], rtol=1e-9, atol=1e-9)
