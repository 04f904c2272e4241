"""A ``Modelfile`` beside a GGUF file, from which Ollama asks a model as it was trained.

Ollama renders prompts by templates of the language Go (https://docs.ollama.com/modelfile), not by
the chat template that GGUF carries. What stands around messages is read off that one's text of a
conversation with marks, and held to its text of another.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from san_llm.data.conversation import render
from san_llm.data.ends import turn_end
from san_llm.errors import InputError
from san_llm.export.tokenizer import first_tokens
from san_llm.files import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FILE = "Modelfile"
WHERE = "the Modelfile's conversation"


@dataclass(frozen=True)
class Frame:
    """What a chat template writes around messages.

    Attributes:
        begins: Before a user's first message, where there is no system prompt.
        before_system: Before a system prompt; None: the template refuses one.
        after_system: Between that and a user's message.
        asks: Behind the last message.
        before_answer: Between the same behind an earlier one, and its answer: a space, say.
        after_answer: Between an answer and the next message of the user.
    """

    begins: str
    before_system: str | None
    after_system: str
    asks: str
    before_answer: str
    after_answer: str

    def write(self, messages: list[dict[str, str]]) -> str:
        """Return a conversation, of which the last message is a user's."""
        parts = [] if messages[0]["role"] == "system" else [self.begins]
        for message in messages:
            before, after = {
                "system": (self.before_system or "", self.after_system),
                "user": ("", self.asks),
                "assistant": (self.before_answer, self.after_answer),
            }[message["role"]]
            parts += [before, message["content"], after]
        return "".join(parts)

    def in_go(self) -> str:
        """Return the same as a template of Ollama's."""
        system = ""
        if self.before_system is not None:
            content = f"{_go(self.before_system)}{{{{ $m.Content }}}}{_go(self.after_system)}"
            system = f'{{{{- if eq $m.Role "system" }}}}{content}{{{{ end }}}}'
        return (
            "{{- range $i, $m := .Messages }}"
            f"{system}"
            '{{- if eq $m.Role "user" }}'
            f"{{{{ if eq $i 0 }}}}{_go(self.begins)}{{{{ end }}}}"
            f"{{{{ $m.Content }}}}{_go(self.asks)}{{{{ end }}}}"
            '{{- if eq $m.Role "assistant" }}'
            f"{_go(self.before_answer)}{{{{ $m.Content }}}}{_go(self.after_answer)}{{{{ end }}}}"
            "{{- end }}"
        )


def _go(text: str) -> str:
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def write_modelfile(folder: Path, weights: str, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Write a folder's ``Modelfile``.

    Args:
        folder: A merged model's.
        weights: The name of the GGUF file in it.
        tokenizer: The model's, with its chat template.

    Returns:
        Why the file says no template, in words; None: it says one.
    """
    lines, why = [f"FROM ./{weights}"], None
    try:
        frame = frame_of(tokenizer)
    except InputError as error:
        why = str(error)
    else:
        lines.append(f'TEMPLATE """{frame.in_go()}"""')  # where a quote of the text is escaped
    if tokenizer.chat_template:
        end = turn_end(tokenizer)
        stop = end.text or (tokenizer.decode([end.token]) if end.token is not None else "")
        if stop.strip():
            lines.append(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}")
    write_text(folder / FILE, "\n".join(lines) + "\n")
    return why


def frame_of(tokenizer: PreTrainedTokenizerFast) -> Frame:
    """Return what a tokenizer's chat template writes around messages.

    Without the start token that Ollama puts before a prompt itself.

    Raises:
        InputError: when there is no template, or it writes messages by more than their roles.
    """
    if not tokenizer.chat_template:
        raise InputError("the model has no chat template")
    system, user, answer, more = "@sys@", "@one@", "@two@", "@three@"
    talk = [
        {"role": "user", "content": user},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": more},
    ]
    begins, after_user, after_answer, asks = _between(_ask(tokenizer, talk), [user, answer, more])
    prompted, before, after = [{"role": "system", "content": system}, *talk], None, ""
    try:
        before, after, *_ = _between(_ask(tokenizer, prompted), [system, user, answer, more])
    except InputError:  # the template has no place for one
        prompted = talk
    # Of what is not so, the texts below differ.
    frame = Frame(begins, before, after, asks, after_user.removeprefix(asks), after_answer)
    longer = [{"role": "assistant", "content": "@four@"}, {"role": "user", "content": "@five@"}]
    for messages in (talk, talk[:1], [*talk, *longer], prompted, [*prompted, *longer]):
        if frame.write(messages) != _ask(tokenizer, messages):
            raise InputError("the chat template writes messages by more than their roles")
    return frame


def _ask(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> str:
    text = render(tokenizer, messages, WHERE, ask=True)
    return text.removeprefix(str(tokenizer.bos_token)) if first_tokens(tokenizer) else text


def _between(text: str, contents: list[str]) -> list[str]:
    """Return what stands before, between and behind contents.

    Raises:
        InputError: when one stands nowhere, or twice.
    """
    parts = []
    for content in contents:
        if text.count(content) != 1:
            raise InputError("the chat template leaves messages out, or writes one twice")
        before, _, text = text.partition(content)
        parts.append(before)
    return [*parts, text]
