"""Models that no table knows, merged from file to file: names, numbers, and stock transformers.

Each is held against PEFT's merge_and_unload of the model in memory, as transformers saves that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from san.adapted import moved
from san.test_pictures import CONFIGS as PICTURES
from san.test_pictures_with_text import config_of
from tiny import tiny_tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    conversion_mapping,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter

from san_llm import SanConfig
from san_llm.errors import InputError
from san_llm.merge.request import MergeRequest
from san_llm.merge.run import merge
from san_llm.models.subject import find_subject

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXTURE = SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97}
GPT |= {"bos_token_id": 1, "eos_token_id": 2}
TEXTS = {
    "gpt2": GPT,  # Linears the other way round, a tied head
    "gpt_neox": SIZES,  # its head has another name in memory
    "phi": SIZES,
    "opt": SIZES | {"ffn_dim": 40, "word_embed_proj_dim": 32},
    "glm4": SIZES | {"head_dim": 8},  # gate and up are one Linear
    "mixtral": SIZES | {"num_local_experts": 4},  # a tensor for each expert, by other names
    "qwen3_moe": MIXTURE,
    "olmoe": MIXTURE,
}
MARIAN = SIZES | {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
MARIAN |= {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
MARIAN |= {f"{side}_ffn_dim": 40 for side in ("encoder", "decoder")}
DENSE = r".*(pwconv\d|downsampling_layer\.1)"  # two Linears, and a convolution between stages
INDEX = "model.safetensors.index.json"
OWN = "base_model.model.transformer."
FP32, BF16 = torch.float32, torch.bfloat16
BESIDE = {"llava": ["multi_modal_projector"], "smolvlm": None, "qwen2_vl": ["merger"]}


def config(family: str) -> tuple[Any, Any]:
    if family in TEXTS:
        return AutoModelForCausalLM, AutoConfig.for_model(family, **TEXTS[family])
    if family in BESIDE:
        return AutoModelForImageTextToText, config_of(family)
    if family == "marian":
        return AutoModelForSeq2SeqLM, AutoConfig.for_model(family, **MARIAN)
    if family == "dinov3_vit":
        return AutoModel, AutoConfig.for_model(family, **PICTURES["vit"])
    name, _, giant = family.partition(" ")
    sizes = PICTURES[name] | ({"use_swiglu_ffn": True} if giant else {})
    if "depths" in sizes:
        sizes |= {"depths": [1, 1]}
    return AutoModelForImageClassification, AutoConfig.for_model(name, **sizes)


def trained(family: str, dtype: torch.dtype = FP32, **options: Any) -> Any:
    """Save a random base and a moved adapter of it; return the adapted model."""
    torch.manual_seed(0)
    kind, made = config(family)
    model = kind.from_config(made)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    model.to(dtype).save_pretrained("base", max_shard_size=30_000)
    adapted = get_peft_model(type(model).from_pretrained("base"), SanConfig(**options))
    moved(adapted)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and ".san_gamma" not in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained("adapter")
    return adapted


def merged(**more: Any) -> Any:
    return merge(MergeRequest(find_subject("base", Path("adapter")), Path("out"), **more))


def files(folder: str) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors of each file of a folder."""
    return {file.name: load_file(file) for file in sorted(Path(folder).glob("*.safetensors"))}


def held_against_memory(adapted: Any, told: str, exact: bool = True) -> None:
    """Hold a merged folder against the model in memory, by files and as stock models load them."""
    base, out = files("base"), files("out")
    for name, tensors in base.items():
        kinds = {key: (t.dtype, t.shape) for key, t in tensors.items()}
        assert {key: (t.dtype, t.shape) for key, t in out[name].items()} == kinds
    assert base.keys() == out.keys()
    whole, other = (json.loads(Path(f, INDEX).read_text())["weight_map"] for f in ("base", "out"))
    assert whole == other
    stock, said = getattr(transformers, told).from_pretrained("out", output_loading_info=True)
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    wanted = adapted.float().merge_and_unload().to(stock.dtype).state_dict()
    found = stock.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if exact:
            assert torch.equal(found[name], tensor), name
        else:
            step = max(torch.finfo(stock.dtype).eps, 1e-6)
            assert torch.allclose(found[name], tensor, rtol=step, atol=1e-6), name


@pytest.mark.holds("files")
@pytest.mark.parametrize(
    "family",
    [
        *TEXTS,
        *BESIDE,
        *("vit", "dinov2", "dinov2 giant", "swin", "convnext"),
        "marian",  # whose positions are in no file
        "dinov3_vit",  # which has a tensor without numbers
    ],
)
def test_files_have_their_base_s_names_and_the_numbers_of_the_model_in_memory(here, family):
    adapted = trained(family, modules_to_save=BESIDE.get(family))
    result = merged()
    assert " weights" in result.checked.what
    assert result.checked.apart < 1e-6
    held_against_memory(adapted, type(adapted.get_base_model()).__name__)


