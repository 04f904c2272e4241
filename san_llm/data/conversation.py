"""A conversation in a chat template, and where in that text each of its turns stands.

Templates are programs: they trim, split off what was thought, move a system prompt, rewrite earlier
turns. So a conversation is rendered once as it is and once with marks, characters that no text has,
around what each turn says; where the marks come out, the turn stands. Where the second text is not
the first without them, since a template looks at what is said, the answers alone are marked, and
what others say is searched for; and where that does not do, all turns are, in their order. What
stands nowhere would be lost, and its row is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from san_llm.data.rows import Row, Turn
from san_llm.errors import InputError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Planes of Unicode that are nobody's: marks are characters of the first that a row does not use.
PLANES, PLANE = (0xF0000, 0x100000), 0xFFFE
# A turn's keys for what is thought before it is said.
REASONING = ("reasoning_content", "reasoning", "thinking")
_INSIDE = re.compile(r"\A(\s*<think>)(.*)(</think>)(.*)\Z", re.DOTALL)

Message = dict[str, Any]
Kind = Literal["content", "thought", "call", "name"]


@dataclass(frozen=True)
class Answer:
    """What is learned of a turn, as characters of the text.

    Attributes:
        begin: Its first character.
        end: The one after its last; what ends the turn comes behind it.
        called: Whether it ends in calls of tools, and so runs to the turn's end wherever that is.
    """

    begin: int
    end: int
    called: bool = False


@dataclass(frozen=True)
class Written:
    """A row as text.

    Attributes:
        text: All of it.
        answers: What is learned, in order.
        own: The spans that are the row's own words, not the frame's.
        thoughts_left_out: Turns whose thinking the template leaves out.
        templated: Whether a chat template has written the special tokens, too.
    """

    text: str
    answers: tuple[Answer, ...]
    own: tuple[tuple[int, int], ...] = ()
    thoughts_left_out: int = 0
    templated: bool = False


@dataclass(frozen=True)
class _Piece:
    """A part of a turn that has to come out: its text, and the marks around it if it has some."""

    turn: int
    kind: Kind
    text: str
    first: str
    last: str


def turns_of(row: Row) -> list[Message]:
    """Return a row's turns as chat templates take them."""
    if row.messages:
        return [_message(turn) for turn in row.messages]
    question = f"{row.instruction}\n\n{row.context}" if row.context else row.instruction
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": row.output},
    ]


def _message(turn: Turn) -> Message:
    return {"role": turn.role, "content": turn.content, **json.loads(turn.more or "{}")}


def render(
    tokenizer: PreTrainedTokenizerFast,
    turns: Sequence[Message],
    where: str,
    *,
    ask: bool,
    tools: str = "",
) -> str:
    """Return turns in the tokenizer's chat template.

    Args:
        tokenizer: It has a template.
        turns: ``role`` and ``content`` of each, and what else they have.
        where: What the conversation is, for messages.
        ask: Whether the assistant goes on after them.
        tools: Those that may be called, as JSON; empty for none.

    Raises:
        InputError: when the template refuses them.
    """
    offered = {"tools": json.loads(tools)} if tools else {}
    try:
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=ask, **offered
        )
    except Exception as error:  # a template is a program: roles that must alternate, or a bug
        raise InputError(f"{_template(where, tokenizer)} refuses it: {first_line(error)}") from None
    return str(text)


def write_conversation(tokenizer: PreTrainedTokenizerFast, row: Row, last_alone: bool) -> Written:
    """Return a row in the chat template, and which of its characters are learned.

    Args:
        tokenizer: It has a template.
        row: A conversation, or an instruction, which is one of two turns.
        last_alone: Whether the last answer alone is learned.

    Raises:
        InputError: naming the row, and what of it the template leaves out or refuses.
    """
    turns = turns_of(row)
    if turns[0]["role"] == "assistant":
        raise InputError(
            f"{row.where}: begins with the assistant's message; a user's must come first"
        )
    answered = _answered(row, turns)
    text, pieces, found = _found(tokenizer, turns, row, ask=False)
    lost = _lost(pieces, found)
    if lost is not None and answered[-1] == len(turns) - 1:
        # Some write a system prompt only while an answer is asked for (Mistral's).
        text, pieces, found = _asked(tokenizer, turns, row, text, pieces, found)
        lost = _lost(pieces, found)
    if lost is not None:
        what = {"name": "the name of ", "call": "the call of a tool in "}.get(lost.kind, "")
        raise InputError(
            f"{_template(row.where, tokenizer)} leaves out {what}message {lost.turn + 1} "
            f"({turns[lost.turn]['role']}), which would be lost: take it out of the row, or "
            "take another template"
        )
    if row.tools:
        _refuse_lost_tools(tokenizer, turns, text, row)
    answers = tuple(
        _answer(tokenizer, turns, number, text, pieces, found, row)
        for number in (answered[-1:] if last_alone else answered)
    )
    if any(one.end > other.begin for one, other in pairwise(answers)):
        raise InputError(f"{_template(row.where, tokenizer)} writes answers in another order")
    left_out = sum(piece.kind == "thought" and piece not in found for piece in pieces)
    own = tuple(sorted(span for piece, span in found.items()))
    return Written(text, answers, own, left_out, templated=True)


