"""Rows to tokens: the prompt and the response, which of them are learned, the cutoff.

Which tokens are learned is decided by character offsets, not by the length of a separately
tokenized prompt: a token that holds the first letter of the response belongs to the response, even
where it begins with the prompt's last space. What ends a turn is learned with it: the special token
that a chat template writes behind an answer, else the tokenizer's end of text.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from san_llm.data.conversation import Answer, Written, render, turns_of, write_conversation
from san_llm.data.ends import TurnEnd, turn_end
from san_llm.data.rows import Row
from san_llm.errors import InputError
from san_llm.models.agree import refuse_past_embedding
from san_llm.protocol.prompts import Frame, evaluation_prompt, training_prompt
from san_llm.recipe.schema import Data

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast


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
        controls: What the row's own words say that is, as tokens, more than words: ``</s>``.
        thoughts: Turns whose thinking the chat template leaves out.
    """

    tokens: list[int]
    labels: list[int]
    fate: Literal["whole", "cut", "dropped"]
    length: int
    supervised: int
    controls: tuple[str, ...] = ()
    thoughts: int = 0


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
        learn: Of a conversation, ``all turns`` of the assistant or the ``last turn``.
        special_tokens: What a control token in a row's own words becomes: that one of the
            ``tokens``, or ``text``.
    """

    tokenizer: PreTrainedTokenizerFast
    style: Frame
    loss: str
    cutoff: int
    workers: int = 1
    vocabulary: int | None = None
    learn: str = "all turns"
    special_tokens: str = "tokens"

    @property
    def unheld(self) -> int | None:
        """The embedding's rows where the tokenizer knows tokens past them, else None."""
        if self.vocabulary is None or max(self.tokenizer.get_vocab().values()) < self.vocabulary:
            return None
        return self.vocabulary


def encoding_of(data: Data, tokenizer: PreTrainedTokenizerFast, vocabulary: int | None) -> Encoding:
    """Return how a recipe's rows become tokens of a model with so many."""
    return Encoding(
        tokenizer,
        data.prompt,
        data.loss,
        data.cutoff,
        data.workers,
        vocabulary,
        data.learn,
        data.special_tokens,
    )


def label_rows(rows: Iterable[Row], encoding: Encoding) -> Iterator[Labelled]:
    """Give rows tokenized and labelled, in their order; ``data.tokenized`` keeps them.

    Raises:
        InputError: naming the row that the style cannot write or of which no token is made.
    """
    tokenizer = encoding.tokenizer
    # One call sets what a tokenizer file may ask for otherwise: no cutoff, no padding.
    tokenizer("x", add_special_tokens=False, verbose=False)
    frame, unheld = _Frame(encoding), encoding.unheld
    left = iter(rows)
    # The tokenizer works on the next chunk while this one is labelled: it leaves Python free.
    with _threads(encoding.workers), ThreadPoolExecutor(1) as ahead:
        chunk = list(islice(left, CHUNK))
        pending = ahead.submit(frame.encode, chunk)
        while chunk:
            following = list(islice(left, CHUNK))
            encoded = pending.result()
            pending = ahead.submit(frame.encode, following)
            for row, (written, ids) in zip(chunk, encoded, strict=True):
                tokens, learned, controls = frame.mark(row, written, ids)
                if unheld is not None:
                    refuse_past_embedding(tokens, unheld, row.where, tokenizer)
                about = (controls, written.thoughts_left_out)
                yield _cut(tokens, learned, encoding.loss, encoding.cutoff, *about)
            chunk = following


def evaluation_text(
    style: Frame, row: Row, tokenizer: PreTrainedTokenizerFast
) -> tuple[str, list[int]]:
    """Return the prompt of a test row and its tokens, after which the model goes on.

    Raises:
        InputError: when the style is ``chat`` and the tokenizer has no chat template, or another
            one and the row is a conversation.
    """
    if style == "chat":
        turns = turns_of(row) if row.messages else turns_of(row)[:1]
        return chat_prompt(turns, tokenizer, row.where, row.tools)
    if row.messages:
        raise InputError(
            f"{row.where}: a conversation cannot be asked in the style {style!r}; "
            "--prompt-style chat asks it"
        )
    text = evaluation_prompt(style, row.instruction, row.context)
    if style != "llm-adapters-aligned":
        return text, prompt_tokens(tokenizer, text)
    # The exact training tokens before the response. The last space joins the response's first
    # letter in one token, so a response must stand there; which one makes no difference.
    encoding = tokenizer(text + "the", return_offsets_mapping=True)
    ends = [end for _, end in encoding["offset_mapping"]]
    behind = next(place for place, end in enumerate(ends) if end > len(text))
    return text, encoding["input_ids"][:behind]