@pytest.mark.parametrize(
    ("family", "dtype", "options"),
    [
        ("gpt2", BF16, {"mode": "neuron"}),
        ("gpt2", FP32, {"mode": "synapse", "links": ["attention", "mlp"]}),
        ("gpt2", BF16, {"links": "free", "shift": True}),  # every Linear has a bias to hold it
        ("gpt2", BF16, {"target_modules": ["c_attn", "c_fc"]}),
        ("mixtral", BF16, {}),
        ("mixtral", FP32, {"mode": "neuron"}),
        ("mixtral", BF16, {"mode": "synapse"}),
        ("dinov2 giant", FP32, {"target_modules": r".*(gate_proj|weights_in)"}),  # half of one
        ("phi", BF16, {"carrier": "lora", "r": 3, "target_modules": ["v_proj", "dense"]}),
        ("phi", FP32, {"carrier": "dora", "r": 3, "target_modules": ["v_proj", "dense", "fc2"]}),
        ("convnext", FP32, {"carrier": "lora", "r": 2, "target_modules": DENSE}),
        ("convnext", FP32, {"carrier": "dora", "r": 2, "target_modules": DENSE}),
        ("gpt2", FP32, {"train_norms": True}),
        ("vit", FP32, {"train_norms": True}),
        ("mixtral", BF16, {"train_norms": True}),
    ],
    ids=str,
)
def test_every_option_is_merged_and_each_number_rounded_once(here, family, dtype, options):
    adapted = trained(family, dtype, **options)
    merged()
    exact = "carrier" not in options  # whose products are summed in another order
    held_against_memory(adapted, type(adapted.get_base_model()).__name__, exact)


