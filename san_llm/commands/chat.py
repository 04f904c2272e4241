"""``san-llm chat``: talk with a model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from san_llm.ask.conversations import Turns, keep, last_conversation, with_system
from san_llm.ask.voices import show, tell_system, voices
from san_llm.commands.options import (
    Adapter,
    BaseOnly,
    Compare,
    Date,
    DType,
    Model,
    NewTokens,
    Run,
    Seed,
    System,
    Temperature,
)
from san_llm.errors import InputError
from san_llm.models.subject import find_subject
from san_llm.progress import quiet_libraries, say
from san_llm.protocol.templates import system_of

if TYPE_CHECKING:
    from san_llm.ask.respond import Answer
    from san_llm.models.subject import Subject


chat_app = typer.Typer(rich_markup_mode=None)


@chat_app.command(
    epilog="""Examples:

    san-llm chat

    san-llm chat --compare --temperature 0.7

    san-llm chat runs/mine

    san-llm chat --continue

    san-llm chat --model runs/latest/merged"""
)
def chat(
    run: Run = None,
    model: Model = None,
    adapter: Adapter = None,
    base_only: BaseOnly = False,
    compare: Compare = False,
    system: System = None,
    go_on: Annotated[
        bool, typer.Option("--continue", help="Go on with the last conversation with this model.")
    ] = False,
    date: Date = None,
    max_new_tokens: NewTokens = 512,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    dtype: DType = None,
) -> None:
    """Talk with a model in its chat template; /clear begins anew, /exit or Ctrl-D ends."""
    quiet_libraries()
    subject = find_subject(model, adapter, base_only, dtype, run)
    names = voices(subject, compare)
    turns: Turns = last_conversation(subject, names) if go_on else {voice: [] for voice in names}
    turns = {voice: with_system(history, system) for voice, history in turns.items()}

    from san_llm.ask.respond import (
        Sampling,
        in_frame,
        refuse_no_template,
        respond,
        talk,
        usual_style,
        words_of,
    )
    from san_llm.models.load import load_model
    from san_llm.models.locate import find_base

    found = find_base(subject.base)
    tokenizer, told = words_of(found, subject, date)
    refuse_no_template(tokenizer)
    trained = usual_style(subject, tokenizer)
    if not in_frame(trained, tokenizer):
        say(f"trained in prompt style {trained}, as `san-llm generate` asks; this is chat")
    if told is not None:
        say(f"the chat template is told that today is {told}")
    if system is None:
        tell_system(system_of(str(tokenizer.chat_template)))
    loaded = load_model(found, subject.adapter)
    sampling = Sampling(max_new_tokens, temperature, seed)

    def ask(by: str, on_text: Callable[[str], None]) -> Answer:
        _, tokens = talk(turns[by], tokenizer)
        return respond(loaded, tokenizer, tokens, sampling, on_text, by)

    for line in _lines(subject):
        if line == "/exit":
            return
        if line == "/clear":
            turns = {voice: with_system([], system) for voice in names}
            continue
        before = {voice: list(history) for voice, history in turns.items()}
        for history in turns.values():
            history.append({"role": "user", "content": line})
        try:
            answers = show(names, ask)
        except InputError as error:  # too long for the context, say: the rest may go on
            say(f"{error}; /clear begins anew")
            turns = before
            continue
        except KeyboardInterrupt:
            say("\nstopped; the question is taken back")
            turns = before
            continue
        for answer in answers:
            turns[answer.by].append({"role": "assistant", "content": answer.text.strip()})
        keep(subject, turns)


def _lines(subject: Subject) -> Iterator[str]:
    """Give what is typed or piped in, line by line; empty ones are left out."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 - input() then has a history and arrow keys

        say(f"asking {subject}; /clear begins anew, /exit or Ctrl-D ends")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            if sys.stdin.isatty():
                print()
            return
        except UnicodeDecodeError as error:
            raise InputError(f"stdin: not UTF-8: byte {error.start} is not valid") from None
        if line.strip():
            yield line.strip()
