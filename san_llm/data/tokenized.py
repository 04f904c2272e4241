"""Rows as tokens, made once and kept in the cache under a key of all they depend on."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock

from san_llm.data.encode import CHUNK, IGNORE, Encoding, Labelled, check_tokenizer, label_rows
from san_llm.data.rows import Row
from san_llm.errors import InputError
from san_llm.files import cache_folder, whole_folder, write_json

if TYPE_CHECKING:
    from datasets import Dataset


FORMAT = 4  # part of the cache key: raise it when the same rows give other tokens or other files


@dataclass(frozen=True)
class Encoded:
    """Tokenized rows, and what became of those that are not among them.

    Attributes:
        rows: ``input_ids`` and ``labels`` of each row, (tokens,); label -100 is not learned.
        dropped: Rows whose response was cut away whole.
        cut: Rows that lost a part of their response, its end token with it.
        supervised: Labels that are learned, in all.
        controls: Rows that have a control token in their own words.
        control: The first of these tokens, as it is written.
        thoughts: Turns whose thinking the chat template leaves out.
    """

    rows: Dataset
    dropped: int
    cut: int
    supervised: int
    controls: int = 0
    control: str = ""
    thoughts: int = 0


def encode_rows(rows: Sequence[Row], encoding: Encoding) -> Encoded:
    """Return training rows as tokens, from the cache if the same were tokenized before.

    Args:
        rows: What to learn.
        encoding: How they become tokens.

    Raises:
        InputError: when the tokenizer or the style cannot serve, or nothing is left to learn.
    """
    import datasets

    datasets.disable_progress_bars()
    check_tokenizer(encoding.tokenizer, encoding.style)
    key = _key(rows, encoding)
    folder = cache_folder("tokenized") / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Of several processes with the same rows one tokenizes, and the others wait and read.
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "fates.json").is_file():
            with whole_folder(folder, overwrite=True) as temporary:
                fates = _write_encoded(temporary, label_rows(rows, encoding), key)
                if not fates["supervised"]:
                    raise InputError(
                        f"no tokens to learn: the cutoff of {encoding.cutoff} tokens cuts away the "
                        f"response of all {len(rows)} rows, from {rows[0].where} on; raise "
                        "data.cutoff"
                    )
    return Encoded(
        datasets.load_from_disk(str(folder)),
        **json.loads((folder / "fates.json").read_text(encoding="utf-8")),
    )


def kept_rows(encoded: Encoded, rows: Sequence[Row], encoding: Encoding) -> list[Row]:
    """Return the rows, as they were read, that are among the encoded ones."""
    if not encoded.dropped:
        return list(rows)
    labelled = zip(rows, label_rows(rows, encoding), strict=True)
    return [row for row, kept in labelled if kept.fate != "dropped"]


def refuse_longer(
    encoded: Encoded, rows: Sequence[Row], encoding: Encoding, context: int | None
) -> None:
    """Refuse rows that a model cannot hold: it was not made for their last positions.

    Args:
        encoded: The rows as tokens.
        rows: The rows as they were read.
        encoding: How they became tokens.
        context: Tokens that the model can hold; None: any number.

    Raises:
        InputError: naming the first of them, how many there are and the cutoff that helps.
    """
    lengths = Rows(encoded).lengths
    longer = [number for number, length in enumerate(lengths) if length > (context or length)]
    if longer:
        first = kept_rows(encoded, rows, encoding)[longer[0]]
        more = f", as in {len(longer) - 1:,} more rows" if longer[1:] else ""
        raise InputError(
            f"{first.where}: {lengths[longer[0]]:,} tokens, more than the model's context of "
            f"{context:,}{more}: data.cutoff={context} cuts them there"
        )


def _key(rows: Sequence[Row], encoding: Encoding) -> str:
    """Return a name made of all that decides the tokens: never of a file's name or time."""
    tokenizer, style = encoding.tokenizer, encoding.style
    digest = hashlib.sha256()
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    # Tokens that were kept for a larger embedding are looked at again for a smaller one.
    digest.update(json.dumps(encoding.unheld).encode())
    settings = {"style": style, "loss": encoding.loss, "cutoff": encoding.cutoff}
    settings |= {"learn": encoding.learn, "special_tokens": encoding.special_tokens}
    for value in (
        {"format": FORMAT, "special": special, **settings},
        tokenizer.backend_tokenizer.to_str(),
        str(tokenizer.chat_template) if style == "chat" else "",
    ):
        digest.update(json.dumps(value, sort_keys=True).encode())
    for start in range(0, len(rows), CHUNK):
        content = [
            (
                row.instruction,
                row.context,
                row.output,
                row.text,
                row.tools,
                *map(astuple, row.messages),
            )
            for row in rows[start : start + CHUNK]
        ]
        digest.update(json.dumps(content).encode())
    return digest.hexdigest()[:32]


def _write_encoded(folder: Path, labelled: Iterator[Labelled], key: str) -> dict[str, Any]:
    """Write the rows that are not dropped; return and write what became of all."""
    import datasets
    import numpy as np
    import pyarrow as pa

    fates: Counter[str] = Counter()
    supervised = controls = thoughts = 0
    control = ""
    # Flat, in 4 bytes a token: 170,000 rows are 110 MB, where lists of Python numbers are 1 GB.
    tokens, labels, ends = array("i"), array("i"), array("i", [0])
    for row in labelled:
        fates[row.fate] += 1
        controls += bool(row.controls)
        control = control or next(iter(row.controls), "")
        thoughts += row.thoughts
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
    counts = {
        "dropped": fates["dropped"],
        "cut": fates["cut"],
        "supervised": supervised,
        "controls": controls,
        "control": control,
        "thoughts": thoughts,
    }
    write_json(folder / "fates.json", counts)
    return counts


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
