"""Rows to tokens: the prompt and the response, which of them are learned, cutoff and padding.

Which tokens are learned is decided by character offsets, not by the length of a separately
tokenized prompt: a token that holds the first letter of the response belongs to the response, even
where it begins with the prompt's last space.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from filelock import FileLock

from san_llm.data.prompts import PromptStyle, evaluation_prompt, training_prompt
from san_llm.data.rows import Row
from san_llm.errors import InputError, SanError, first_line
from san_llm.record import cache_folder, whole_folder, write_json

if TYPE_CHECKING:
    from datasets import Dataset
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerFast

_Written = tuple[str, list[tuple[int, int]]]  # a text, and the character spans of its responses

IGNORE = -100
FORMAT = 2  # part of the cache key: raise it when the same rows give other tokens or other files
CHUNK = 4096  # rows at once: enough for every thread to have work, some 50 MB of encodings


@dataclass(frozen=True)
class Encoded:
    """Tokenized rows, and what became of those that are not among them.

    Attributes:
        rows: ``input_ids`` and ``labels`` of each row, (tokens,); label -100 is not learned.
        dropped: Rows whose response was cut away whole.
        cut: Rows that lost a part of their response, its end token with it.
        supervised: Labels that are learned, in all.
    """

    rows: Dataset
    dropped: int
    cut: int
    supervised: int


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


def encode_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerFast,
    style: PromptStyle,
    loss: str,
    cutoff: int,
    workers: int = 1,
) -> Encoded:
    """Tokenize training rows, or take them from the cache if the same were tokenized before.

    Args:
        rows: What to learn.
        tokenizer: A fast tokenizer (offsets are needed) with an end-of-text token.
        style: The prompt style.
        loss: ``response`` or ``all``.
        cutoff: Tokens kept of a row.
        workers: More than 1 tokenizes on several threads.

    Raises:
        InputError: when the tokenizer or the style cannot serve, or nothing is left to learn.
    """
    import datasets

    datasets.disable_progress_bars()
    check_tokenizer(tokenizer, style)
    key = _key(rows, tokenizer, {"style": style, "loss": loss, "cutoff": cutoff})
    folder = cache_folder("tokenized") / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Of several processes with the same rows one tokenizes, and the others wait and read.
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "fates.json").is_file():
            with whole_folder(folder, overwrite=True) as temporary:
                found = _write_encoded(
                    temporary, rows, label_rows(rows, tokenizer, style, loss, cutoff, workers), key
                )
                if not found["supervised"]:
                    raise InputError(
                        f"no tokens to learn: the cutoff of {cutoff} tokens cuts away the response "
                        f"of all {len(rows)} rows, from {rows[0].where} on; raise data.cutoff"
                    )
    return Encoded(
        datasets.load_from_disk(str(folder)),
        **json.loads((folder / "fates.json").read_text(encoding="utf-8")),
    )


def label_rows(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerFast,
    style: PromptStyle,
    loss: str,
    cutoff: int,
    workers: int = 1,
) -> Iterator[Labelled]:
    """Tokenize and label rows, in their order; see :func:`encode_rows`.

    Raises:
        InputError: naming the row that the style cannot write or of which no token is made.
    """
    eos = tokenizer.eos_token_id
    # One call sets what a tokenizer file may ask for otherwise: no cutoff, no padding.
    tokenizer("x", add_special_tokens=False, verbose=False)
    backend = tokenizer.backend_tokenizer

    def encode(chunk: Sequence[Row]) -> tuple[list[_Written], list[Encoding]]:
        written = [_write(row, tokenizer, style) for row in chunk]
        texts = [text for text, _ in written]
        # A chat template writes its special tokens itself.
        return written, backend.encode_batch(texts, add_special_tokens=style != "chat")

    left = iter(rows)
    # The tokenizer works on the next chunk while this one is labelled: it leaves Python free.
    with _threads(workers), ThreadPoolExecutor(1) as ahead:
        chunk = list(islice(left, CHUNK))
        pending = ahead.submit(encode, chunk)
        while chunk:
            following = list(islice(left, CHUNK))
            written, encodings = pending.result()
            pending = ahead.submit(encode, following)
            for row, (text, spans), encoding in zip(chunk, written, encodings, strict=True):
                tokens, learned = _mark(row, text, spans, encoding, eos)
                yield _cut(tokens, learned, loss, cutoff)
            chunk = following


def evaluation_text(
    style: PromptStyle, row: Row, tokenizer: PreTrainedTokenizerFast
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
        turns: ``role`` and ``content`` of each.
        tokenizer: The model's.
        where: What the conversation is, for messages.

    Raises:
        InputError: when the tokenizer has no chat template, or that refuses the conversation.
    """
    check_tokenizer(tokenizer, "chat")
    text = _render(tokenizer, turns, generate=True, where=where)
    return text, tokenizer(text, add_special_tokens=False)["input_ids"]


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, style: PromptStyle) -> None:
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


