"""The last conversation with each model, kept so that it can go on: a file a model, the user's own.

It lies in the user's state folder, not in the run's: a run is handed on, what was said is not.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from san_llm.errors import InputError
from san_llm.files import key_of, state_folder, write_text
from san_llm.models.subject import Subject
from san_llm.progress import say


class Said(BaseModel):
    """One turn."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: str
    content: str


class Conversation(BaseModel):
    """A conversation.

    Attributes:
        subject: Who answered, in words.
        last: When it last did, as ISO 8601.
        turns: What was said, by who answered: ``base`` and ``adapted`` have their own answers.
    """

    model_config = ConfigDict(strict=True)

    subject: str
    last: str
    turns: dict[str, list[Said]]


Turns = dict[str, list[dict[str, str]]]


def with_system(turns: list[dict[str, str]], prompt: str | None) -> list[dict[str, str]]:
    """Return a conversation that begins with a system prompt, instead of its own; None: as it is.

    Args:
        turns: ``role`` and ``content`` of each; there may be none.
        prompt: The system prompt.
    """
    if prompt is None:
        return turns
    first = {"role": "system", "content": prompt}
    return [first, *(turn for turn in turns if turn["role"] != "system")]


def file_of(subject: Subject) -> Path:
    """Return the file of the last conversation with a model."""
    places = (Path(subject.base.model), subject.adapter)
    found = [str(p.resolve() if p and p.exists() else p) for p in places]
    return state_folder("chat") / f"{key_of({'asked': found})}.json"


def last_conversation(subject: Subject, voices: Sequence[str]) -> Turns:
    """Return what was said last with a model, by who answers; tell how long ago.

    Raises:
        InputError: when there is none, the file is damaged, or one of the voices had no part in it.
    """
    file = file_of(subject)
    try:
        kept = Conversation.model_validate_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"--continue: no conversation with {subject} so far; without it one begins"
        ) from None
    except (OSError, ValidationError, UnicodeDecodeError):
        raise InputError(f"{file}: not a conversation that `san-llm chat` has kept") from None
    if absent := [voice for voice in voices if voice not in kept.turns]:
        raise InputError(
            f"--continue --compare: the last conversation with {subject} was not compared: "
            f"{absent[0]} had no part in it"
        )
    turns = {voice: [said.model_dump() for said in kept.turns[voice]] for voice in voices}
    count = len(turns[voices[0]]) // 2
    say(f"going on with the conversation of {kept.last} (answers so far: {count})")
    return turns


def keep(subject: Subject, turns: Turns) -> None:
    """Keep a conversation instead of the last one; where that cannot be, say so and go on."""
    file = file_of(subject)
    now = f"{datetime.now():%Y-%m-%d %H:%M}"
    said = json.dumps({"subject": str(subject), "last": now, "turns": turns}, ensure_ascii=False)
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_text(file, f"{said}\n")
    except OSError as error:
        say(f"{file.parent}: the conversation cannot be kept: {error.strerror}")
