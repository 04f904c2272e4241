"""Merged models against their bases: the scales that were merged in, found in the weights again."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from san.adapted import family_model
from transformers import AutoModelForCausalLM

from san_llm import SanConfig
from san_llm.diff import diff
from san_llm.errors import InputError
from san_llm.merge import merge
from san_llm.subject import find_subject

WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}


def made(family="llama", dtype=torch.float32, **options):
    """Merge scales around 1 into a base; return them by module."""
    family_model(family, dtype=dtype, **WIDE).save_pretrained("base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained("base"), SanConfig(**options))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "san_gamma" in name:
            parameter.data = 1 + 0.1 * torch.randn_like(parameter)
    model.save_pretrained("adapter")
    merge(find_subject("base", Path("adapter")), Path("merged"))
    saved = load_file("adapter/adapter_model.safetensors")
    ending = ".san_gamma"
    return {
        key.removeprefix("base_model.model.").removesuffix(ending): value.double().numpy()
        for key, value in saved.items()
    }


def found(result):
    return {(change.block, change.module): change for change in result.blocks}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"mode": "neuron"}),
        ("llama", {"links": ["residual"]}),
        ("phi3", {}),
        ("gemma", {}),
    ],
)
def test_the_scales_are_those_of_the_adapter(here, family, options, dtype):
    gammas = made(family, dtype, **options)
    after = found(diff(Path("merged"), "base"))
    assert len(after) == len(gammas)
    near = 1e-4 if dtype == torch.float32 else 5e-3
    for name, gamma in gammas.items():
        parts = name.split(".")
        change = after[int(parts[2]), parts[-1]]
        assert change.channels == len(gamma)
        worst = np.abs(gamma - 1).max()
        (channel, value), *_ = change.largest
        assert abs(value - gamma[channel]) < near
        assert abs(abs(value - 1) - worst) < near
        assert change.mean_change == pytest.approx(np.abs(gamma - 1).mean(), abs=near)
        surely, perhaps = (gamma > 1 + near).mean(), (gamma > 1 - near).mean()
        assert surely <= change.potentiated <= perhaps
        assert 0.05 < change.relative < 0.3


def test_a_change_that_is_no_scaling_is_told_by_its_size(here):
    family_model("llama", **WIDE).save_pretrained("base")
    config = LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained("base"), config)
    model.merge_and_unload().save_pretrained("merged")
    tensors = load_file("merged/model.safetensors")
    tensors["model.norm.weight"] *= 3
    save_file(tensors, "merged/model.safetensors", metadata={"format": "pt"})
    result = diff(Path("merged"), "base")
    after, before = tensors, load_file("base/model.safetensors")
    for change in result.blocks:
        if change.module == "q_proj":
            name = f"model.layers.{change.block}.self_attn.q_proj.weight"
            expected = (after[name] - before[name]).norm() / before[name].norm()
            assert change.relative == pytest.approx(expected.item(), rel=1e-5)
            assert (change.potentiated, change.mean_change, change.largest) == (None, None, [])
        elif change.module == "norm":
            assert change.relative == pytest.approx(2)
        else:
            assert (change.potentiated, change.relative) == (0, 0)
    assert sum(change.potentiated is None for change in result.blocks) == 4


def test_the_command_prints_a_table_and_json(command, here):
    made()
    done = command("diff", "merged", "base")
    assert done.returncode == 0, done.stderr
    assert "change %" in done.stdout
    assert len(max(done.stdout.splitlines(), key=len).rstrip()) <= 80
    value = json.loads(command("diff", "merged", "base", "--json").stdout)
    assert value["carrier"] == "merged"
    assert len(value["blocks"]) == 21
    done = command("diff", "merged")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: merged: a model; name its base, too: san-llm diff merged BASE\n"


def test_models_of_two_shapes_are_refused(here):
    family_model("llama", **WIDE).save_pretrained("base")
    family_model("llama", **(WIDE | {"intermediate_size": 128})).save_pretrained("other")
    with pytest.raises(InputError, match="has no counterpart of its shape in "):
        diff(Path("other"), "base")