def _key(rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast, settings: dict[str, Any]) -> str:
    """Return a name made of all that decides the tokens: never of a file's name or time."""
    digest = hashlib.sha256()
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    for part in (
        {"format": FORMAT, "special": special, **settings},
        tokenizer.backend_tokenizer.to_str(),
        str(tokenizer.chat_template) if settings["style"] == "chat" else "",
    ):
        digest.update(json.dumps(part, sort_keys=True).encode())
    for start in range(0, len(rows), CHUNK):
        content = [
            (row.instruction, row.context, row.output, row.messages)
            for row in rows[start : start + CHUNK]
        ]
        digest.update(json.dumps(content).encode())
    return digest.hexdigest()[:32]


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


def _write_encoded(
    folder: Path, rows: Sequence[Row], labelled: Iterator[Labelled], key: str
) -> dict[str, int]:
    """Write the rows that are not dropped, and what became of all."""
    import datasets
    import numpy as np
    import pyarrow as pa

    fates: Counter[str] = Counter()
    supervised = 0
    # Flat, in 4 bytes a token: 170,000 rows are 110 MB, where lists of Python numbers are 1 GB.
    tokens, labels, ends = array("i"), array("i"), array("i", [0])
    for row in labelled:
        fates[row.fate] += 1
        if row.fate != "dropped":
            tokens.extend(row.tokens)
            labels.extend(row.labels)
            ends.append(len(tokens))
            supervised += row.supervised
    columns = {
        name: pa.ListArray.from_arrays(np.asarray(ends), np.asarray(values))
        for name, values in (("input_ids", tokens), ("labels", labels))
    }
    datasets.Dataset(pa.table(columns), fingerprint=key).save_to_disk(folder)
    found = {"dropped": fates["dropped"], "cut": fates["cut"], "supervised": supervised}
    write_json(folder / "fates.json", found)
    return found


def _write(row: Row, tokenizer: PreTrainedTokenizerFast, style: PromptStyle) -> _Written:
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
    row: Row, text: str, spans: list[tuple[int, int]], encoding: Encoding, eos: int
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


class Rows(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Tokenized rows, and one more behind them: a filler that teaches nothing.

    Fillers complete the last batch of an epoch, so that every optimizer step has the same shape on
    every number of processes.
    """

    def __init__(self, encoded: Encoded) -> None:
        """Hold the tokenized rows."""
        import pyarrow.compute

        self._rows = encoded.rows
        column = encoded.rows.data.column("input_ids")
        self.lengths: list[int] = pyarrow.compute.list_value_length(column).to_pylist()

    def __len__(self) -> int:
        """Return the number of rows, without the filler."""
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """Return a row, or the filler at index ``len(self)``."""
        if index == len(self):
            first = self._rows[0]["input_ids"][:1]
            return {"input_ids": first, "labels": [IGNORE]}
        row: dict[str, list[int]] = self._rows[index]
        return row


@dataclass(frozen=True)
class Pad:
    """Collator: pads rows on the right, to a multiple of 8 tokens.

    Attributes:
        pad_id: The token to pad with; it is masked, so its value does not matter.
    """

    pad_id: int

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Return ``input_ids``, ``attention_mask`` and ``labels``, each (batch, tokens)."""
        longest = max(len(row["input_ids"]) for row in rows)
        width = -(-longest // 8) * 8
        batch = {
            "input_ids": torch.full((len(rows), width), self.pad_id),
            "attention_mask": torch.zeros(len(rows), width, dtype=torch.long),
            "labels": torch.full((len(rows), width), IGNORE),
        }
        for i, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["input_ids"][i, :length] = torch.tensor(row["input_ids"])
            batch["attention_mask"][i, :length] = 1
            batch["labels"][i, :length] = torch.tensor(row["labels"])
        return batch


def pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return a token to pad with: the tokenizer's own, else its end-of-text token.

    Raises:
        SanError: when the tokenizer has neither.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise SanError(f"{tokenizer.name_or_path}: its tokenizer has no token to pad with")
