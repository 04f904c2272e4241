"""How rows are asked and judged: the protocols by name, and what else an answer depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from san_llm.data.prompts import PromptStyle
from san_llm.errors import InputError, not_one_of

Protocol = Literal["generate", "loglik", "lm-eval"]

PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)


@dataclass(frozen=True)
class Settings:
    """One way to ask.

    Attributes:
        protocol: ``generate``: the published one, an answer is read from generated text.
            ``loglik``: the most likely of the row's answers. ``lm-eval``: the same, measured by
            lm-evaluation-harness.
        prompt: The prompt style.
        batch_size: Rows at once; None: chosen by memory.
        strict: Compute each row alone, so that its answer depends on nothing else, in any dtype.
        answers_only: Generate no further than an answer is certain.
    """

    protocol: Protocol = "generate"
    prompt: PromptStyle = "llm-adapters"
    batch_size: int | None = None
    strict: bool = False
    answers_only: bool = False


def find_protocol(name: str) -> Protocol:
    """Return the protocol of that name.

    Raises:
        InputError: listing the protocols and the nearest spelling.
    """
    for protocol in PROTOCOLS:
        if protocol == name:
            return protocol
    raise InputError(f"protocol {not_one_of(name, PROTOCOLS)}")
