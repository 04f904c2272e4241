"""The voices that are asked: one model, or one without and with its adapter, side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from san_llm.errors import InputError
from san_llm.models.subject import Subject
from san_llm.progress import say
from san_llm.shown import escaped

if TYPE_CHECKING:
    from san_llm.ask.respond import Answer


LINE = 60  # characters of a system prompt that are told


def voices(subject: Subject, compare: bool) -> list[str]:
    """Return who answers: ``model`` or ``adapted``, or ``base`` and ``adapted``.

    Raises:
        InputError: when two are to be compared and there is no adapter.
    """
    if compare:
        if subject.whole is not None:
            raise InputError(
                "--compare: the run trained every weight, so that its base is another model: ask "
                "it with --base-only"
            )
        if subject.adapter is None:
            raise InputError("--compare: there is no adapter to leave out; name one with --adapter")
        return ["base", "adapted"]
    return ["adapted" if subject.adapter else "model"]


def tell_system(prompt: str | None) -> None:
    """Say which system prompt a model is asked with that nobody said, if there is one."""
    if prompt is not None:
        line = " ".join(prompt.split())
        words = line if len(line) <= LINE else f"{line[:LINE]}..."
        say(f'system prompt of its training: "{shown(words)}" (--system says another)')


def show(
    voices: list[str], ask: Callable[[str, Callable[[str], None]], Answer], quiet: bool = False
) -> list[Answer]:
    """Return each voice's answer, shown as it comes, or two side by side."""
    if quiet:
        return [ask(voice, lambda piece: None) for voice in voices]
    if len(voices) == 1:
        begun = False

        def write(piece: str) -> None:
            nonlocal begun
            piece = piece if begun else piece.lstrip()
            begun = begun or bool(piece)
            sys.stdout.write(shown(piece))
            sys.stdout.flush()

        answers = [ask(voices[0], write)]
        print(flush=True)
        _say_cut(answers)
        return answers
    texts = dict.fromkeys(voices, "")
    console = Console(highlight=False)
    answers = []
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for voice in voices:

            def grow(piece: str, voice: str = voice) -> None:
                texts[voice] += piece
                if console.is_terminal:
                    live.update(_side_by_side(texts), refresh=True)

            answers.append(ask(voice, grow))
    console.print(_side_by_side({answer.by: answer.text for answer in answers}))
    _say_cut(answers)
    return answers


def _say_cut(answers: list[Answer]) -> None:
    for answer in answers:
        if not answer.ended:
            why = "the model's context is full" if answer.full else "--max-new-tokens"
            say(f"{answer.by}: cut after {answer.tokens} tokens ({why})")


def _side_by_side(texts: dict[str, str]) -> Table:
    table = Table(box=SIMPLE_HEAD, expand=True)
    for voice in texts:
        table.add_column(voice, ratio=1)
    table.add_row(*(Text(shown(text.strip())) for text in texts.values()))
    return table


def shown(text: str) -> str:
    """Return a text with control characters, which could change a terminal, as escapes."""
    return escaped(text, kept="\n\t")
