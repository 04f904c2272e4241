"""Packed rows: the layout, and that no row's loss or gradient changes, in any family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, get_peft_model
from san.adapted import FAMILIES, FUSED, adapt, family_model
from tiny import tiny_model
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from san_llm.data.batches import Pack, Pad
from san_llm.data.encode import IGNORE
from san_llm.ops import causal
from san_llm.ops.causal import Segment
from san_llm.train.loss import learned_tokens, token_losses
from san_llm.train.packed_attention import can_pack, has_dropout, use_packed_attention

Row = dict[str, list[int]]

# Few tokens, so that rows often begin alike, or are one another's beginning, or the same.
tokens = st.lists(st.integers(4, 6), min_size=1, max_size=9)


@st.composite
def batches(draw: Any) -> list[Row]:
    """Return rows that begin alike or not, learned anywhere, one perhaps nowhere."""
    beginning = draw(tokens)
    rows = []
    for ids in draw(st.lists(tokens, min_size=1, max_size=5)):
        ids = beginning + ids if draw(st.booleans()) else ids
        learned = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        learned[0] = False
        labels = [token if on else IGNORE for token, on in zip(ids, learned, strict=True)]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def example() -> list[Row]:
    ids = [[4, 5, 6, 7, 8, 9, 10, 11], [4, 5, 6, 7, 9, 9, 12], [4, 5, 13, 14, 8, 7, 6, 5, 4], [4]]
    labels = [[IGNORE] * min(3, len(row)) + row[3:] for row in ids]
    return [{"input_ids": i, "labels": own} for i, own in zip(ids, labels, strict=True)]


def one_by_one(model: Any, rows: list[Row]) -> torch.Tensor:
    """Return the summed loss of the rows, each alone in the stock model: nothing is packed."""
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        if (labels != IGNORE).any():
            total = total + F.cross_entropy(logits.double(), labels, reduction="sum")
    return total


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    if loss.requires_grad:
        loss.backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def assert_same(model: Any, rows: list[Row], share: bool, bound: float) -> None:
    expected = one_by_one(model, rows)
    wanted = gradients(model, expected)
    use_packed_attention(model.base_model.model)
    batch = Pack(share)(rows)
    loss = token_losses(model, batch)
    found = gradients(model, loss)
    assert loss.item() == pytest.approx(expected.item(), rel=bound, abs=bound)
    largest = max(gradient.abs().max().item() for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max().item() <= bound * max(largest, 1), name


@settings(deadline=None, max_examples=60)
@given(
    rows=batches(),
    share=st.booleans(),
    family=st.sampled_from([name for name in (*FAMILIES, *FUSED) if name != "gemma2"]),
    window=st.sampled_from([None, 3]),
    block=st.sampled_from([2, 256]),
)
def test_no_row_learns_anything_else_in_any_family(rows, share, family, window, block):
    changes: dict[str, Any] = {"num_hidden_layers": 2}
    if window is not None:
        changes |= {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 1}
    model = adapt(family_model(family, torch.float64, **changes))
    # Rotary angles and Gemma's scaling of the embeddings are not float64 anywhere.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(causal, "BLOCK", block)
        assert_same(model, rows, share, 1e-10)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False),
        LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, use_dora=True),
        IA3Config(
            target_modules=["k_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            init_ia3_weights=False,
        ),
    ],
    ids=["lora", "dora", "ia3"],
)
def test_nor_with_another_method(config, share):
    assert_same(get_peft_model(tiny_model(), config), example(), share, 1e-5)


@pytest.mark.parametrize("carrier", ["scale", "lora", "dora"])
def test_nor_with_gradient_checkpointing(carrier):
    model = adapt(tiny_model(), carrier=carrier).train()
    use_packed_attention(model.base_model.model)
    batch = Pack(share=True)(example())
    wanted = gradients(model, token_losses(model, batch))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, gradient in gradients(model, token_losses(model, batch)).items():
        assert torch.allclose(gradient, wanted[name], rtol=1e-5, atol=1e-6), name


class Largest(TorchDispatchMode):
    """Notes the numbers of the largest tensor that is made while it is on."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // 2)
        return out


LONG = {
    "one long row": ((), (240,)),
    "long rows that share nothing": ((), (120, 60, 60)),
    "long rows behind one prompt": (range(40, 80), (80, 80, 40)),
    "a long prompt": (range(10, 90), (50, 50, 60)),
    "a prompt of some rows": (range(40, 80), (80, 80, 0, 40)),
}


