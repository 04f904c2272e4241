"""Any tuner of PEFT in the harness: what it trains, that it resumes, loads, merges, and packs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from tiny import save_tiny, tiny_config, tiny_model

from san_llm.data.batches import Pack, Pad
from san_llm.errors import InputError
from san_llm.merge.peft import fold
from san_llm.models.adapter import add_adapter, load_adapter, save_adapter, trainable_parameters
from san_llm.models.load import load_base
from san_llm.models.locate import find_base
from san_llm.models.quantize import dequantize
from san_llm.models.tuners import OVER_BITS, REFUSED, check_bits, on_meta
from san_llm.recipe.schema import Base, PeftMethod
from san_llm.train.checkpoint_check import _check_adapter
from san_llm.train.loss import token_losses
from san_llm.train.packed_attention import has_dropout, use_packed_attention

# Options without which a tuner does not fit a model of 32 features.
SMALL: dict[str, dict[str, Any]] = {
    "ADAMSS": {"r": 8},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 10},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "PSOFT": {"r": 4},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [5, 20]},
    "VBLORA": {"num_vectors": 16, "vector_length": 4},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 16},
}
TUNERS = sorted(
    kind.value
    for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()
    if hasattr(tuner, "merge_and_unload") and kind.value not in REFUSED
)
PROMPTS = sorted(
    kind.value
    for kind in PEFT_TYPE_TO_CONFIG_MAPPING
    if not hasattr(PEFT_TYPE_TO_TUNER_MAPPING.get(kind), "merge_and_unload")
)
# What they add has no place in a stock model's weights.
UNMERGED = {"BEFT"}
OWN_TARGETS = {"LN_TUNING", "TRAINABLE_TOKENS"}  # which are no Linears
ROWS = [
    {"input_ids": [5, 9, *range(20, 20 + more)], "labels": [-100, -100, *range(20, 20 + more)]}
    for more in (3, 9, 5, 6)
]
BASE = tiny_model(num_hidden_layers=2).requires_grad_(False)


def refusal(function: Any, *arguments: Any) -> str:
    with pytest.raises(InputError) as refused:
        function(*arguments)
    return str(refused.value)


def method(kind: str, **options: Any) -> PeftMethod:
    targets = None if kind in OWN_TARGETS else "all"
    config = {"peft_type": kind, **SMALL.get(kind, {}), **options}
    return PeftMethod(name="peft", config=config, target_modules=targets)


def adapted(kind: str) -> Any:
    torch.manual_seed(1)
    base = copy.deepcopy(BASE)
    model = add_adapter(base, method(kind)).train()
    use_packed_attention(base)
    return model


def step(model: Any, optimizer: torch.optim.Optimizer, collate: Any, size: int) -> list[Any]:
    """Make an optimizer step of all rows, ``size`` at once; return its gradients."""
    for start in range(0, len(ROWS), size):
        token_losses(model, collate(ROWS[start : start + size])).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [None if p.grad is None else p.grad.clone() for p in trained]
    optimizer.step()
    optimizer.zero_grad()
    return gradients


def adamw(model: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def apart(model: Any) -> float:
    """Return how far the gradients of rows that are packed together are from those of each."""
    alone = copy.deepcopy(model)
    packed = step(model, adamw(model), Pack(share=True), 4)
    padded = step(alone, adamw(alone), Pad(2), 1)
    assert [g is None for g in packed] == [g is None for g in padded]
    pairs = [(a, b) for a, b in zip(packed, padded, strict=True) if a is not None]
    scale = max(float(b.abs().max()) for _, b in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs) / scale


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.eval()(torch.tensor([[5, 9, 20, 21, 22, 23]])).logits
    return out


@pytest.mark.parametrize("kind", TUNERS)
def test_a_tuner_trains_resumes_loads_and_merges(kind: str, tmp_path: Path) -> None:
    model, first = adapted(kind), tmp_path / "first"
    assert (sum(p.numel() for p in model.parameters() if p.requires_grad)) > 0
    assert not has_dropout(model)
    assert not any(p.requires_grad for p in BASE.parameters())
    # The order of rows and the dice of a step follow from the seed, so equal starts stay equal.
    again = adapted(kind)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    if not method(kind).dropout:
        assert apart(copy.deepcopy(model)) < 1e-5, "a micro-batch changes the result"
    optimizer = adamw(model)
    torch.manual_seed(2)
    step(model, optimizer, Pack(share=False), 4)
    save_adapter(model, first)
    _check_adapter(first, model)
    moments = copy.deepcopy(optimizer.state_dict())
    torch.manual_seed(3)
    step(model, optimizer, Pack(share=False), 4)
    # Resumed as Trainer does it.
    again.load_adapter(str(first), "default", is_trainable=True)
    optimizer = adamw(again.train())
    optimizer.load_state_dict(moments)
    torch.manual_seed(3)
    step(again, optimizer, Pack(share=False), 4)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    # Saved and asked again by what its files say.
    save_adapter(model, tmp_path / "last")
    loaded = load_adapter(copy.deepcopy(BASE), tmp_path / "last")
    said = logits(model)
    assert torch.equal(logits(loaded), said)
    assert float((said - logits(BASE)).abs().max()) > 1e-4
    if kind in UNMERGED:
        assert "does not merge it" in refusal(fold, loaded, tmp_path / "last")
        return
    torch.testing.assert_close(logits(fold(loaded, tmp_path)), said, rtol=0, atol=3e-5)


@pytest.mark.parametrize("kind", TUNERS)
def test_what_it_trains_is_counted_without_numbers(kind: str) -> None:
    model = on_meta(method(kind), tiny_config(num_hidden_layers=2), "float32")
    if kind in ("ADAMSS", "FROD", "SHIRA"):  # which look at the base's numbers
        assert model is None
        return
    assert model is not None
    assert trainable_parameters(model) == trainable_parameters(adapted(kind))


def test_one_whose_answers_depend_on_the_batch_would_be_found() -> None:
    cls = PEFT_TYPE_TO_CONFIG_MAPPING["LILY"]
    config: PeftConfig = cls(target_modules=["q_proj", "v_proj", "down_proj"])
    base = copy.deepcopy(BASE)
    torch.manual_seed(1)
    model = get_peft_model(base, config).train()
    use_packed_attention(base)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.3)
    assert apart(model) > 1e-4


@pytest.mark.parametrize("kind", [*PROMPTS, *REFUSED])
def test_one_that_cannot_run_here_is_refused_with_the_reason(kind: str) -> None:
    line = refusal(add_adapter, copy.deepcopy(BASE), method(kind))
    why = REFUSED.get(kind, "it puts a prompt of its own before a text")
    assert line.startswith(f"method.config.peft_type {kind}: {why}")
    assert "\n" not in line


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"peft_type": "VERRA"}, "peft_type: 'VERRA' is not one of "),
        ({"peft_type": "VERRA"}, "(did you mean 'VERA'?)"),
        ({"peft_type": "vera", "d_inital": 0.1}, "d_inital: no option of VERA (did you mean 'd_"),
        ({"peft_type": "vera", "task_type": "X"}, "task_type: no option of VERA"),
        ({"peft_type": "HRA", "r": "eight"}, "PEFT does not take it as HRA: "),
        ({"peft_type": "ROAD", "group_size": 5}, "PEFT does not take it as ROAD: "),
        ({"peft_type": "VERA", "r": 0}, "PEFT does not take it as VERA: "),
        ({"peft_type": "VERA", "target_modules": ["q_prj"]}, "PEFT does not take it as VERA: "),
    ],
)
def test_what_peft_does_not_take_is_told_before_there_are_weights(
    config: dict[str, Any], says: str
) -> None:
    named = PeftMethod(name="peft", config=config)
    line = refusal(on_meta, named, tiny_config(num_hidden_layers=1), "float32")
    assert line.startswith("method.config")
    assert says in line
    assert "\n" not in line


@pytest.fixture(scope="module", params=["4bit", "8bit"])
def quantized(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what gives a quantized model of a block, and the plain one of its numbers."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    base = save_tiny(tmp_path_factory.mktemp("base") / "wide", **sizes)
    found = find_base(Base(model=str(base), dtype="float32", quantization=request.param))
    return lambda: (load_base(found), dequantize(load_base(found)).requires_grad_(False))


@pytest.mark.parametrize("kind", sorted(OVER_BITS & {*TUNERS}))
def test_over_a_quantized_base_it_computes_with_the_numbers(kind: str, quantized: Any) -> None:
    models = []
    for base in quantized():
        torch.manual_seed(1)
        model = add_adapter(base, method(kind))
        for parameter in model.parameters():
            if parameter.requires_grad:
                drawn = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(2))
                parameter.data.add_(drawn, alpha=0.1)
        models.append(model)
    # As in training: 8-bit layers round what they read when they only answer.
    over_bits, plain, base = (in_training(m) for m in (*models, quantized()[1]))
    moved = float((plain - base).abs().max())
    assert moved > 0.05
    assert float((over_bits - plain).abs().max()) < 1e-3 * moved


def in_training(model: Any) -> torch.Tensor:
    torch.manual_seed(3)
    with torch.no_grad():
        out: torch.Tensor = model.train()(torch.tensor([[5, 9, 20, 21, 22, 23]])).logits
    return out


def test_one_that_takes_codes_for_numbers_is_refused() -> None:
    check_bits(method("HRA"), None)
    check_bits(method("ROAD"), "4bit")
    line = refusal(check_bits, method("HRA"), "8bit")
    assert line.startswith("method.config.peft_type HRA: does not read a base in 8bit; those that")


def test_one_that_would_train_in_16_bits_is_refused() -> None:
    model = tiny_model(dtype=torch.bfloat16, num_hidden_layers=1).requires_grad_(False)
    with pytest.raises(InputError, match="LN_TUNING trains numbers in the base's 16 bits"):
        add_adapter(model, method("LN_TUNING"))