def _template(where: str, tokenizer: PreTrainedTokenizerFast) -> str:
    return f"{where}: the chat template of {tokenizer.name_or_path}"


def _answered(row: Row, turns: Sequence[Message]) -> list[int]:
    """Return the numbers of the turns that are learned."""
    every = [
        number
        for number, turn in enumerate(turns)
        if turn["role"] == "assistant"
        and (turn["content"].strip() or turn.get("tool_calls"))
        and (not row.messages or row.messages[number].learned)
    ]
    if not every:
        raise InputError(f"{row.where}: no turn of the assistant's is to be learned")
    return every


_Found = dict[_Piece, tuple[int, int]]


def _found(
    tokenizer: PreTrainedTokenizerFast, turns: Sequence[Message], row: Row, *, ask: bool
) -> tuple[str, list[_Piece], _Found]:
    """Return the text of turns, their pieces, and the characters where those stand in it."""
    text = render(tokenizer, turns, row.where, ask=ask, tools=row.tools)
    for roles in (None, ("assistant",)):
        marked, pieces = _marked(turns, row.where, roles)
        with_marks = render(tokenizer, marked, row.where, ask=ask, tools=row.tools)
        found = _places(text, with_marks, pieces)
        if found is not None:
            return text, pieces, found
    return text, pieces, _searched(text, pieces)


def _places(text: str, with_marks: str, pieces: Sequence[_Piece]) -> _Found | None:
    """Return where pieces stand, by their marks; None if these have changed the text.

    A piece without marks stands where it is found first.
    """
    marks = {mark for piece in pieces for mark in (piece.first, piece.last)}
    places: dict[str, list[int]] = {}
    without: list[str] = []
    for character in with_marks:
        if character in marks:
            places.setdefault(character, []).append(len(without))
        else:
            without.append(character)
    if "".join(without) != text:
        return None
    found = {}
    for piece in pieces:
        if not piece.first:
            begin = text.find(piece.text)
            if begin >= 0:
                found[piece] = (begin, begin + len(piece.text))
            continue
        begins, ends = places.get(piece.first, []), places.get(piece.last, [])
        if len(begins) == len(ends) == 1:
            found[piece] = (begins[0], ends[0])
    return found


def _searched(text: str, pieces: Iterable[_Piece]) -> _Found:
    """Return where pieces stand one behind another."""
    found, behind = {}, 0
    for piece in pieces:
        begin = text.find(piece.text, behind)
        if begin >= 0:
            behind = begin + len(piece.text)
            found[piece] = (begin, behind)
    return found


def _asked(
    tokenizer: PreTrainedTokenizerFast,
    turns: Sequence[Message],
    row: Row,
    whole: str,
    pieces: list[_Piece],
    found: _Found,
) -> tuple[str, list[_Piece], _Found]:
    """Return turns as they are asked for the last one, and that with what follows it behind."""
    last = len(turns) - 1
    own = [piece for piece in pieces if piece.turn == last]
    if not all(piece in found for piece in own):
        return whole, pieces, found
    asked, before, there = _found(tokenizer, turns[:-1], row, ask=True)
    begin = min(found[piece][0] for piece in own)
    # The template may write a space before an answer that it does not write when it asks.
    spaces = len(whole[:begin]) - len(whole[:begin].rstrip())
    if not asked.endswith(whole[begin - spaces : begin]):
        begin -= spaces
    shift = len(asked) - begin
    moved = {p: (found[p][0] + shift, found[p][1] + shift) for p in own}
    return asked + whole[begin:], before + own, there | moved


def _lost(pieces: Iterable[_Piece], found: _Found) -> _Piece | None:
    """Return the first piece that would be lost; a thought may be left out, and is counted."""
    return next((p for p in pieces if p.kind != "thought" and p not in found), None)


