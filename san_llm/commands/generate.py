"""``san-llm generate``: one answer of a base, an adapted or a merged model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from san_llm.ask.voices import show, tell_system, voices
from san_llm.commands.options import (
    Adapter,
    BaseOnly,
    Compare,
    Date,
    DType,
    Json,
    Model,
    NewTokens,
    Seed,
    System,
    Temperature,
    run_folders,
)
from san_llm.errors import InputError, check_one_of
from san_llm.models.subject import find_subject
from san_llm.progress import quiet_libraries, say
from san_llm.protocol.prompts import STYLES

if TYPE_CHECKING:
    from san_llm.ask.respond import Answer


generate_app = typer.Typer(rich_markup_mode=None)


@generate_app.command(
    epilog="""Examples:

    san-llm generate "Why is the sky blue?"

    san-llm generate --compare "Translate into French." --input "It is raining."

    san-llm generate --prompt-style alpaca < question.txt

    san-llm generate --model runs/latest/merged --json "Is ice lighter than water?" """
)
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="What is asked. Default: what stdin has.")
    ] = None,
    context: Annotated[
        str, typer.Option("--input", help="What a training row has as its input, if any.")
    ] = "",
    run: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            autocompletion=run_folders,
            help="Ask with this run's adapter, or this adapter. Default: the last run's.",
        ),
    ] = None,
    model: Model = None,
    adapter: Adapter = None,
    base_only: BaseOnly = False,
    compare: Compare = False,
    style: Annotated[
        str | None,
        typer.Option(
            "--prompt-style",
            help="llm-adapters, llm-adapters-aligned, alpaca, chat, or none for the prompt as it "
            "stands. Default: the run's, else chat where the model has a template, else none.",
        ),
    ] = None,
    system: System = None,
    date: Date = None,
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    dtype: DType = None,
    as_json: Json = False,
) -> None:
    """Answer one prompt, as it was asked in training."""
    quiet_libraries()
    if style is not None:
        check_one_of("--prompt-style", style, (*STYLES, "none"))
    subject = find_subject(model, adapter, base_only, dtype, run)
    names = voices(subject, compare)
    words = _words(prompt)

    from san_llm.ask.respond import Sampling, posed, respond
    from san_llm.models.load import load_model

    question = posed(subject, words, style, context, date, system)
    if not as_json:
        day = f", told that today is {question.date}" if question.date else ""
        say(f"asking {subject} in prompt style {question.style}{day}")
        tell_system(question.system)
    loaded = load_model(question.found, subject.adapter)
    sampling = Sampling(max_new_tokens, temperature, seed)

    def ask(by: str, on_text: Callable[[str], None]) -> Answer:
        return respond(loaded, question.tokenizer, question.tokens, sampling, on_text, by)

    answers = show(names, ask, quiet=as_json)
    if as_json:
        about = {
            "model": subject.base.model,
            "adapter": str(subject.adapter) if subject.adapter else None,
            "style": question.style,
            **({"date": question.date} if question.date else {}),
            "prompt": question.text,
        }
        print(json.dumps(about | {"answers": [asdict(answer) for answer in answers]}))


def _words(prompt: str | None) -> str:
    if prompt is None:
        if sys.stdin.isatty():
            raise InputError("no prompt: write one behind the command, or pipe one in")
        try:
            prompt = sys.stdin.read().rstrip("\n")
        except UnicodeDecodeError as error:
            raise InputError(f"stdin: not UTF-8: byte {error.start} is not valid") from None
    if not prompt.strip():
        raise InputError("the prompt is empty")
    return prompt
