"""What training changed, against the scales worked out plainly from dense weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from san.adapted import adapt, family_model
from tiny import rows, save_tiny, tiny_model, write_recipe, write_rows
from transformers import AutoModelForCausalLM

from san_llm.errors import InputError, SanError
from san_llm.look.diff import diff
from san_llm.recipe.read import load_recipe
from san_llm.runs.folder import new_run, point_latest

PREFIX = "base_model.model."


@pytest.fixture
def made(here, tiny_base):
    """Save an adapter over the tiny base; return its file's tensors."""

    def make(**options):
        base = AutoModelForCausalLM.from_pretrained(tiny_base)
        adapt(base, **options).save_pretrained(here / "adapter")
        return load_file(here / "adapter" / "adapter_model.safetensors")

    return make


def plain(gamma, named=3):
    """Return the numbers that a report has about a vector of scales."""
    order = sorted(range(len(gamma)), key=lambda i: -abs(gamma[i] - 1))[:named]
    return {
        "channels": len(gamma),
        "potentiated": sum(g > 1 + 1e-6 for g in gamma) / len(gamma),
        "depressed": sum(g < 1 - 1e-6 for g in gamma) / len(gamma),
        "mean_change": pytest.approx(sum(abs(g - 1) for g in gamma) / len(gamma)),
        "largest": [(i, pytest.approx(gamma[i])) for i in order],
    }


def numbers(change):
    return {key: getattr(change, key) for key in plain([1.0])}


@pytest.mark.parametrize("options", [{}, {"mode": "synapse"}, {"adapt_embedding": True}])
def test_every_vector_of_the_scale_carrier_is_counted(made, options):
    saved = made(**options)
    result = diff(Path("adapter"))
    assert len(result.blocks) == len(saved)
    assert (result.carrier, result.mode) == ("scale", options.get("mode", "both"))
    every = []
    for change in result.blocks:
        name = "model.embed_tokens"
        if change.block is not None:
            attention = change.module[0] in "qkvo"
            name = f"model.layers.{change.block}.{'self_attn' if attention else 'mlp'}"
            name += f".{change.module}"
        gamma = saved[f"{PREFIX}{name}.san_gamma"].double().tolist()
        assert numbers(change) == plain(gamma), name
        every += gamma
    assert numbers(result.total) == plain(every, named=0)
    assert result.columns == []
    for total in result.modules:
        parts = [change for change in result.blocks if change.module == total.module]
        share = sum(c.channels * c.potentiated for c in parts) / sum(c.channels for c in parts)
        assert total.potentiated == pytest.approx(share)
        assert total.block is None


@pytest.mark.parametrize("carrier", ["scale", "dora"])
def test_column_scales_of_their_own_are_counted_beside_the_neuron_scales(command, made, carrier):
    saved = made(carrier=carrier, links="free")
    result = diff(Path("adapter"))
    assert [change.module for change in result.columns] == [*(f"{m}_proj" for m in (
        "q", "k", "v", "o", "gate", "up", "down")), "all"]  # fmt: skip
    every = []
    for change in result.columns[:-1]:
        held = [saved[name] for name in saved if f"{change.module}.san_sigma" in name]
        sigma = torch.cat(held).double().tolist()
        assert numbers(change) == plain(sigma, named=0), change.module
        every += sigma
    assert numbers(result.columns[-1])["potentiated"] == plain(every)["potentiated"]
    assert len(result.blocks) == 28
    assert "columns of" in command("diff", "adapter").stdout


