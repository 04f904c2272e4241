"""The streamed merge, bit for bit against PEFT's own merge_and_unload and save_pretrained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from san.adapted import FAMILIES, FUSED, family_model, shake, text
from transformers import AutoModelForCausalLM

from san_llm import SanConfig
from san_llm.errors import InputError, SanError
from san_llm.merge.stream import Merged
from san_llm.merge.write import write_weights
from san_llm.models.adapter import open_adapter
from san_llm.models.locate import find_base
from san_llm.models.weights import DTYPES
from san_llm.recipe.schema import Base


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight is several pieces, of several blocks of rows; a bias is several blocks."""
    for where, numbers in (
        ("merge.write.BLOCK", 40),
        ("merge.write.PIECE", 300),
        ("models.weights.BLOCK", 100),
    ):
        monkeypatch.setattr(f"san_llm.{where}", numbers)


NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def trained(
    folder: Path,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    changes: Any = None,
    **options: Any,
) -> Any:
    """Save a base and a moved adapter; return the adapted model.

    Some rows of the base are zeros, as in a pruned one.
    """
    plain = family_model(family, dtype=dtype, **(changes or {}))
    plain.model.layers[1].mlp.down_proj.weight.data[3:5] = 0
    plain.save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    model = shake(get_peft_model(base, SanConfig(**options)))
    model.save_pretrained(folder / "adapter")
    return model


def streamed(folder: Path, dtype: str, shard_size: int = 10**9) -> Path:
    """Merge what is in ``folder`` by streaming and return where."""
    found = find_base(Base(model=str(folder / "base"), dtype="float32"))
    merged = Merged(open_adapter(folder / "adapter"), found)
    out = folder / "out"
    out.mkdir()
    write_weights(out, merged.outputs(DTYPES[dtype]), shard_size, lambda size: None)
    (out / "config.json").write_text(json.dumps(merged.merged_config(dtype)))
    return out


