"""The loss of a batch, without the logits that nothing learns from.

The vocabulary is the other half of a step's memory: all logits of 8 x 128 tokens over 49,152 words
take 200 MB in fp32, and a plain loss keeps several copies. Here the frozen output head computes the
loss itself, from the supervised positions alone and some at a time, and keeps one gradient of the
hidden states' size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS_AT_ONCE = 2**24  # numbers: 64 MB in fp32
GIVES_LOGITS = "gives_logits"  # of a head: whether what it gives is what the model gives

Head = Callable[[Tensor], Tensor]
# Of hidden states, the head that makes logits of them, and the cap of these, if there is one.
Made = Callable[[Tensor, Head, float | None], Tensor]


@contextmanager
def instead_of_logits(head: Any, config: Any, made: Made) -> Iterator[None]:
    """Let a model's output head return something smaller than its logits, made of what it is given.

    It happens inside the model's own forward, so wrappers that gather weights or hook outputs see
    nothing unusual. Where the config has the model cap its logits (Gemma 2), ``made`` does that as
    well: the model would cap what comes out.
    """
    plain = head.forward
    cap = getattr(config, "final_logit_softcapping", None)
    mine = "forward" in vars(head)
    head.forward = lambda hidden: made(hidden, plain, cap)
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


def as_logits(logits: Tensor) -> Tensor:
    """Return logits as they are: the head of those that are there already."""
    return logits


def from_head(model: Any, config: Any, made: Made, **inputs: Any) -> Tensor:
    """Return what ``made`` makes of a model's hidden states, within its forward.

    A model that does more to its head's logits than cap them, which ``models.load`` has seen, gives
    all of them to ``made`` instead, with :func:`as_logits` as the head.

    Args:
        model: A causal LM, perhaps in wrappers.
        config: The model's config.
        made: Makes something of the hidden states.
        inputs: Of the model's forward.
    """
    bare = model.module if hasattr(model, "module") else model
    head = bare.get_output_embeddings()
    if not getattr(head, GIVES_LOGITS, True):
        return made(model(**inputs).logits, as_logits, None)
    with instead_of_logits(head, config, made):
        out: Tensor = model(**inputs).logits
    return out


def losses(hidden: Tensor, head: Head, cap: float | None, targets: Tensor) -> Tensor:
    """Return the cross entropy of each target, in fp32, (n,), some logits at a time.

    Args:
        hidden: What predicts them, (n, hidden).
        head: Makes logits of it.
        cap: See :class:`HeadLoss`.
        targets: (n,).
    """
    parts, start, step = [], 0, 1  # a row tells how many logits there are
    while start < len(hidden):
        logits = head(hidden[start : start + step]).float()
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        parts.append(F.cross_entropy(logits, targets[start : start + step], reduction="none"))
        start, step = start + step, max(1, LOGITS_AT_ONCE // logits.shape[-1])
    return torch.cat(parts)


class HeadLoss(torch.autograd.Function):
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
        """Return the loss, in fp32 or wider; see the class."""
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
        """Return the gradient that the forward pass has made, scaled."""
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
        cap: See ``HeadLoss``.
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