def long_rows(prompt: Sequence[int], lengths: Sequence[int], times: int = 1) -> list[Row]:
    """Return rows of an own length behind a prompt; a row of 0 is another, without the prompt."""
    rows = []
    for number, length in enumerate(lengths):
        begin = [] if not length else [*prompt] * times
        own = [4 + (7 * number + 3 * i * i) % 90 for i in range((length or 40) * times)]
        own[0] = 4 + number  # so that no two go on alike
        rows.append(
            {"input_ids": begin + own, "labels": [IGNORE] * max(1, len(begin)) + own[not begin :]}
        )
    return rows


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LONG)
def test_nothing_that_is_made_grows_with_the_square_of_a_row(kind, dtype, window, monkeypatch):
    monkeypatch.setattr(causal, "BLOCK", 16)
    monkeypatch.setattr(causal, "FEW", 8)
    changes = {"num_hidden_layers": 1, "sliding_window": window}
    model = adapt(family_model("mistral", dtype, **changes))
    use_packed_attention(model.base_model.model)
    largest = []
    for times in (2, 4):
        batch = Pack(share=True)(long_rows(*LONG[kind], times))
        with Largest() as made:
            token_losses(model, batch).backward()
        largest.append(made.numbers)
    assert largest[1] <= 2.2 * largest[0]


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", LONG)
def test_long_rows_learn_nothing_else(kind, checkpointing, window, monkeypatch):
    monkeypatch.setattr(causal, "BLOCK", 16)
    model = adapt(
        family_model("mistral", torch.float64, num_hidden_layers=2, sliding_window=window)
    )
    if checkpointing:
        model.train().enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(model, long_rows(*LONG[kind]), share=True, bound=1e-10)


def test_a_shared_beginning_stands_once_and_the_unused_end_not_at_all():
    batch = Pack(share=True)(example())
    # A tree of 7 tokens, 2 that leave it after four and 6 after two; the last learned token of a
    # row is an answer, never a question.
    assert batch["input_ids"].tolist() == [[4, 5, 6, 7, 8, 9, 10, 9, 9, 13, 14, 8, 7, 6, 5]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 4, 5, 2, 3, 4, 5, 6, 7]]
    assert batch["labels"].tolist() == [7, 8, 9, 10, 11, 7, 9, 9, 12, 14, 8, 7, 6, 5, 4]
    assert learned_tokens(batch) == 15
    # The last row has no token of its own.
    assert batch["layout"] == [
        Segment(0, 7),
        Segment(7, 9, ((0, 4),)),
        Segment(9, 15, ((0, 2),)),
    ]


def test_a_row_goes_on_from_a_row_that_goes_on():
    ids = [[4, 5, 6, 7, 8], [4, 5, 9, 9, 10], [4, 5, 9, 9, 4, 6]]
    batch = Pack(share=True)([{"input_ids": row, "labels": [IGNORE, *row[1:]]} for row in ids])
    assert batch["layout"][2] == Segment(6, 7, ((0, 2), (4, 6)))


def test_without_sharing_every_row_has_its_own_tokens():
    batch = Pack(share=False)(example())
    assert batch["input_ids"].shape == (1, 7 + 6 + 8 + 1)
    assert batch["position_ids"][0].tolist() == [*range(7), *range(6), *range(8), 0]


def test_a_batch_of_fillers_alone_teaches_nothing():
    model = adapt(tiny_model())
    use_packed_attention(model.base_model.model)
    loss = token_losses(model, Pack(share=True)([{"input_ids": [4], "labels": [IGNORE]}] * 2))
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(model, loss).values())


def test_a_model_with_packed_attention_still_takes_padded_batches_and_generates():
    model = tiny_model()
    ids = torch.tensor([[4, 5, 6, 7], [2, 2, 8, 9]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    padded = Pad(2)(example())
    loss = token_losses(model, padded)
    use_packed_attention(model)
    assert torch.equal(
        model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False), expected
    )
    assert token_losses(model, padded).item() == loss.item()


def test_what_packs_and_what_draws_at_random():
    assert can_pack(tiny_model())
    assert not can_pack(family_model("gemma2"))  # its capped scores are not SDPA's
    eager = tiny_model()
    eager.set_attn_implementation("eager")
    assert not can_pack(eager)
    assert not has_dropout(adapt(tiny_model()))
    assert has_dropout(tiny_model(attention_dropout=0.1))
    dropping = LoraConfig(target_modules=["q_proj"], lora_dropout=0.1)
    assert has_dropout(get_peft_model(tiny_model(), dropping))


def test_in_bf16_packed_rows_are_as_near_the_truth_as_padded_ones():
    def moved(dtype: torch.dtype) -> Any:
        return adapt(tiny_model(dtype=torch.bfloat16).to(dtype))

    def flat(found: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([gradient.flatten().double() for gradient in found.values()])

    low, rows = moved(torch.bfloat16), example()
    wide = moved(torch.float32)
    truth = flat(gradients(wide, one_by_one(wide, rows)))
    padded = flat(gradients(low, token_losses(low, Pad(2)(rows))))
    use_packed_attention(low.base_model.model)
    packed = flat(gradients(low, token_losses(low, Pack(share=True)(rows))))
    assert (packed - truth).norm() <= 1.5 * (padded - truth).norm()
    assert (packed - truth).norm() <= 0.15 * truth.norm()
