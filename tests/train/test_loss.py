"""The loss against plain cross entropy over all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from san.adapted import family_model
from tiny import tiny_model
from torch.nn import functional as F

from san_llm import SanConfig
from san_llm.data.batches import Pack, Pad
from san_llm.data.encode import IGNORE
from san_llm.train.loss import learned_tokens, share_of_loss, token_losses
from san_llm.train.packed_attention import use_packed_attention


def batch(learned: str) -> dict[str, torch.Tensor]:
    """Return 3 rows of 17 tokens, the last 4 of them padding in the second row."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 90, (3, 17), generator=generator)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[1, 13:], mask[1, 13:] = IGNORE, 0
    if learned == "some":
        labels[:, :9] = IGNORE
        labels[2] = IGNORE
    if learned == "none":
        labels[:] = IGNORE
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain_loss(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    targets = inputs["labels"][:, 1:].flatten()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="sum")


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("learned", ["all", "some"])
@pytest.mark.parametrize("at_once", [2**24, 450, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_are_those_of_all_logits(learned, at_once, tied, monkeypatch):
    monkeypatch.setattr("san_llm.ops.head_loss.LOGITS_AT_ONCE", at_once)
    model = get_peft_model(tiny_model(tie_word_embeddings=tied), SanConfig())
    inputs = batch(learned)
    expected = plain_loss(model, inputs)
    wanted = gradients(model, expected)
    loss = token_losses(model, inputs)
    found = gradients(model, loss)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("trained", [False, True])
def test_capped_logits_give_their_loss_and_the_cap_stays_in_the_config(trained):
    model = family_model("gemma2", final_logit_softcapping=2.0)
    model.requires_grad_(trained)
    inputs = batch("some")
    uncapped = family_model("gemma2", final_logit_softcapping=None)
    expected = plain_loss(model, inputs)
    assert abs(plain_loss(uncapped, inputs) - expected) > 1e-2
    assert token_losses(model, inputs).item() == pytest.approx(expected.item(), rel=1e-6)
    assert model.config.final_logit_softcapping == 2.0


@pytest.mark.parametrize("share", [None, False, True])
def test_shares_of_micro_batches_add_up_to_the_loss_per_token(share):
    model = tiny_model()
    rows = [
        {"input_ids": [4, 5, 6, 7, 8], "labels": [4, IGNORE, IGNORE, 7, 8]},
        {"input_ids": [4, 5, 9], "labels": [IGNORE, 5, 9]},
        {"input_ids": [7, 7, 7, 7], "labels": [IGNORE] * 4},
    ]
    collate = Pad(2) if share is None else Pack(share)
    if share is not None:
        use_packed_attention(model)
    parts = [collate([row]) for row in rows]
    learned = [int(learned_tokens(part)) for part in parts]
    assert learned == [2, 2, 0], "a row's first token is predicted by none"
    total = sum(plain_loss(tiny_model(), Pad(2)([row])).item() for row in rows[:2])
    assert int(learned_tokens(collate(rows))) == 4
    together = share_of_loss(model, collate(rows), 4, 1).item()
    assert together == pytest.approx(total / 4, rel=1e-5)
    # Of two processes each has a part; the mean of their gradients is that of the sum.
    shares = [share_of_loss(model, part, 4, 2).item() for part in parts]
    assert sum(shares) / 2 == pytest.approx(total / 4, rel=1e-5)


def test_a_head_that_is_trained_itself_gets_its_gradient():
    model = tiny_model()
    inputs = batch("some")
    wanted = gradients(model, plain_loss(model, inputs))
    found = gradients(model, token_losses(model, inputs))
    assert torch.allclose(found["lm_head.weight"], wanted["lm_head.weight"], rtol=1e-4, atol=1e-6)


def test_bf16_logits_are_added_up_in_fp32():
    model = tiny_model(dtype=torch.bfloat16)
    model.requires_grad_(False)
    loss = token_losses(model, batch("all"))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain_loss(model, batch("all")).item(), rel=1e-6)


def test_a_batch_without_labels_costs_nothing_and_moves_nothing():
    model = get_peft_model(tiny_model(), SanConfig())
    loss = token_losses(model, batch("none"))
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(model, loss).values())


def test_only_learned_positions_ever_reach_the_vocabulary(monkeypatch):
    seen = []
    linear = F.linear
    monkeypatch.setattr(
        "san_llm.ops.head_loss.F.linear",
        lambda x, *rest: (seen.append(len(x)), linear(x, *rest))[1],
    )
    model = tiny_model().requires_grad_(False)
    inputs = batch("some")
    token_losses(model, inputs)
    head_calls = seen[-1:]
    assert head_calls == [(inputs["labels"][:, 1:] != IGNORE).sum().item()]


def test_the_head_is_its_own_again_afterwards():
    model = tiny_model()
    token_losses(model, batch("all"))
    assert "forward" not in vars(model.lm_head)
    with pytest.raises(ValueError, match="input_ids"):
        token_losses(model, {**batch("all"), "input_ids": None})
    assert "forward" not in vars(model.lm_head)
    assert model(batch("all")["input_ids"]).logits.shape == (3, 17, model.config.vocab_size)
