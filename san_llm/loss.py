"""The loss of a batch, without the logits that nothing learns from.

The vocabulary is the other half of a step's memory: all logits of 8 x 128 tokens over 49,152 words
take 200 MB in fp32, and a plain loss keeps several copies. Here the frozen output head computes the
loss itself, from the supervised positions alone and some at a time, and keeps one gradient of the
hidden states' size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from san_llm.data.encode import IGNORE
from san_llm.packed_attention import laid_out

LOGITS_AT_ONCE = 2**24  # numbers: 64 MB in fp32


def token_losses(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Return the summed cross entropy of a batch's supervised tokens, in fp32 or wider.

    Args:
        model: A causal LM of transformers; adapted, or wrapped for several processes, or not.
        inputs: ``input_ids``, ``attention_mask`` and ``labels``, each (batch, tokens), where label
            -100 is not learned; or a packed batch of ``data.pack.Pack``.
    """
    bare = model.module if hasattr(model, "module") else model
    if "layout" in inputs:
        positions = inputs["position_ids"]
        # What has four dimensions is handed through as it is, and no mask is made of N x N tokens:
        # attention makes its own by the layout.
        how = {
            "position_ids": positions,
            "attention_mask": positions[None, None],
            "layout": laid_out(inputs["layout"], positions[0]),
        }
        sources, targets = inputs["sources"], inputs["labels"]
    else:
        how = {"attention_mask": inputs["attention_mask"]}
        following = F.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORE).flatten()
        sources = (following != IGNORE).nonzero()[:, 0]
        targets = following[sources]
    with _head_gives_loss(bare.get_output_embeddings(), sources, targets, bare.config):
        loss: Tensor = model(input_ids=inputs["input_ids"], use_cache=False, **how).logits
    return loss


def learned_tokens(inputs: dict[str, Any]) -> Tensor:
    """Return how many tokens of a batch ``token_losses`` adds up, as a number of shape ()."""
    labels: Tensor = inputs["labels"] if "layout" in inputs else inputs["labels"][:, 1:]
    return (labels != IGNORE).sum()


@contextmanager
def _head_gives_loss(head: Any, sources: Tensor, targets: Tensor, config: Any) -> Iterator[None]:
    """Let the output head return the loss of ``targets`` (n,) instead of logits.

    Target i is predicted from token ``sources[i]`` of all the batch's tokens. It happens inside
    the model's own forward, so wrappers that gather weights or hook outputs see nothing unusual.
    Where the config has the model cap its logits (Gemma 2), the head does that as well: the model
    would cap the loss.
    """
    plain = head.forward
    cap = getattr(config, "final_logit_softcapping", None)

    def loss(hidden: Tensor) -> Tensor:
        chosen = hidden.flatten(0, -2).index_select(0, sources)  # (n, hidden)
        # FSDP2 makes a Linear a subclass, of the same forward; a quantized one has its own.
        frozen = isinstance(head, nn.Linear) and not head.weight.requires_grad
        if frozen and type(head).forward is nn.Linear.forward:
            out: Tensor = _HeadLoss.apply(chosen, head.weight, head.bias, targets, cap)
            return out
        logits = plain(chosen).float()
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        return F.cross_entropy(logits, targets, reduction="sum")

    mine = "forward" in vars(head)
    head.forward = loss
    if cap is not None:
        config.final_logit_softcapping = None
    try:
        yield
    finally:
        if cap is not None:
            config.final_logit_softcapping = cap
        if mine:
            head.forward = plain
        else:
            del head.forward


class _HeadLoss(torch.autograd.Function):
    """Summed cross entropy of ``softmax(h W^T + b)``; its gradient to h is made on the way.

    With a cap the logits z are ``cap * tanh(z / cap)``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        cap: float | None,
    ) -> Tensor:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=wide, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        step = max(1, LOGITS_AT_ONCE // weight.shape[0])
        for start in range(0, len(hidden), step):
            chosen = slice(start, start + step)
            into = None if gradient is None else gradient[chosen]
            logits = F.linear(hidden[chosen], weight, bias).to(wide)
            total += _chunk_loss(logits, targets[chosen, None], weight, cap, into)
            del logits  # before there are the next ones
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return None if gradient is None else gradient * grads[0], None, None, None, None


def _chunk_loss(
    logits: Tensor, targets: Tensor, weight: Tensor, cap: float | None, gradient: Tensor | None
) -> Tensor:
    """Return the loss of logits (n, vocabulary), in whose memory all is computed.

    Args:
        logits: Overwritten: fresh memory for a chunk takes longer than its arithmetic.
        targets: (n, 1).
        weight: (vocabulary, hidden).
        cap: See ``_HeadLoss``.
        gradient: (n, hidden), written unless None: that of what the logits were made of.
    """
    if cap is not None:
        slope = 1 - logits.div_(cap).tanh_().square()
        logits.mul_(cap)
    largest, right = logits.amax(-1, keepdim=True), logits.gather(-1, targets)
    sums = logits.sub_(largest).exp_().sum(-1, keepdim=True)
    if gradient is not None:
        chances = logits.div_(sums)
        chances.scatter_add_(-1, targets, torch.full_like(sums, -1.0))
        if cap is not None:
            chances.mul_(slope)
        torch.mm(chances.to(weight.dtype), weight, out=gradient)
    return (sums.log() + largest - right).sum()
