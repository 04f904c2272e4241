"""``san-llm generate``: answers of a base, an adapted or a merged model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    Overwrite,
    Seed,
    System,
    Temperature,
    results,
    run_folders,
)
from san_llm.errors import InputError, check_one_of
from san_llm.files import refuse_file
from san_llm.models.subject import Subject, find_subject
from san_llm.progress import quiet_libraries, say
from san_llm.protocol.prompts import STYLES
from san_llm.protocol.templates import system_of
from san_llm.runs.folder import HELD_OUT, HELD_OUT_ANSWERS
from san_llm.shown import escaped

if TYPE_CHECKING:
    from san_llm.ask.respond import Answer, Way


generate_app = typer.Typer(rich_markup_mode=None)


@generate_app.command(
    epilog="""Examples:

    san-llm generate "Why is the sky blue?"

    san-llm generate --compare "Translate into French." --input "It is raining."

    san-llm generate --prompt-style alpaca < question.txt

    san-llm generate --rows questions.jsonl --output answers.jsonl

    san-llm generate --lines --json < questions.txt

    san-llm generate --model runs/latest/merged --json "Is ice lighter than water?" """
)
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="What is asked. Default: what stdin has.")
    ] = None,
    context: Annotated[
        str, typer.Option("--input", help="What a training row has as its input, if any.")
    ] = "",
    rows: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Answer every row of this file, of any shape that training reads, or the run's "
            "held-out rows: held-out.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Of --rows: a .jsonl file, the rows with their answers. Default of held-out: "
            "held_out.jsonl in the run's folder.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Of --rows: only the first rows.")
    ] = None,
    lines: Annotated[
        bool, typer.Option("--lines", help="Answer each line of stdin, as it comes, by a line.")
    ] = False,
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
    overwrite: Overwrite = False,
) -> None:
    """Answer one prompt, a file's rows or stdin's lines, as they were asked in training."""
    quiet_libraries()
    if style is not None:
        check_one_of("--prompt-style", style, (*STYLES, "none"))
    _check_together(prompt, context, rows, output, limit, lines, overwrite)
    if rows is not None and system is not None:
        raise InputError("--rows and --system exclude each other: a row says its own, if any")
    _check_sampled(rows, temperature, seed)
    if lines and compare and not as_json:
        raise InputError("--lines --compare: two answers are no line; add --json")
    subject = find_subject(model, adapter, base_only, dtype, run)
    names = voices(subject, compare)
    if rows is not None:
        file = _output(rows, output, subject, overwrite)
        _answer_rows(subject, names, rows, file, limit, style, date, max_new_tokens, as_json)
        return
    words = "" if lines else _words(prompt)

    from san_llm.ask.respond import Sampling, posed, respond, way_of
    from san_llm.models.load import load_model

    way = way_of(subject, style, date, system)
    text, tokens = ("", []) if lines else posed(way, words, context)
    if not as_json:
        say(f"asking {subject} {_frame(way)}")
        if way.style == "chat" and system is None:
            tell_system(system_of(str(way.tokenizer.chat_template)))
    loaded = load_model(way.found, subject.adapter)
    sampling = Sampling(max_new_tokens, temperature, seed)

    def answers(tokens: list[int], quiet: bool) -> list[Answer]:
        def ask(by: str, on_text: Callable[[str], None]) -> Answer:
            return respond(loaded, way.tokenizer, tokens, sampling, on_text, by)

        return show(names, ask, quiet)

    if lines:
        for number, line in enumerate(_lines(), start=1):
            text, tokens = _posed_line(way, number, line, context)
            _show_line(number, text, answers(tokens, True) if tokens else [], as_json)
        return
    answered = answers(tokens, as_json)
    if as_json:
        said = {"prompt": text, "answers": [asdict(answer) for answer in answered]}
        print(json.dumps(_about(subject, way) | said))


def _posed_line(way: Way, number: int, line: str, context: str) -> tuple[str, list[int]]:
    """Return a line of stdin as it is asked, and its tokens; an empty one is not.

    Raises:
        InputError: naming the line that leaves no room for an answer.
    """
    from san_llm.ask.respond import posed

    if not line.strip():
        return "", []
    try:
        return posed(way, line, context)
    except InputError as error:
        raise InputError(f"stdin: line {number}: {error}") from None


def _frame(way: Way) -> str:
    day = f", told that today is {way.date}" if way.date else ""
    return f"in prompt style {way.style}{day}"


def _about(subject: Subject, way: Way) -> dict[str, Any]:
    return {
        "model": subject.base.model,
        "adapter": str(subject.adapter) if subject.adapter else None,
        "style": way.style,
        **({"date": way.date} if way.date else {}),
    }


def _lines() -> Iterator[str]:
    """Give the lines of stdin as they come, without their ends."""
    try:
        for line in sys.stdin:
            yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(f"stdin: not UTF-8: byte {error.start} is not valid") from None


def _show_line(number: int, prompt: str, answers: list[Answer], as_json: bool) -> None:
    """Print the answer to a line as one; that to an empty line is empty."""
    if as_json:
        said = {"line": number, "prompt": prompt, "answers": [asdict(each) for each in answers]}
        print(json.dumps(said), flush=True)
        return
    print(escaped("".join(answer.text.strip() for answer in answers), kept="\t"), flush=True)
    for answer in answers:
        if not answer.ended:
            say(f"line {number}: cut after {answer.tokens} tokens")


def _check_together(
    prompt: str | None,
    context: str,
    rows: str | None,
    output: Path | None,
    limit: int | None,
    lines: bool,
    overwrite: bool,
) -> None:
    """Refuse options that have no meaning beside each other.

    Raises:
        InputError: naming two of them.
    """
    many = "--rows" if rows is not None else "--lines"
    if prompt is not None and (rows is not None or lines):
        raise InputError(f"{many} and a prompt exclude each other")
    if rows is not None:
        if lines:
            raise InputError("--rows and --lines exclude each other")
        if context:
            raise InputError("--rows and --input exclude each other: a row has its own input")
        return
    for name, given in (("--output", output), ("--limit", limit), ("--overwrite", overwrite)):
        if given:
            raise InputError(f"{name}: is of --rows FILE, which is not there")


def _check_sampled(rows: str | None, temperature: float, seed: int | None) -> None:
    if rows is not None and (temperature or seed is not None):
        name = "--temperature" if temperature else "--seed"
        raise InputError(f"--rows takes the likeliest tokens, without {name}; --lines samples")


def _output(rows: str, output: Path | None, subject: Subject, overwrite: bool) -> Path:
    """Return the file that answers are written to, which is refused where it cannot be.

    Raises:
        InputError: when there is none, it is not named as JSONL is, or something is in the way.
    """
    if output is None and rows == HELD_OUT and subject.run is not None and subject.trained:
        output = subject.run / HELD_OUT_ANSWERS
    if output is None:
        raise InputError("--rows: name the file to write, --output answers.jsonl")
    if output.suffix.lower() != ".jsonl":
        raise InputError(f"--output {output}: a JSON object a line is written; name it .jsonl")
    refuse_file(output, overwrite)
    return output


def _answer_rows(
    subject: Subject,
    names: list[str],
    rows: str,
    output: Path,
    limit: int | None,
    style: str | None,
    date: str | None,
    new_tokens: int,
    as_json: bool,
) -> None:
    from san_llm.ask.respond import way_of
    from san_llm.ask.rows import answer_keys, answer_rows, posed_rows, rows_of
    from san_llm.models.load import load_model

    keys, asked = answer_keys(names), rows_of(rows, subject, limit)
    way = way_of(subject, style, date)
    posed = posed_rows(way, asked, new_tokens, keys.values())
    count = len(posed.values)
    say(f"asking {subject} {count:,} rows {_frame(way)}")
    cut = answer_rows(load_model(way.found, subject.adapter), posed, keys, output)
    if cut:
        say(f"{cut:,} answers were cut (--max-new-tokens {new_tokens}, or the context is full)")
    if as_json:
        said = {"rows": count, "cut": cut, "keys": list(keys.values()), "output": str(output)}
        print(json.dumps(_about(subject, way) | said))
    else:
        results(str(output))


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