def prompt_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Return the tokens of a text that a model goes on from: no end token stands behind it.

    A tokenizer that was saved with ``add_eos_token`` writes one.
    """
    encoding = tokenizer(text, return_offsets_mapping=True)
    tokens: list[int] = encoding["input_ids"]
    begin, end = encoding["offset_mapping"][-1] if tokens else (0, 1)
    if begin == end and tokens[-1] == tokenizer.eos_token_id and len(tokens) > 1:
        del tokens[-1]
    return tokens


def chat_prompt(
    turns: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    where: str,
    tools: str = "",
) -> tuple[str, list[int]]:
    """Return a conversation, after which the assistant goes on, in the chat template; its tokens.

    Args:
        turns: ``role`` and ``content`` of each turn.
        tokenizer: The model's tokenizer.
        where: What the conversation is, for messages.
        tools: Those that may be called, as JSON; empty for none.

    Raises:
        InputError: when the tokenizer has no chat template, or that refuses the conversation.
    """
    check_tokenizer(tokenizer, "chat")
    text = render(tokenizer, turns, where, ask=True, tools=tools)
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


class _Frame:
    """What stands around a row's words, with one tokenizer, and what is learned of them."""

    def __init__(self, encoding: Encoding) -> None:
        self._encoding, self._tokenizer = encoding, encoding.tokenizer
        self._backend = encoding.tokenizer.backend_tokenizer
        self._eos: int = encoding.tokenizer.eos_token_id
        added = encoding.tokenizer.added_tokens_decoder
        self._special = {number for number, token in added.items() if token.special}
        self._special |= set(encoding.tokenizer.all_special_ids)
        chat = encoding.style == "chat"
        self._turn_end = turn_end(encoding.tokenizer) if chat else TurnEnd()

    def encode(self, rows: Sequence[Row]) -> list[tuple[Written, tokenizers.Encoding]]:
        """Return rows as texts, and as tokens of those."""
        written = [self._write(row) for row in rows]
        made: dict[int, tokenizers.Encoding] = {}
        # A chat template writes its special tokens itself.
        for templated in (False, True):
            places = [n for n, one in enumerate(written) if one.templated == templated]
            texts = [written[place].text for place in places]
            encoded = self._backend.encode_batch(texts, add_special_tokens=not templated)
            made |= dict(zip(places, encoded, strict=True))
        return [(one, made[number]) for number, one in enumerate(written)]

    def _write(self, row: Row) -> Written:
        """Return a row's whole text, and which of its characters are learned."""
        style = self._encoding.style
        if row.text:
            prompt, text = "", row.text
        elif style == "chat":
            last_alone = self._encoding.learn == "last turn"
            return write_conversation(self._tokenizer, row, last_alone)
        elif row.messages:
            raise InputError(
                f"{row.where}: a conversation cannot be written in the style {style!r}; "
                "set data.prompt to chat"
            )
        else:
            prompt = training_prompt(style, row.instruction, row.context)
            text = prompt + row.output
        return Written(text, (Answer(len(prompt), len(text)),), ((0, len(text)),))

    def mark(
        self, row: Row, written: Written, encoding: tokenizers.Encoding
    ) -> tuple[list[int], Sequence[int], tuple[str, ...]]:
        """Return a row's tokens, the places of those to learn, and its own control tokens."""
        tokens: list[int] = encoding.ids
        if not written.templated:
            # One response that ends the text: from the token of its first letter on. Where that
            # letter or the last one makes no token, or control tokens are in it, all are looked at.
            end = encoding.token_to_chars(len(tokens) - 1) if tokens else None
            begin = encoding.char_to_token(written.answers[0].begin)
            plain = self._special.isdisjoint(tokens[1:])
            if plain and begin is not None and end is not None and end[1] == len(written.text):
                tokens.append(self._eos)
                return tokens, range(begin, len(tokens)), ()
        return self._mark_each(row, written, encoding)

    def _mark_each(
        self, row: Row, written: Written, encoding: tokenizers.Encoding
    ) -> tuple[list[int], Sequence[int], tuple[str, ...]]:
        """Return the same by looking at each token's characters."""
        text, tokens, offsets = written.text, encoding.ids, encoding.offsets
        controls = self._controls(tokens, offsets, written)
        said = tuple(text[slice(*offsets[place])] for place in controls)
        if controls and self._encoding.special_tokens == "text":
            tokens, offsets = self._as_text(text, tokens, offsets, controls)
            controls = []
        learned: list[int] = []
        for answer in written.answers:
            places = [
                place
                for place, (start, end) in enumerate(offsets)
                if start < answer.end and end > answer.begin and end > start
            ]
            if not places:
                raise InputError(
                    f"{row.where}: the tokenizer makes no tokens of its response, so there is "
                    "nothing to learn"
                )
            last = self._ends(text, tokens, offsets, answer, places[-1], set(controls))
            learned += range(places[0], last + 1)
        return tokens, learned, said

    def _controls(
        self,
        tokens: Sequence[int],
        offsets: Sequence[tuple[int, int]],
        written: Written,
    ) -> list[int]:
        """Return the places of special tokens that a row's own words have made.

        An end of text that ends an answer is none: some write it there themselves.
        """
        ends = {answer.end for answer in written.answers}
        return [
            place
            for place, token in enumerate(tokens)
            if token in self._special
            and offsets[place][0] < offsets[place][1]
            and any(a <= offsets[place][0] and offsets[place][1] <= b for a, b in written.own)
            and not (token == self._eos and offsets[place][1] in ends)
        ]

    def _as_text(
        self,
        text: str,
        tokens: Sequence[int],
        offsets: Sequence[tuple[int, int]],
        controls: Sequence[int],
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Return tokens in which control tokens are written out, and their characters."""
        from tokenizers import Tokenizer

        words = Tokenizer.from_str(self._backend.to_str())
        words.encode_special_tokens = True
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for place, (token, span) in enumerate(zip(tokens, offsets, strict=True)):
            if place not in controls:
                ids.append(token)
                spans.append(span)
                continue
            # Behind a letter, so that no tokenizer begins it as it would a text.
            inner = words.encode(f"x{text[slice(*span)]}", add_special_tokens=False)
            made = [t for t, (begin, _) in zip(inner.ids, inner.offsets, strict=True) if begin]
            ids += made
            spans += [span] * len(made)
        return ids, spans

    def _ends(
        self,
        text: str,
        tokens: list[int],
        offsets: list[tuple[int, int]],
        answer: Answer,
        last: int,
        controls: set[int],
    ) -> int:
        """Return the place of what ends a turn; the end of text is put where nothing else does.

        Args:
            text: All of it.
            tokens: Its tokens; what a template writes behind the last answer may be cut off.
            offsets: Their characters.
            answer: What the turn says.
            last: The place of its last token.
            controls: Places of tokens that end nothing: words of the row.
        """
        end, behind = answer.end, text[answer.end :]
        if self._turn_end.text and behind.lstrip().startswith(self._turn_end.text):
            end = len(text) - len(behind.lstrip()) + len(self._turn_end.text)
            while last + 1 < len(tokens) and answer.end <= offsets[last + 1][0] < end:
                last += 1
        if tokens[last] == self._eos and last not in controls:
            return last  # the answer brings it along
        ends = self._special - {self._tokenizer.bos_token_id} | {self._eos}
        for place in range(last + 1, len(tokens)):
            if tokens[place] in ends and place not in controls:
                if not answer.called or tokens[place] in (self._turn_end.token, self._eos):
                    return place
            elif not answer.called and not text[slice(*offsets[place])].isspace():
                break
        if answer.called or not text[end:].strip():
            if not answer.called:
                del tokens[last + 1 :], offsets[last + 1 :]
            tokens.append(self._eos)
            offsets.append((len(text), len(text)))
            return len(tokens) - 1
        return last


def _cut(
    tokens: list[int],
    learned: Sequence[int],
    loss: str,
    cutoff: int,
    controls: tuple[str, ...],
    thoughts: int,
) -> Labelled:
    """Return what the cutoff leaves of a row; nothing comes before its first token to learn it."""
    length = len(tokens)
    kept = [place for place in learned if place < cutoff] if length > cutoff else learned
    fate: Literal["whole", "cut", "dropped"] = (
        "whole" if len(kept) == len(learned) else "cut" if kept else "dropped"
    )
    del tokens[cutoff:]
    if loss == "all":
        labels, count = [IGNORE, *tokens[1:]], len(tokens) - 1
    elif isinstance(learned, range):
        begin = max(1, min(learned.start, len(tokens)))
        labels, count = [IGNORE] * begin + tokens[begin:], len(tokens) - begin
    else:
        places = {place for place in kept if place}
        labels = [token if place in places else IGNORE for place, token in enumerate(tokens)]
        count = len(places)
    return Labelled(tokens, labels, fate, length, count, controls, thoughts)