@pytest.mark.parametrize("dtype", list(NAMES))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "neuron"},
        {"mode": "synapse"},
        {"shift": True},
        {"shift": True, "target_modules": ["q_proj"]},
        {"links": ["residual"], "target_modules": ["o_proj", "up_proj"]},
        {"adapt_embedding": True},
        {"train_norms": True},
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_is_pefts_bit_for_bit(tmp_path, options, dtype, tied):
    model = trained(tmp_path, dtype=dtype, changes={"tie_word_embeddings": tied}, **options)
    model.merge_and_unload().save_pretrained(tmp_path / "peft")
    out = streamed(tmp_path, NAMES[dtype])
    expected = load_file(tmp_path / "peft" / "model.safetensors")
    found = load_file(out / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    config = json.loads((out / "config.json").read_text())
    wanted = json.loads((tmp_path / "peft" / "config.json").read_text())
    assert config | {"transformers_version": 0} == wanted | {"transformers_version": 0}


@pytest.mark.parametrize("mode", ["both", "neuron", "synapse"])
@pytest.mark.parametrize("carrier", ["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_low_rank_carriers_agree_up_to_the_order_of_sums(tmp_path, carrier, mode, family):
    model = trained(tmp_path, family, carrier=carrier, mode=mode, r=4)
    model.merge_and_unload().save_pretrained(tmp_path / "peft")
    expected = load_file(tmp_path / "peft" / "model.safetensors")
    found = load_file(streamed(tmp_path, "float32") / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("family", [*FAMILIES, *FUSED])
def test_other_families_stream_alike(tmp_path, family):
    model = trained(tmp_path, family, train_norms=True)
    model.merge_and_unload().save_pretrained(tmp_path / "peft")
    expected = load_file(tmp_path / "peft" / "model.safetensors")
    found = load_file(streamed(tmp_path, "float32") / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("options", [{}, {"shift": True}, {"adapt_embedding": True}])
def test_stock_transformers_answers_as_the_adapted_model(tmp_path, options):
    model = trained(tmp_path, changes={"tie_word_embeddings": True}, **options)
    with torch.no_grad():
        expected = model(text()).logits
        stock, problems = AutoModelForCausalLM.from_pretrained(
            streamed(tmp_path, "float32", shard_size=20_000), output_loading_info=True
        )
        assert not any(problems.values())
        assert torch.allclose(stock(text()).logits, expected, atol=1e-4)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2


def test_rounding_to_another_dtype_happens_once(tmp_path):
    model = trained(tmp_path, dtype=torch.bfloat16)
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    wide, _ = layer.merged_tensors(["default"])
    found = load_file(streamed(tmp_path, "float16") / "model.safetensors")
    assert torch.equal(found["model.layers.1.mlp.down_proj.weight"], wide.to(torch.float16))
    norm = model.get_submodule("base_model.model.model.norm").weight
    assert torch.equal(found["model.norm.weight"], norm.to(torch.float16))


def test_modules_that_were_saved_whole_are_taken_from_the_adapter(tmp_path):
    family_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, SanConfig(modules_to_save=["norm"]))
    norm = dict(model.named_parameters())[
        "base_model.model.model.norm.modules_to_save.default.weight"
    ]
    norm.data.uniform_()
    model.save_pretrained(tmp_path / "adapter")
    found = load_file(streamed(tmp_path, "float32") / "model.safetensors")
    assert torch.equal(found["model.norm.weight"], norm)


def test_rows_of_added_tokens_are_merged_and_counted_in_the_config(tmp_path):
    family_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(base.config.vocab_size + 2, mean_resizing=False)
    model = shake(get_peft_model(base, SanConfig()))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    stock = AutoModelForCausalLM.from_pretrained(streamed(tmp_path, "float32"))
    assert stock.config.vocab_size == base.config.vocab_size
    tokens = text().index_fill(1, torch.tensor([2]), base.config.vocab_size - 1)
    with torch.no_grad():
        assert torch.allclose(stock(tokens).logits, model(tokens).logits, atol=1e-4)


def test_old_rotary_buffers_are_left_behind(tmp_path):
    trained(tmp_path)
    path = tmp_path / "base" / "model.safetensors"
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**load_file(path), **extra}, path, metadata={"format": "pt"})
    assert not set(extra) & set(load_file(streamed(tmp_path, "float32") / "model.safetensors"))


def spoil(folder: Path, change: Any) -> None:
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


KEY = "base_model.model.model.layers.0.mlp.up_proj.san_gamma"
NORM = "base_model.model.model.layers.1.input_layernorm.san_weight"


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (lambda t: t[KEY].fill_(float("nan")), SanError, "not finite"),
        (lambda t: t.update({KEY: torch.ones(5)}), InputError, "another base"),
        (
            lambda t: t.update({KEY.replace(".0.", ".99."): t[KEY].clone()}),
            InputError,
            "belongs to nothing",
        ),
        (lambda t: t.pop(KEY), InputError, "no gamma for model.layers.0.mlp.up_proj"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(tmp_path, change, kind, said):
    trained(tmp_path)
    spoil(tmp_path, change)
    with pytest.raises(kind, match=said):
        streamed(tmp_path, "float32")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(NORM), r"has no model\.layers\.1\.input_layernorm\.san_weight, which"),
        (lambda t: t.update({NORM: torch.ones(5)}), "another base"),
        (lambda t: t.update({NORM.replace("weight", "bias"): t[NORM].clone()}), "to nothing"),
    ],
)
def test_a_trained_norm_that_does_not_fit_is_refused(tmp_path, change, said):
    trained(tmp_path, train_norms=True)
    spoil(tmp_path, change)
    with pytest.raises(InputError, match=said):
        streamed(tmp_path, "float32")


def test_a_family_that_cannot_hold_a_shift_is_refused(tmp_path):
    trained(tmp_path, "mistral", shift=True)
    with pytest.raises(InputError, match="mistral cannot hold the biases"):
        streamed(tmp_path, "float32")


def test_a_shift_of_modules_that_have_biases_is_merged_in_any_family(tmp_path):
    model = trained(tmp_path, "qwen2", shift=True, target_modules=["q_proj", "k_proj", "v_proj"])
    model.merge_and_unload().save_pretrained(tmp_path / "peft")
    expected = load_file(tmp_path / "peft" / "model.safetensors")
    found = load_file(streamed(tmp_path, "float32") / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_merge_loads_no_torch(tmp_path):
    trained(tmp_path)
    code = (
        "import sys; from pathlib import Path; from san_llm.merge.run import merge; "
        "from san_llm.merge.request import MergeRequest; "
        "from san_llm.models.subject import find_subject; "
        f"s = find_subject({str(tmp_path / 'base')!r}, Path({str(tmp_path / 'adapter')!r})); "
        f"merge(MergeRequest(s, Path({str(tmp_path / 'merged')!r}))); "
        "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_a_tied_head_or_embedding_that_was_trained_alone_parts_them(tmp_path, saved):
    model = trained(tmp_path, changes={"tie_word_embeddings": True}, modules_to_save=saved)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    wanted = model.eval()(input_ids=text()).logits
    stock = AutoModelForCausalLM.from_pretrained(streamed(tmp_path, "float32")).eval()
    assert stock.lm_head.weight is not stock.model.embed_tokens.weight
    torch.testing.assert_close(stock(input_ids=text()).logits, wanted, rtol=1e-4, atol=1e-5)