def test_what_is_added_to_trained_norms_is_counted_beside_the_scales(command, here, tiny_base):
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    adapted = adapt(base, train_norms=True)
    for number, (name, parameter) in enumerate(adapted.named_parameters()):
        if ".san_weight" in name:
            parameter.data.zero_()[:2] += torch.tensor([0.5, -0.25]) * (number + 1)
    adapted.save_pretrained(here / "adapter")
    saved = load_file(here / "adapter" / "adapter_model.safetensors")
    found = diff(Path("adapter")).norms
    blocks = adapted.config.num_hidden_layers
    names = ("input_layernorm.weight", "post_attention_layernorm.weight")
    of_blocks = [(block, name) for block in range(blocks) for name in names]
    assert [(change.block, change.module) for change in found] == [
        *of_blocks, (None, "norm.weight")
    ]  # fmt: skip
    for change in found:
        inside = "" if change.block is None else f"layers.{change.block}."
        module = change.module.removesuffix(".weight")
        added = saved[f"{PREFIX}model.{inside}{module}.san_weight"].double()
        assert change.potentiated == change.depressed == 1 / len(added)
        assert change.mean_change == pytest.approx(added.abs().mean().item())
        assert change.largest[:2] == [(0, added[0].item()), (1, added[1].item())]
    text = command("diff", "adapter").stdout
    assert "channel:added" in text
    assert "norm.weight" in text


@pytest.mark.parametrize("mode", ["both", "neuron", "synapse"])
@pytest.mark.parametrize("carrier", ["lora", "dora"])
def test_the_scales_of_low_rank_carriers_are_ratios_of_dense_row_norms(
    made, tiny_base, carrier, mode
):
    saved = {k: v.double().numpy() for k, v in made(carrier=carrier, mode=mode, r=4).items()}
    base = load_file(tiny_base / "model.safetensors")
    result = diff(Path("adapter"), str(tiny_base))
    found = {(change.block, change.module): change for change in result.blocks}
    count = 0
    for name, value in base.items():
        module = name.removesuffix(".weight")
        if "proj" not in module:
            continue
        weight = value.double().numpy()
        key = f"{PREFIX}{module}.san_"
        if carrier == "lora":
            low_rank = 16 / 4 * saved[f"{key}lora_B"] @ saved[f"{key}lora_A"]
            top = np.linalg.norm(weight + low_rank, axis=1)
        elif f"{key}magnitude" in saved:
            top = saved[f"{key}magnitude"]
        else:
            assert mode == "synapse"  # where only what is read has one
            continue
        block = int(module.split(".")[2])
        gamma = top / np.linalg.norm(weight, axis=1)
        assert numbers(found[block, module.split(".")[-1]]) == plain(gamma.tolist()), module
        count += 1
    assert count == len(result.blocks) >= 4 * 4 - 1


@pytest.mark.parametrize("carrier", ["scale", "lora", "dora"])
def test_an_adapter_at_its_start_changes_nothing(here, tiny_base, carrier):
    from san_llm import SanConfig

    model = get_peft_model(tiny_model(), SanConfig(carrier=carrier, r=4))
    model.save_pretrained("adapter")
    result = diff(Path("adapter"), str(tiny_base))
    assert len(result.blocks) == 28
    assert (result.total.potentiated, result.total.depressed) == (0, 0)
    assert result.total.mean_change < 1e-6