@pytest.mark.parametrize(
    "options",
    [
        {"adapt_embedding": True},
        {"modules_to_save": ["wte"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["wte", "lm_head"]},
    ],
    ids=str,
)
def test_a_head_that_is_the_embedding_no_more_has_a_tensor_of_its_own(here, options):
    adapted = trained("gpt2", **options).eval()
    merged()
    base, out = (
        {name for tensors in files(folder).values() for name in tensors}
        for folder in ("base", "out")
    )
    assert out - base == {"lm_head.weight"}
    assert base <= out
    stock = AutoModelForCausalLM.from_pretrained("out").eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.allclose(stock(ids).logits, adapted(input_ids=ids).logits, atol=1e-5)


def test_two_whole_modules_that_are_one_stay_one(here):
    trained("gpt2", modules_to_save=["wte", "lm_head"])
    file = Path("adapter", "adapter_model.safetensors")
    tensors = load_file(file)
    table = "base_model.model.transformer.wte.weight"
    tensors["base_model.model.lm_head.weight"] = tensors[table].clone()
    save_file(tensors, file)
    merged()
    assert "lm_head.weight" not in json.loads(Path("out", INDEX).read_text())["weight_map"]
    stock = AutoModelForCausalLM.from_pretrained("out")
    assert torch.equal(stock.lm_head.weight, tensors[table])


def test_a_classifier_that_a_base_does_not_have_comes_with_the_adapter(here):
    torch.manual_seed(0)
    kind, made = config("vit")
    plain = AutoModel.from_config(made)
    plain.save_pretrained("base")
    Path("base", "preprocessor_config.json").write_text("{}")
    model, said = kind.from_pretrained("base", num_labels=5, output_loading_info=True)
    if set(said["missing_keys"]) != {"classifier.weight", "classifier.bias"}:
        pytest.skip("this version of transformers does not take a bare tower for a classifier's")
    adapted = get_peft_model(model, SanConfig(modules_to_save=["classifier"]))
    moved(adapted)
    adapted.save_pretrained("adapter")
    merged()
    assert Path("out", "preprocessor_config.json").is_file()
    assert "text-generation" not in Path("out", "README.md").read_text()
    stock, said = kind.from_pretrained("out", output_loading_info=True)
    assert not any(said[key] for key in ("missing_keys", "mismatched_keys"))
    picture = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(stock(picture).logits, adapted(picture).logits, atol=1e-5)


def test_what_is_no_weight_of_the_model_and_other_dtypes_are_kept(here):
    """As in files from the hub: without a prefix, with masks that nobody loads; a norm in fp32."""
    adapted = trained("gpt2", BF16)
    tensors = {
        name.removeprefix("transformer."): tensor
        for some in files("base").values()
        for name, tensor in some.items()
    }
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    tensors["ln_f.weight"] = tensors["ln_f.weight"].float()
    for file in Path("base").glob("model*"):
        file.unlink()
    save_file(tensors, Path("base", "model.safetensors"), {"format": "pt"})
    merged()
    out = load_file(Path("out", "model.safetensors"))
    assert {n: t.dtype for n, t in out.items()} == {n: t.dtype for n, t in tensors.items()}
    for name in ("h.0.attn.bias", "ln_f.weight", "wte.weight"):
        assert torch.equal(out[name], tensors[name])
    wanted = adapted.float().merge_and_unload().transformer.h[1].mlp.c_fc.weight
    assert torch.equal(out["h.1.mlp.c_fc.weight"], wanted.to(BF16))


def test_another_dtype_and_other_shards_on_wish(here):
    adapted = trained("mixtral")
    merged(dtype="bfloat16", shard_size=10**9)
    (out,) = files("out").values()
    assert {tensor.dtype for tensor in out.values()} == {BF16}
    stock = AutoModelForCausalLM.from_pretrained("out")
    assert stock.dtype == BF16
    wanted = adapted.merge_and_unload().to(BF16).state_dict()
    assert all(torch.equal(stock.state_dict()[name], tensor) for name, tensor in wanted.items())


class Turned(ConversionOps):
    """An operation of a later version of transformers: rows in another order."""

    def convert(self, input_dict, target_patterns, **_):
        ((tensor,),) = input_dict.values()
        return {target_patterns[0]: tensor.flip(0)}

    @property
    def reverse_op(self):
        return Turned()


def test_what_cannot_be_translated_is_merged_in_memory_and_said(here, capsys, monkeypatch):
    known = "_checkpoint_conversion_mapping_cache"
    get_checkpoint_conversion_mapping("gpt2")
    table = getattr(conversion_mapping, known)
    name = r"mlp.c_fc.weight"
    monkeypatch.setitem(table, "gpt2", [WeightConverter(name, name, [Turned()])])
    adapted = trained("gpt2")
    tiny_tokenizer().save_pretrained("base")
    capsys.readouterr()
    result = merged()
    said = capsys.readouterr().err
    assert (
        "merged in memory, not from file to file: transformers makes transformer.h.0.mlp." in said
    )
    assert "by Turned, which is not known here" in said
    assert "logits" in result.checked.what
    stock = AutoModelForCausalLM.from_pretrained("out").state_dict()
    wanted = adapted.merge_and_unload().state_dict()
    assert all(torch.equal(stock[key], tensor) for key, tensor in wanted.items())


def test_a_model_for_no_text_is_refused_where_it_cannot_be_translated_or_asked(
    here, capsys, monkeypatch
):
    trained("convnext")
    with pytest.raises(InputError, match=r"^--verify: compares .* goes on from no text"):
        merged(verified=True)
    get_checkpoint_conversion_mapping("convnext")
    known = "_checkpoint_conversion_mapping_cache"
    table = getattr(conversion_mapping, known)
    name = r"pwconv1.weight"
    monkeypatch.setitem(table, "convnext", [WeightConverter(name, name, [Turned()])])
    capsys.readouterr()
    with pytest.raises(
        InputError, match=r"from file to file: .* by Turned, .*; in Python, merge_a"
    ):
        merged()
    assert "in memory" not in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda base, _: base.pop("transformer.h.1.ln_1.bias"),
            "have no transformer.h.1.ln_1.bias",
        ),
        (
            lambda base, _: base.update({"transformer.ln_f.bias": torch.ones(7)}),
            r"transformer.ln_f.bias has the shape \(7,\), by its config.json it is \(32,\)",
        ),
        (
            lambda _, adapter: adapter.update({f"{OWN}h.1.mlp.c_fc.san_gamma": torch.ones(9)}),
            r"h.1.mlp.c_fc.san_gamma has the shape \(9,\), this base asks for \(128,\)",
        ),
        (
            lambda _, adapter: adapter.update({f"{OWN}h.7.mlp.c_fc.san_gamma": torch.ones(9)}),
            "h.7.mlp.c_fc.san_gamma belongs to nothing",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(here, change, said):
    trained("gpt2")
    base = {name: tensor for some in files("base").values() for name, tensor in some.items()}
    for file in Path("base").glob("model*"):
        file.unlink()
    adapter = load_file("adapter/adapter_model.safetensors")
    change(base, adapter)
    save_file(base, "base/model.safetensors", {"format": "pt"})
    save_file(adapter, "adapter/adapter_model.safetensors")
    with pytest.raises(InputError, match=said):
        merged()
    assert not Path("out").exists()
