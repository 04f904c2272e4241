"""Rows to tokens: the prompt and the response, which of them are learned, the cutoff.

Which tokens are learned is decided by character offsets, not by the length of a separately
tokenized prompt: a token that holds the first letter of the response belongs to the response, even
where it begins with the prompt's last space.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal, NamedTuple

from san_llm.data.rows import Row
from san_llm.errors import InputError, first_line
from san_llm.models.agree import refuse_past_embedding
from san_llm.protocol.prompts import Frame, evaluation_prompt, training_prompt
from san_llm.recipe.schema import Data

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast


_Written = tuple[str, list[tuple[int, int]]]  # a text, and the character spans of its responses

IGNORE = -100
CHUNK = 4096  # rows at once: enough for every thread to have work, some 50 MB of encodings


class Labelled(NamedTuple):
    """One row's tokens, and what is learned of them.

    Attributes:
        tokens: What is kept of the row, at most the cutoff.
        labels: The same tokens where they are learned, elsewhere -100.
        fate: What the cutoff did to the response.
        length: Tokens before the cutoff.
        supervised: Labels that are learned.
    """

    tokens: list[int]
    labels: list[int]
    fate: Literal["whole", "cut", "dropped"]
    length: int
    supervised: int


@dataclass(frozen=True)
class Encoding:
    """How rows become tokens.

    Attributes:
        tokenizer: A fast tokenizer (offsets are needed) with an end-of-text token.
        style: The prompt style, or ``none``.
        loss: ``response`` or ``all``.
        cutoff: Tokens kept of a row.
        workers: More than 1 tokenizes on several threads.
        vocabulary: Rows of the model's embedding, which no token may be past; None: not known.
    """

    tokenizer: PreTrainedTokenizerFast
    style: Frame
    loss: str
    cutoff: int
    workers: int = 1
    vocabulary: int | None = None

    @property
    def unheld(self) -> int | None:
        """The embedding's rows where the tokenizer knows tokens past them, else None."""
        if self.vocabulary is None or max(self.tokenizer.get_vocab().values()) < self.vocabulary:
            return None
        return self.vocabulary


def encoding_of(data: Data, tokenizer: PreTrainedTokenizerFast, vocabulary: int | None) -> Encoding:
    """Return how a recipe's rows become tokens of a model with so many."""
    return Encoding(tokenizer, data.prompt, data.loss, data.cutoff, data.workers, vocabulary)


def label_rows(rows: Iterable[Row], encoding: Encoding) -> Iterator[Labelled]:
    """Give rows tokenized and labelled, in their order; ``data.tokenized`` keeps them.

    Raises:
        InputError: naming the row that the style cannot write or of which no token is made.
    """
    tokenizer, style = encoding.tokenizer, encoding.style
    eos = tokenizer.eos_token_id
    # One call sets what a tokenizer file may ask for otherwise: no cutoff, no padding.
    tokenizer("x", add_special_tokens=False, verbose=False)
    backend, unheld = tokenizer.backend_tokenizer, encoding.unheld

    def encode(chunk: Sequence[Row]) -> tuple[list[_Written], list[tokenizers.Encoding]]:
        written = [_write(row, tokenizer, style) for row in chunk]
        texts = [text for text, _ in written]
        # A chat template writes its special tokens itself.
        return written, backend.encode_batch(texts, add_special_tokens=style != "chat")

    left = iter(rows)
    # The tokenizer works on the next chunk while this one is labelled: it leaves Python free.
    with _threads(encoding.workers), ThreadPoolExecutor(1) as ahead:
        chunk = list(islice(left, CHUNK))
        pending = ahead.submit(encode, chunk)
        while chunk:
            following = list(islice(left, CHUNK))
            written, encoded = pending.result()
            pending = ahead.submit(encode, following)
            for row, (text, spans), ids in zip(chunk, written, encoded, strict=True):
                tokens, learned = _mark(row, text, spans, ids, eos)
                if unheld is not None:
                    refuse_past_embedding(tokens, unheld, row.where, tokenizer)
                yield _cut(tokens, learned, encoding.loss, encoding.cutoff)
            chunk = following


