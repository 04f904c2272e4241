"""What a chat template ends a turn with: where an answer ends, in training and when it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from san_llm.data.conversation import write_conversation
from san_llm.data.rows import Row
from san_llm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class TurnEnd:
    """What stands behind an answer.

    Attributes:
        text: What is written there that is no special token: where a template's own are none of
            the tokenizer's.
        token: The special token there; None where there is none.
    """

    text: str = ""
    token: int | None = None


def turn_end(tokenizer: PreTrainedTokenizerFast) -> TurnEnd:
    """Return what the chat template of a tokenizer ends an assistant's turn with.

    It is read off a conversation of two turns: nothing where the template refuses that.
    """
    row = Row(instruction="Question", output="Answer")
    try:
        written = write_conversation(tokenizer, row, last_alone=False)
    except InputError:
        return TurnEnd()
    behind = written.text[written.answers[0].end :]
    encoding = tokenizer(behind, add_special_tokens=False, return_offsets_mapping=True)
    special = set(tokenizer.all_special_ids)
    special |= {n for n, token in tokenizer.added_tokens_decoder.items() if token.special}
    for token, (begin, _) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
        if token in special:
            return TurnEnd(behind[:begin].strip(), token)
    return TurnEnd(behind.strip())
