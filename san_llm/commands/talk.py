"""``san-llm generate`` and ``san-llm chat``: ask a base, an adapted or a merged model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from san_llm.commands.options import Json
from san_llm.data.prompts import STYLES, prompt_style
from san_llm.errors import InputError, check_one_of, escaped
from san_llm.progress import quiet_libraries, stderr

if TYPE_CHECKING:
    from san_llm.respond import Answer
    from san_llm.subject import Subject

talk_app = typer.Typer(rich_markup_mode=None)

Model = Annotated[str | None, typer.Option(help="Ask this model: a folder or hub id.")]
Adapter = Annotated[
    Path | None, typer.Option(help="Ask with this adapter. Default: the last run's.")
]
BaseOnly = Annotated[bool, typer.Option("--base-only", help="Ask the base without the adapter.")]
Compare = Annotated[
    bool, typer.Option("--compare", help="Show the answers without and with the adapter.")
]
DType = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16. Default: the run's.")
]
NewTokens = Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")]
Temperature = Annotated[
    float,
    typer.Option(min=0, max=100, help="0 takes the likeliest token; 1 samples as the model says."),
]
Seed = Annotated[
    int | None, typer.Option(min=0, max=2**32 - 1, help="Sample the same answer each time.")
]


@talk_app.command(
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
    subject = _subject(model, adapter, base_only, compare, dtype)
    asked = _asked(prompt)

    from san_llm.model import load_config, load_subject, load_tokenizer
    from san_llm.respond import NO_STYLE, Sampling, question, respond, room, usual_style

    tokenizer = load_tokenizer(subject.base)
    style = style or usual_style(subject, tokenizer)
    if context and style == NO_STYLE:
        raise InputError("--input: prompt style none has no place for one; put it in the prompt")
    if not as_json:
        stderr.print(f"asking {subject} in prompt style {style}", markup=False)
    named = None if style == NO_STYLE else prompt_style(style)
    text, tokens = question(asked, named, tokenizer, context)
    room(tokens, load_config(subject.base))  # told before the weights are loaded
    loaded, _ = load_subject(subject)
    how = Sampling(max_new_tokens, temperature, seed)

    def ask(by: str, told: Callable[[str], None]) -> Answer:
        return respond(loaded, tokenizer, tokens, how, told, by)

    answers = _show(_voices(subject, compare), ask, quiet=as_json)
    if as_json:
        about = {
            "model": subject.base.model,
            "adapter": str(subject.adapter) if subject.adapter else None,
            "style": style,
            "prompt": text,
        }
        print(json.dumps(about | {"answers": [asdict(answer) for answer in answers]}))


@talk_app.command(
    epilog="""Examples:

    san-llm chat

    san-llm chat --compare --temperature 0.7

    san-llm chat --model runs/latest/merged"""
)
def chat(
    model: Model = None,
    adapter: Adapter = None,
    base_only: BaseOnly = False,
    compare: Compare = False,
    max_new_tokens: NewTokens = 512,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    dtype: DType = None,
) -> None:
    """Talk with a model in its chat template; /clear begins anew, /exit or Ctrl-D ends."""
    quiet_libraries()
    subject = _subject(model, adapter, base_only, compare, dtype)

    from san_llm.model import load_subject, load_tokenizer
    from san_llm.respond import Sampling, refuse_no_template, respond, talk, usual_style

    tokenizer = load_tokenizer(subject.base)
    refuse_no_template(tokenizer)
    trained = usual_style(subject, tokenizer)
    if trained != "chat":
        stderr.print(f"trained in prompt style {trained}, as `san-llm generate` asks; this is chat")
    loaded, _ = load_subject(subject)
    how = Sampling(max_new_tokens, temperature, seed)
    voices = _voices(subject, compare)
    turns: dict[str, list[dict[str, str]]] = {voice: [] for voice in voices}

    def ask(by: str, told: Callable[[str], None]) -> Answer:
        _, tokens = talk(turns[by], tokenizer)
        return respond(loaded, tokenizer, tokens, how, told, by)

    for said in _lines(subject):
        if said == "/exit":
            return
        if said == "/clear":
            turns = {voice: [] for voice in voices}
            continue
        before = {voice: list(history) for voice, history in turns.items()}
        for history in turns.values():
            history.append({"role": "user", "content": said})
        try:
            answers = _show(voices, ask)
        except InputError as error:  # too long for the context, say: the rest may go on
            stderr.print(f"{error}; /clear begins anew", markup=False)
            turns = before
            continue
        except KeyboardInterrupt:
            stderr.print("\nstopped; the question is taken back")
            turns = before
            continue
        for answer in answers:
            turns[answer.by].append({"role": "assistant", "content": answer.text.strip()})


def _subject(
    model: str | None, adapter: Path | None, base_only: bool, compare: bool, dtype: str | None
) -> Subject:
    from san_llm.subject import find_subject

    subject = find_subject(model, adapter, base_only, dtype)
    if compare and subject.adapter is None:
        raise InputError("--compare: there is no adapter to leave out; name one with --adapter")
    return subject


def _voices(subject: Subject, compare: bool) -> list[str]:
    if compare:
        return ["base", "adapted"]
    return ["adapted" if subject.adapter else "model"]


def _asked(prompt: str | None) -> str:
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


def _lines(subject: Subject) -> Iterator[str]:
    """Give what is typed or piped in, line by line; empty ones are left out."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 - input() then has a history and arrow keys

        stderr.print(f"asking {subject}; /clear begins anew, /exit or Ctrl-D ends", markup=False)
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


def _show(
    voices: list[str], ask: Callable[[str, Callable[[str], None]], Answer], quiet: bool = False
) -> list[Answer]:
    """Ask each voice, showing one answer as it comes, or two side by side."""
    if quiet:
        return [ask(voice, lambda piece: None) for voice in voices]
    if len(voices) == 1:
        begun = False

        def told(piece: str) -> None:
            nonlocal begun
            piece = piece if begun else piece.lstrip()
            begun = begun or bool(piece)
            sys.stdout.write(_shown(piece))
            sys.stdout.flush()

        answers = [ask(voices[0], told)]
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
            stderr.print(f"{answer.by}: cut after {answer.tokens} tokens (--max-new-tokens)")


def _side_by_side(texts: dict[str, str]) -> Table:
    table = Table(box=SIMPLE_HEAD, expand=True)
    for voice in texts:
        table.add_column(voice, ratio=1)
    table.add_row(*(Text(_shown(text.strip())) for text in texts.values()))
    return table


def _shown(text: str) -> str:
    """Return a text with control characters, which could change a terminal, as escapes."""
    return escaped(text, kept="\n\t")
