"""What a GPU computes is what the CPU computes in fp32: forms, packing, 4 bits, answers, commands.

Skipped without a GPU. ``SAN_LLM_GPU=cpu`` lets the CPU stand in for it, which tries the tests
themselves. Bounds are relative: of a loss to its own size, of gradients to the norm of all of them.
fp32 differs in the order of sums; bf16 has 8 bits, and 4 bits are compared with the same numbers in
fp32.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from san.adapted import adapt, family_model
from tiny import rows, tiny_model, tiny_tokenizer, write_recipe, write_rows
from torch import Tensor

from san_llm.ask.answers import answers
from san_llm.ask.likelihood import ChoiceQuestion, score_choices
from san_llm.data.batches import Pack, Pad
from san_llm.data.encode import IGNORE
from san_llm.models.load import load_base
from san_llm.models.locate import find_base
from san_llm.models.quantize import dequantize
from san_llm.recipe.schema import Base
from san_llm.train.loss import token_losses
from san_llm.train.packed_attention import use_packed_attention

DEVICE = torch.device(os.environ.get("SAN_LLM_GPU", "cuda"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="no GPU"),
]
# (loss, gradients) by the dtype on the GPU; both are held against fp32 on the CPU.
BOUNDS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-2, 0.15)}
CARRIERS: dict[str, dict[str, Any]] = {
    "scale": {},
    "lora": {"carrier": "lora", "r": 4, "lora_alpha": 6},
    "dora": {"carrier": "dora", "r": 4, "lora_alpha": 6},
}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
Measured = tuple[float, dict[str, Tensor]]


def pieces() -> list[dict[str, list[int]]]:
    """Return rows of 5 to 60 tokens that begin alike, of which the last two thirds are learned."""
    generator = torch.Generator().manual_seed(5)
    begin = torch.randint(4, 90, (40,), generator=generator).tolist()
    found = []
    for length in (5, 17, 33, 60, 41):
        ids = (
            begin[: length // 3]
            + torch.randint(4, 90, (length - length // 3,), generator=generator).tolist()
        )
        found.append({"input_ids": ids, "labels": [IGNORE] * (length // 3) + ids[length // 3 :]})
    return found


def moved(inputs: Any, device: torch.device) -> Any:
    """Return a batch on a device."""
    if isinstance(inputs, dict):
        return {key: moved(value, device) for key, value in inputs.items()}
    return inputs.to(device) if isinstance(inputs, Tensor) else inputs


def measured(model: Any, batch: dict[str, Any]) -> Measured:
    """Return the loss of a batch on the model's device, and the gradient of all that is trained."""
    model.zero_grad()
    loss = token_losses(model, moved(batch, model.device))
    loss.backward()
    found = {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), found


def assert_near(found: Measured, expected: Measured, bounds: tuple[float, float]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=bounds[0])
    assert found[1].keys() == expected[1].keys()
    whole = torch.cat([gradient.flatten() for gradient in expected[1].values()]).norm()
    for name, gradient in expected[1].items():
        assert ((found[1][name] - gradient).norm() / whole).item() < bounds[1], name


def on_gpu(model: Any, dtype: torch.dtype) -> Any:
    """Return a copy of an adapted model, its frozen part in a dtype as a run would load it."""
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return copied.to(DEVICE)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_the_lean_form_is_the_plain_one_on_a_cpu(
    family: str, carrier: str, dtype: torch.dtype
) -> None:
    batch = Pad(2)(pieces())
    plain, lean = (
        adapt(family_model(family), form=form, **CARRIERS[carrier]) for form in ("plain", "lean")
    )
    for model in (plain, lean):
        for name, parameter in model.named_parameters():
            if ".san_lora_" in name:
                parameter.data.mul_(0.1)
    assert_near(measured(on_gpu(lean, dtype), batch), measured(plain, batch), BOUNDS[dtype])


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}], ids=str)
def test_packed_rows_are_the_padded_ones_on_a_cpu(
    changes: dict[str, Any], share: bool, dtype: torch.dtype
) -> None:
    padded = adapt(tiny_model(**changes))
    packed = on_gpu(padded, dtype)
    use_packed_attention(packed.get_base_model())
    found = measured(packed, Pack(share)(pieces()))
    assert_near(found, measured(padded, Pad(2)(pieces())), BOUNDS[dtype])


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("method", [*CARRIERS, "LoRA"])
@pytest.mark.parametrize("double", [True, False])
def test_4_bits_are_the_same_numbers_in_fp32_on_a_cpu(
    here: Path, method: str, double: bool, dtype: torch.dtype
) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_model(**SIZES).save_pretrained(here / "base")
    named = Base(
        model=str(here / "base"),
        dtype="float32" if dtype == torch.float32 else "bfloat16",
        quantization="4bit",
        double_quant=double,
    )

    def adapted(base: Any) -> Any:
        torch.manual_seed(0)
        if method == "LoRA":
            return get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
        model = adapt(base, **CARRIERS[method])
        for name, parameter in model.named_parameters():
            if ".san_lora_" in name:
                parameter.data.mul_(0.1)
        return model

    quantized = load_base(find_base(named), place=DEVICE).eval()
    wide = dequantize(load_base(find_base(named), place=DEVICE)).to("cpu").eval()
    batch = Pad(2)(pieces())
    model = adapted(quantized)
    reference = adapted(wide)
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in reference.named_parameters():
        if name in weights:  # LoRA's start is drawn on its device
            parameter.data.copy_(weights[name].data.cpu())
    assert_near(measured(model, batch), measured(reference, batch), BOUNDS[dtype])


