"""Rows to tokens: the prompt and the response, which of them are learned, cutoff and padding.

Which tokens are learned is decided by character offsets, not by the length of a separately
tokenized prompt: a token that holds the first letter of the response belongs to the response, even
where it begins with the prompt's last space.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from jinja2 import TemplateError

from san_llm.data.prompts import PromptStyle, evaluation_prompt, training_prompt
from san_llm.data.rows import Row
from san_llm.errors import InputError, SanError
from san_llm.record import cache_folder, whole_folder

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

IGNORE = -100
FORMAT = 1  # part of the cache key: raise it when the same rows give other tokens
FEW = 2000  # rows below which starting processes costs more than it saves


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
        workers: Processes that tokenize.

    Raises:
        InputError: when the tokenizer or the style cannot serve, or nothing is left to learn.
    """
    import datasets

    datasets.disable_progress_bars()
    _check_tokenizer(tokenizer, style)
    settings = {"style": style, "loss": loss, "cutoff": cutoff}
    folder = cache_folder("tokenized") / _key(rows, tokenizer, settings)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Of several processes with the same rows one tokenizes, and the others wait and read.
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "dataset_info.json").is_file():
            source = datasets.Dataset.from_list(
                [asdict(row) | {"messages": json.dumps(row.messages)} for row in rows]
            )
            encoded = source.map(
                _encode_one,
                fn_kwargs={"tokenizer": tokenizer, **settings},
                remove_columns=source.column_names,
                num_proc=min(workers, os.cpu_count() or 1) if len(rows) > FEW else None,
                load_from_cache_file=False,
            )
            with whole_folder(folder, overwrite=True) as temporary:
                encoded.save_to_disk(temporary)
    encoded = datasets.load_from_disk(str(folder))
    fate = encoded["fate"]
    kept = encoded.select([i for i, how in enumerate(fate) if how != "dropped"])
    supervised = sum(kept["supervised"])
    if not supervised:
        raise InputError(
            f"no tokens to learn: the cutoff of {cutoff} tokens cuts away the response of all "
            f"{len(rows)} rows, from {rows[0].where} on; raise data.cutoff"
        )
    return Encoded(
        kept.select_columns(["input_ids", "labels"]),
        dropped=list(fate).count("dropped"),
        cut=list(fate).count("cut"),
        supervised=supervised,
    )


def evaluation_text(
    style: PromptStyle, row: Row, tokenizer: PreTrainedTokenizerFast
) -> tuple[str, list[int]]:
    """Return the prompt of a test row and its tokens, after which the model goes on.

    Raises:
        InputError: when the style is ``chat`` and the tokenizer has no chat template.
    """
    if style == "chat":
        _check_tokenizer(tokenizer, style)
        text = _render(tokenizer, _turns(row)[:1], generate=True, where=row.where)
        return text, tokenizer(text, add_special_tokens=False)["input_ids"]
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


def _check_tokenizer(tokenizer: PreTrainedTokenizerFast, style: PromptStyle) -> None:
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
    digest = hashlib.sha256()
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    for part in (
        {"format": FORMAT, "special": special, **settings},
        tokenizer.backend_tokenizer.to_str(),
        str(tokenizer.chat_template) if settings["style"] == "chat" else "",
    ):
        digest.update(json.dumps(part, sort_keys=True).encode())
    for row in rows:
        content = asdict(row)
        del content["where"]  # the same rows in another file are the same tokens
        digest.update(json.dumps(content).encode())
    return digest.hexdigest()[:32]


def _encode_one(
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    style: PromptStyle,
    loss: str,
    cutoff: int,
) -> dict[str, Any]:
    messages = tuple((role, content) for role, content in json.loads(row["messages"]))
    example = Row(**(row | {"messages": messages}))
    if style == "chat":
        text, spans = _chat_text(tokenizer, example)
    else:
        if messages:
            raise InputError(
                f"{example.where}: a conversation cannot be written in the style {style!r}; "
                "set data.prompt to chat"
            )
        prompt = training_prompt(style, example.instruction, example.context)
        text, spans = prompt + example.output, [(len(prompt), len(prompt) + len(example.output))]
    encoding = tokenizer(
        text, add_special_tokens=style != "chat", return_offsets_mapping=True, verbose=False
    )
    tokens, offsets = list(encoding["input_ids"]), list(encoding["offset_mapping"])
    learned = [
        any(start < last and end > first and end > start for first, last in spans)
        for start, end in offsets
    ]
    eos = tokenizer.eos_token_id
    ends = max((i for i, is_learned in enumerate(learned) if is_learned), default=-1)
    if ends < 0:
        raise InputError(
            f"{example.where}: the tokenizer makes no tokens of its response, so there is nothing "
            "to learn"
        )
    if tokens[ends] != eos:
        # What follows the last response (a newline of the chat template, say) stays unlearned.
        if eos in tokens[ends + 1 :]:
            learned[tokens.index(eos, ends + 1)] = True
        else:
            tokens.append(eos)
            learned.append(True)
    responses = sum(learned)
    if loss == "all":
        learned_all = [True] * len(tokens)
        learned_all[0] = False  # nothing comes before it to predict it from
    kept_responses = sum(learned[1:cutoff])
    fate = "whole" if kept_responses == responses else "cut" if kept_responses else "dropped"
    mask = (learned_all if loss == "all" else learned)[:cutoff]
    mask[0] = False
    tokens = tokens[:cutoff]
    labels = [token if on else IGNORE for token, on in zip(tokens, mask, strict=True)]
    return {"input_ids": tokens, "labels": labels, "fate": fate, "supervised": sum(mask)}


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
    except (TemplateError, ValueError, TypeError) as error:  # roles that must alternate, say
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{where}: the chat template of {tokenizer.name_or_path} refuses it: {first}"
        ) from None
    return str(text)


def _chat_text(tokenizer: PreTrainedTokenizerFast, row: Row) -> tuple[str, list[tuple[int, int]]]:
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
        self._rows = encoded.rows
        self.lengths = [len(tokens) for tokens in encoded.rows["input_ids"]]

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
