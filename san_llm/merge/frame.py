"""The frame that a model was trained in goes with it: its chat template, and what ends a turn.

A style of instructions becomes a template that writes the same text, so that stock programs ask as
training did. What is exported is held to that: a training row, as the exported template writes it,
has the tokens that were learned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from san_llm.data.conversation import render, turns_of
from san_llm.data.encode import IGNORE, encoding_of, label_rows
from san_llm.data.ends import TurnEnd, turn_end
from san_llm.data.rows import Row
from san_llm.data.split import missing_file, stream_training
from san_llm.errors import InputError, SanError
from san_llm.files import read_json, write_json, write_text
from san_llm.merge.whole import GENERATION
from san_llm.models.locate import FoundBase
from san_llm.models.tokenizer import begins_texts, training_tokenizer
from san_llm.protocol.prompts import PromptStyle
from san_llm.protocol.templates import template, with_system
from san_llm.recipe.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FILE = "chat_template.jinja"
LOOKED_AT = 1000  # rows, for one that a chat template can say


def frame_of(
    tokenizer: PreTrainedTokenizerFast, style: PromptStyle, system: str | None
) -> str | None:
    """Return the chat template that writes what a model was trained on; None: it is the base's.

    Args:
        tokenizer: With the chat template of the training.
        style: The prompt style.
        system: The system prompt that every training row began with.
    """
    if style != "chat":
        return template(style, begins_texts(tokenizer))
    own: Any = tokenizer.chat_template
    if not isinstance(own, str):
        return None
    if system is None:
        return own
    turns = [{"role": "user", "content": "Question"}]
    prompted = [{"role": "system", "content": system}, *turns]
    alone, said = (render(tokenizer, asked, "a prompt", ask=True) for asked in (turns, prompted))
    return own if alone == said else with_system(own, system)


def keep_frame(
    tokenizer: PreTrainedTokenizerFast,
    style: PromptStyle,
    system: str | None,
    base: Path,
    folder: Path,
) -> None:
    """Write the frame that a model was trained in, and that its turns' end ends an answer.

    Args:
        tokenizer: See :func:`frame_of`.
        style: Likewise.
        system: Likewise.
        base: The base's folder, whose settings are taken along.
        folder: The adapter's or the model's.
    """
    written = frame_of(tokenizer, style, system)
    if written is not None:
        write_text(folder / FILE, written)
    if style != "chat":  # whose answers end with the text
        return
    file = base / GENERATION
    settings = read_json(file) if file.is_file() else {}
    own = settings.get("eos_token_id", tokenizer.eos_token_id)
    ends = own if isinstance(own, list) else [own]
    turn = turn_end(tokenizer).token
    if turn is not None and turn not in ends:
        write_json(folder / GENERATION, settings | {"eos_token_id": [*ends, turn]})


def keep_recipes_frame(recipe: Recipe, found: FoundBase, folder: Path) -> None:
    """Write the frame of an adapter that was made before it was kept, as its recipe says it."""
    if found.vocabulary is None:  # no model for text
        return
    keep_frame(training_tokenizer(recipe, found), recipe.data.prompt, None, found.folder, folder)


@dataclass(frozen=True)
class Taught:
    """A training row as it was learned.

    Attributes:
        where: File and row.
        turns: What a chat template is given.
        tools: Those that it may call, as JSON.
        tokens: Up to the last that was learned.
        open: Whether that is an end of text which no template writes.
    """

    where: str
    turns: list[dict[str, Any]]
    tools: str
    tokens: list[int]
    open: bool


def taught(recipe: Recipe, found: FoundBase) -> Taught | str:
    """Return a training row as tokens, or why there is none to look at.

    Args:
        recipe: Of the training.
        found: Its base.
    """
    data, missing = recipe.data, missing_file(recipe.data)
    if missing is not None:
        return f"{missing} is not here"
    whole = data.model_copy(update={"cutoff": 10**9, "loss": "response"})
    try:
        tokenizer = training_tokenizer(recipe, found)
        encoding = encoding_of(whole, tokenizer, None)
        for row in islice(_sayable(recipe), LOOKED_AT):
            (labelled,) = label_rows([row], encoding)
            if labelled.controls:  # may have been learned as letters
                continue
            learned = [n for n, label in enumerate(labelled.labels) if label != IGNORE]
            tokens = labelled.tokens[: learned[-1] + 1]
            open_end = data.prompt == "chat" and turn_end(tokenizer) == TurnEnd()
            return Taught(row.where, turns_of(row), row.tools, tokens, open_end)
    except InputError as error:
        return str(error)
    return f"a chat template can say none of the first {LOOKED_AT:,} training rows"


def _sayable(recipe: Recipe) -> Iterator[Row]:
    """Give training rows that are conversations or, without an input, instructions."""
    chat = recipe.data.prompt == "chat"
    for row in stream_training(recipe.data, recipe.training.seed):
        if not row.text and (chat or not row.context):
            yield row


def check_frame(file: str, row: Taught, got: list[int], words: Any) -> int:
    """Return how many tokens an exported template writes as they were learned.

    Args:
        file: The name of the file with the template.
        row: What was learned.
        got: What the template makes of it.
        words: Names tokens.

    Raises:
        SanError: naming the first token that is another.
    """
    wanted = row.tokens[:-1] if row.open else row.tokens
    if got[: len(wanted)] == wanted:
        return len(wanted)
    pairs = enumerate(zip(got, wanted, strict=False))
    at = next((n for n, (a, b) in pairs if a != b), min(len(got), len(wanted)))
    shown = [
        repr(words.decode(ids[at : at + 1])) if at < len(ids) else "none" for ids in (got, wanted)
    ]
    raise SanError(
        f"{file}: its chat template writes {row.where} otherwise than it was learned: token "
        f"{at + 1:,} is {shown[0]}, learned was {shown[1]}"
    )