@pytest.fixture
def speakers() -> tuple[Any, Any]:
    """The same adapted model, sure of its words, on the GPU and on the CPU."""
    model = adapt(tiny_model())
    model.get_base_model().lm_head.weight.data.mul_(4)
    return on_gpu(model, torch.float32).eval(), model.eval()


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_answers_are_those_of_the_cpu_whatever_the_batch(
    speakers: tuple[Any, Any], batch_size: int | None
) -> None:
    prompts = [row["input_ids"] for row in pieces()]

    def texts(model: Any, size: int | None) -> dict[int, str]:
        told = answers(model, tiny_tokenizer(), prompts, size)
        return {number: text for some in told for number, text in some}

    gpu, cpu = speakers
    assert texts(gpu, batch_size) == texts(cpu, 1)


def test_likelihoods_are_those_of_the_cpu(speakers: tuple[Any, Any]) -> None:
    questions = [ChoiceQuestion("Is 4 even?", (" true", " false")), ChoiceQuestion("ab", ("c",))]
    gpu, cpu = (list(score_choices(model, tiny_tokenizer(), questions)) for model in speakers)
    for ours, expected in zip(gpu, cpu, strict=True):
        for one, two in zip(ours, expected, strict=True):
            assert one.logprob == pytest.approx(two.logprob, rel=1e-4)
            assert one.greedy == two.greedy


def trained(cli: Cli, recipe: Path, output: str, *words: object, **environment: str) -> Any:
    done = cli("train", recipe, "--output", output, *words, **environment)
    assert done.returncode == 0, done.stderr
    return load_file(recipe.parent / output / "adapter" / "adapter_model.safetensors")


def assert_same_run(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert ((two[name] - tensor).norm() / tensor.norm()).item() < 1e-3, name


@pytest.mark.fresh
@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_run_comes_to_the_weights_of_a_cpu_and_its_model_is_merged_and_verified(
    cli: Cli, here: Path, tiny_base: Path, carrier: str
) -> None:
    low_rank = {} if carrier == "scale" else {"rank": 4, "alpha": 8, "dropout": 0.0}
    data = write_rows(here / "rows.json", rows(24))
    recipe = write_recipe(here / "r.yaml", tiny_base, data, method={"carrier": carrier, **low_rank})
    on_cpu = trained(cli, recipe, "cpu", CUDA_VISIBLE_DEVICES="")
    assert_same_run(on_cpu, trained(cli, recipe, "gpu"))
    for command in (
        ["merge", "gpu", "--verify", "--output", "merged"],
        ["generate", "Is 4 even?", "--adapter", "gpu"],
        ["generate", "Is 4 even?", "--model", "merged"],
    ):
        done = cli(*command)
        assert done.returncode == 0, done.stderr


@pytest.mark.fresh
def test_a_run_over_4_bits_is_made_and_merged_both_ways(cli: Cli, here: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_model(**SIZES).save_pretrained(here / "base")
    tiny_tokenizer().save_pretrained(here / "base")
    data = write_rows(here / "rows.json", rows(24))
    quantized = {"quantization": "4bit", "dtype": "bfloat16"}
    trained(cli, write_recipe(here / "r.yaml", here / "base", data, base=quantized), "run")
    for way in ("keep", "dequantize"):
        done = cli("merge", "run", "--quantized", way, "--verify", "--output", way)
        assert done.returncode == 0, done.stderr


@pytest.mark.fresh
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_gpus_come_to_the_weights_of_one(
    cli: Cli, here: Path, tiny_base: Path, engine: str
) -> None:
    data = write_rows(here / "rows.json", rows(24))
    recipe = write_recipe(here / "r.yaml", tiny_base, data)
    one = trained(cli, recipe, "one", CUDA_VISIBLE_DEVICES="0")
    two = trained(cli, recipe, "two", "--accelerate", engine, "--processes", 2)
    assert_same_run(one, two)