def evaluation_text(
    style: Frame, row: Row, tokenizer: PreTrainedTokenizerFast
) -> tuple[str, list[int]]:
    """Return the prompt of a test row and its tokens, after which the model goes on.

    Raises:
        InputError: when the style is ``chat`` and the tokenizer has no chat template.
    """
    if style == "chat":
        return chat_prompt(_turns(row)[:1], tokenizer, row.where)
    text = evaluation_prompt(style, row.instruction, row.context)
    if style != "llm-adapters-aligned":
        return text, tokenizer(text)["input_ids"]
    # The exact training tokens before the response. The last space joins the response's first
    # letter in one token, so a response must stand there; which one makes no difference.
    encoding = tokenizer(text + "the", return_offsets_mapping=True)
    tokens = [
        token
        for token, (_, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
        if end <= len(text)
    ]
    return text, tokens


def chat_prompt(
    turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast, where: str
) -> tuple[str, list[int]]:
    """Return a conversation, after which the assistant goes on, in the chat template; its tokens.

    Args:
        turns: ``role`` and ``content`` of each turn.
        tokenizer: The model's tokenizer.
        where: What the conversation is, for messages.

    Raises:
        InputError: when the tokenizer has no chat template, or that refuses the conversation.
    """
    check_tokenizer(tokenizer, "chat")
    text = _render(tokenizer, turns, generate=True, where=where)
    return text, tokenizer(text, add_special_tokens=False)["input_ids"]


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, style: Frame) -> None:
    """Check that a tokenizer can serve a style.

    Raises:
        InputError: for one that is not fast, or lacks an end-of-text token or a chat template.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"{tokenizer.name_or_path}: its tokenizer has no fast version")
    if tokenizer.eos_token_id is None:
        raise InputError(f"{tokenizer.name_or_path}: its tokenizer has no end-of-text token")
    if style == "chat" and not tokenizer.chat_template:
        raise InputError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template; "
            "choose data.prompt alpaca or llm-adapters"
        )


@contextmanager
def _threads(workers: int) -> Iterator[None]:
    """Let the tokenizer use its threads for a while; at other times forks stay safe."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "true" if workers > 1 else "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _write(row: Row, tokenizer: PreTrainedTokenizerFast, style: Frame) -> _Written:
    """Return a row's whole text, and the character spans of its responses."""
    if style == "chat":
        return _chat_text(tokenizer, row)
    if row.messages:
        raise InputError(
            f"{row.where}: a conversation cannot be written in the style {style!r}; "
            "set data.prompt to chat"
        )
    prompt = training_prompt(style, row.instruction, row.context)
    text = prompt + row.output
    return text, [(len(prompt), len(text))]


def _mark(
    row: Row, text: str, spans: list[tuple[int, int]], encoding: tokenizers.Encoding, eos: int
) -> tuple[list[int], Sequence[int]]:
    """Return a row's tokens, an end token among them, and the places of those to learn."""
    tokens: list[int] = encoding.ids
    if len(spans) == 1 and spans[0][1] == len(text):
        # One response that ends the text: from the token of its first letter on. Where that letter
        # or the last one makes no token, or special tokens follow, all offsets are looked at.
        begin = encoding.char_to_token(spans[0][0])
        end = encoding.token_to_chars(len(tokens) - 1) if tokens else None
        if begin is not None and end is not None and end[1] == len(text):
            if tokens[-1] != eos:
                tokens.append(eos)
            return tokens, range(begin, len(tokens))
    learned = [
        place
        for place, (start, end) in enumerate(encoding.offsets)
        if any(start < last and end > first and end > start for first, last in spans)
    ]
    if not learned:
        raise InputError(
            f"{row.where}: the tokenizer makes no tokens of its response, so there is nothing "
            "to learn"
        )
    ends = learned[-1]
    if tokens[ends] != eos:
        # What follows the last response (a newline of the chat template, say) stays unlearned.
        if eos not in tokens[ends + 1 :]:
            tokens.append(eos)
        learned.append(tokens.index(eos, ends + 1))
    return tokens, learned


def _cut(tokens: list[int], learned: Sequence[int], loss: str, cutoff: int) -> Labelled:
    """Return what the cutoff leaves of a row; nothing comes before its first token to learn it."""
    length = len(tokens)
    kept = [place for place in learned if place < cutoff] if length > cutoff else learned
    fate: Literal["whole", "cut", "dropped"] = (
        "whole" if len(kept) == len(learned) else "cut" if kept else "dropped"
    )
    del tokens[cutoff:]
    if loss == "all":
        labels = [IGNORE, *tokens[1:]]
        return Labelled(tokens, labels, fate, length, len(tokens) - 1)
    if isinstance(learned, range):
        begin = max(1, min(learned.start, len(tokens)))
        labels = [IGNORE] * begin + tokens[begin:]
        return Labelled(tokens, labels, fate, length, len(tokens) - begin)
    places = {place for place in kept if place}
    labels = [token if place in places else IGNORE for place, token in enumerate(tokens)]
    return Labelled(tokens, labels, fate, length, len(places))


def _turns(row: Row) -> list[dict[str, str]]:
    if row.messages:
        return [{"role": role, "content": content} for role, content in row.messages]
    question = f"{row.instruction}\n\n{row.context}" if row.context else row.instruction
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": row.output},
    ]


def _render(
    tokenizer: PreTrainedTokenizerFast, turns: list[dict[str, str]], generate: bool, where: str
) -> str:
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate)
    except Exception as error:  # a template is a program: roles that must alternate, or a bug
        first = first_line(error)
        raise InputError(
            f"{where}: the chat template of {tokenizer.name_or_path} refuses it: {first}"
        ) from None
    return str(text)


def _chat_text(tokenizer: PreTrainedTokenizerFast, row: Row) -> _Written:
    """Return a conversation in the chat template, and the character spans of its responses."""
    turns = _turns(row)
    text = _render(tokenizer, turns, generate=False, where=row.where)
    spans = []
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        if number == 0:
            raise InputError(
                f"{row.where}: begins with the assistant's message; a user's must come first"
            )
        before = _render(tokenizer, turns[:number], generate=True, where=row.where)
        after = _render(tokenizer, turns[: number + 1], generate=False, where=row.where)
        if not (text.startswith(before) and text.startswith(after)):
            raise InputError(
                f"{row.where}: the chat template of {tokenizer.name_or_path} rewrites earlier "
                "turns, so the responses cannot be told apart; choose another data.prompt"
            )
        # The template's end-of-turn text is learned, the line break after it is not.
        spans.append((len(before), len(before) + len(after[len(before) :].rstrip())))
    return text, spans