def _marked(
    turns: Sequence[Message], where: str, roles: Collection[str] | None
) -> tuple[list[Message], list[_Piece]]:
    """Return turns with marks around what they say: inside of white space, which templates trim.

    Args:
        turns: All of them.
        where: What the conversation is, for messages.
        roles: Whose turns are marked; None: everybody's.
    """
    used = json.dumps(turns, ensure_ascii=False)
    free = (at for at in PLANES if not any(at <= ord(c) < at + PLANE for c in used))
    plane = next(free, None)
    if plane is None:
        raise InputError(f"{where}: has characters of both of Unicode's private planes")
    pieces: list[_Piece] = []

    def around(text: str, turn: int, kind: Kind) -> str:
        core = text.strip()
        if not core:
            return text
        bare = roles is not None and turns[turn]["role"] not in roles
        first, last = ("" if bare else chr(plane + 2 * len(pieces) + add) for add in (0, 1))
        pieces.append(_Piece(turn, kind, core, first, last))
        lead = text[: len(text) - len(text.lstrip())]
        return f"{lead}{first}{core}{last}{text[len(lead) + len(core) :]}"

    marked = []
    for number, turn in enumerate(turns):
        turn = dict(turn)
        for key in REASONING:
            if isinstance(turn.get(key), str):
                turn[key] = around(turn[key], number, "thought")
        inside = _INSIDE.match(turn["content"]) if turn["role"] == "assistant" else None
        if inside is not None:
            begin, thought, end, said = inside.groups()
            thought = around(thought, number, "thought")
            turn["content"] = f"{begin}{thought}{end}{around(said, number, 'content')}"
        else:
            turn["content"] = around(turn["content"], number, "content")
        if isinstance(turn.get("name"), str) and turn["role"] != "tool":  # its call has that, too
            turn["name"] = around(turn["name"], number, "name")
        if turn.get("tool_calls"):
            turn["tool_calls"] = [
                _with_name(call, around(_function(call)["name"], number, "call"))
                for call in turn["tool_calls"]
            ]
        marked.append(turn)
    return marked, pieces


def _function(call: Message) -> Message:
    function: Message = call.get("function", call)
    return function


def _with_name(call: Message, name: str) -> Message:
    if "function" in call:
        return {**call, "function": {**call["function"], "name": name}}
    return {**call, "name": name}


def _refuse_lost_tools(
    tokenizer: PreTrainedTokenizerFast, turns: Sequence[Message], text: str, row: Row
) -> None:
    names = [_function(tool).get("name") for tool in json.loads(row.tools)]
    without = render(tokenizer, turns, row.where, ask=False)
    lost = next((name for name in names if str(name) not in text), None)
    if lost is not None or len(without) >= len(text):
        raise InputError(
            f"{_template(row.where, tokenizer)} writes no tools, so that {lost or names[0]!r} "
            "would be lost: take them out of the row, or take another template"
        )


def _answer(
    tokenizer: PreTrainedTokenizerFast,
    turns: Sequence[Message],
    number: int,
    text: str,
    pieces: Sequence[_Piece],
    found: _Found,
    row: Row,
) -> Answer:
    """Return what is learned of a turn: what it thinks, says and calls, as far as it is written."""
    own = [p for p in pieces if p.turn == number and p.kind != "name" and p in found]
    begin, end = found[own[0]][0], found[own[-1]][1]
    if own[0].kind == "thought":
        # The tag before it is the model's to write, unless it is asked behind that.
        tag = text.rfind("<think>", 0, begin)
        if tag >= 0 and not text[tag + len("<think>") : begin].strip():
            begin = tag
    elif own[0].kind == "content":
        begin = _with_spaces(tokenizer, turns, number, text, begin, row)
    called = own[-1].kind == "call"
    if called and own[0].kind == "call":
        begin = _behind_header(tokenizer, turns, number, text, begin, row)
    return Answer(begin, end, called)


def _with_spaces(
    tokenizer: PreTrainedTokenizerFast,
    turns: Sequence[Message],
    number: int,
    text: str,
    begin: int,
    row: Row,
) -> int:
    """Return where an answer begins: at its own white space, where the template keeps that.

    The same characters may be the header's, so that is looked up: it is what asks for an answer.
    """
    content = turns[number]["content"]
    spaces = content[: len(content) - len(content.lstrip())]
    if not spaces or not text[:begin].endswith(spaces):
        return begin
    asked = render(tokenizer, turns[:number], row.where, ask=True, tools=row.tools)
    return max(begin - len(spaces), len(asked)) if text[:begin].startswith(asked) else begin


def _behind_header(
    tokenizer: PreTrainedTokenizerFast,
    turns: Sequence[Message],
    number: int,
    text: str,
    named: int,
    row: Row,
) -> int:
    """Return where a turn begins that only calls tools: behind what asks for an answer."""
    before = render(tokenizer, turns[:number], row.where, ask=False, tools=row.tools)
    asked = render(tokenizer, turns[:number], row.where, ask=True, tools=row.tools)
    header = asked.removeprefix(before) if asked.startswith(before) else ""
    at = text.rfind(header, 0, named) if header else -1
    if at < 0:
        raise InputError(
            f"{_template(row.where, tokenizer)} does not say where message {number + 1}, a call of "
            "a tool, begins; take another template"
        )
    return at + len(header)