def test_fused_projections_are_counted_whole(here):
    family_model("phi3").save_pretrained("base")
    model = adapt(AutoModelForCausalLM.from_pretrained("base"))
    model.save_pretrained("adapter")
    result = diff(Path("adapter"), "base")
    assert [change.module for change in result.blocks[:4]] == [
        *("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    ]
    assert result.blocks[2].channels == 2 * 48


def test_blocks_come_in_the_order_of_the_model(here):
    save_tiny(here / "base", num_hidden_layers=11)
    adapt(AutoModelForCausalLM.from_pretrained("base")).save_pretrained("adapter")
    for base in (None, "base"):
        result = diff(Path("adapter"), base)
        assert [change.block for change in result.blocks] == [n // 7 for n in range(77)]
        assert [change.module[0] for change in result.blocks[-7:]] == list("qkvogud")


# --- at the command line ---


@pytest.fixture
def run(here, made, tiny_base):
    """A finished run with an adapter."""
    data = write_rows(here / "rows.json", rows(8))
    folder = new_run(
        load_recipe(write_recipe(here / "mine.yaml", tiny_base, data), []), None, False
    )
    made()
    os.rename("adapter", folder / "adapter")
    point_latest(folder)
    return folder


def test_a_run_its_adapter_and_the_last_run_are_the_same(command, run, tiny_base):
    asked = ([], [run], [run / "adapter"], ["runs/latest", tiny_base])
    said = [json.loads(command("diff", *words, "--json").stdout) for words in asked]
    assert {one.pop("adapter") for one in said} == {str(run / "adapter"), "runs/latest/adapter"}
    assert said[0] == said[1] == said[2] == said[3]
    assert said[0]["base"] == str(tiny_base)
    assert len(said[0]["blocks"]) == 28


def test_the_table_shows_every_module_and_every_block(command, run):
    done = command("diff")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    first = json.loads(command("diff", "--json").stdout)["blocks"][0]
    (row,) = [line.split() for line in lines if line.split()[:2] == ["0", "q_proj"]]
    assert row[2:6] == [
        *("32", f"{100 * first['potentiated']:.1f}"),
        *(f"{100 * first['depressed']:.1f}", f"{first['mean_change']:.4f}"),
    ]
    assert " ".join(row[6:]) == " ".join(f"{c}:{gamma:.3f}" for c, gamma in first["largest"])
    assert sum(line.split()[:1] == ["all"] for line in lines) == 1
    assert len([line for line in lines if "_proj" in line]) == 28 + 7


def test_the_low_rank_carriers_load_no_torch_either(made, tiny_base):
    made(carrier="dora", r=4)
    code = (
        "import sys; from san_llm.cli import app\n"
        f"app(['diff', 'adapter', {str(tiny_base)!r}], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_what_has_no_scales_or_does_not_fit_is_refused(made, here, tiny_base):
    saved = made()
    path = here / "adapter" / "adapter_model.safetensors"
    save_tiny(here / "other", hidden_size=64)
    with pytest.raises(InputError, match=r"q_proj.san_gamma has the shape .*other asks for"):
        diff(Path("adapter"), "other")
    save_tiny(here / "short", num_hidden_layers=2)
    with pytest.raises(InputError, match=r"layers.2.* belongs to nothing in .*short"):
        diff(Path("adapter"), "short")
    save_tiny(here / "long", num_hidden_layers=5)
    with pytest.raises(InputError, match=r"no gamma for model.layers.4.self_attn.q_proj of .*long"):
        diff(Path("adapter"), "long")
    name = f"{PREFIX}model.layers.0.mlp.up_proj.san_gamma"
    save_file(saved | {name: saved[name] * float("nan")}, path)
    with pytest.raises(SanError, match="up_proj has numbers that are not finite"):
        diff(Path("adapter"))
    path.write_bytes(b"")
    with pytest.raises(InputError, match="not a safetensors file"):
        diff(Path("adapter"))
    path.unlink()
    with pytest.raises(InputError, match=r"not an adapter: no adapter_model.safetensors in it"):
        diff(Path("adapter"))
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained("lora")
    with pytest.raises(InputError, match="lora: a LORA adapter: only SAN's have neuron scales"):
        diff(Path("lora"))
    with pytest.raises(InputError, match=r"nowhere: not an adapter: no adapter_config.json in it"):
        diff(Path("nowhere"))
    with pytest.raises(InputError, match="no run yet"):
        diff()
    made(carrier="lora", r=4)
    saved = load_file(path)
    save_file({k: v for k, v in saved.items() if "layers.1.mlp.up_proj" not in k}, path)
    with pytest.raises(InputError, match=r"no low-rank matrices for model.layers.1.mlp.up_proj"):
        diff(Path("adapter"), str(tiny_base))
    assert torch.isfinite(saved[f"{PREFIX}model.layers.0.mlp.up_proj.san_lora_B"]).all()
