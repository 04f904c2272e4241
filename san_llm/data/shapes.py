"""What a row says, by its keys: the shapes that people's files have, and one row of each kind.

==================  ===========================================================================
LLM-Adapters        ``instruction``, ``input``, ``output``, ``answer``
Alpaca              ``instruction``, ``input``, ``output``, besides ``system`` and ``history``
messages            ``messages`` of ``role`` and ``content``; ``tools``, ``system`` beside them
ShareGPT            ``conversations`` of ``from`` and ``value``; ``tools``, ``system`` beside them
prompt, completion  two texts, or two lists of messages
text                ``text``, which is learned whole
==================  ===========================================================================

What a row says besides is honoured or refused, never dropped, where it means something to what is
learned; other keys (ids, sources, scores) say nothing of it, and are told.

A row that is only asked (:func:`read_asked`) needs no answer; one that it has is what is expected.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from san_llm.data.rows import ROLES, Row, Turn
from san_llm.data.values import kind
from san_llm.errors import InputError, did_you_mean, not_one_of

# The keys that make a shape, in the order in which they are named.
SHAPES: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "ShareGPT": ("conversations",),
    "prompt and completion": ("prompt", "completion"),
    "instruction and output": ("instruction", "output"),
    "text": ("text",),
}
BESIDE = {
    "messages": ("system", "tools"),
    "ShareGPT": ("system", "tools"),
    "prompt and completion": ("system", "tools"),
    "instruction and output": ("input", "answer", "system", "history"),
    "text": (),
}
ANSWERS = ("output", "completion", "answer")  # what a row that is only asked may lack
KEYS = tuple(dict.fromkeys(key for shape, keys in SHAPES.items() for key in keys + BESIDE[shape]))
SPEAKERS = {
    **{role: role for role in ROLES},
    "developer": "system",  # OpenAI's newer name of it
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "function", "ipython"), "tool"),
    "function_call": "function_call",
}
# Of a turn: what makes it learned or not, what templates know of it, and what says nothing.
LEARNED = ("weight", "train", "loss")
PASSED_ON = ("tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking")
FUNCTION_CALL = "function_call"


def read_row(path: Path | str, where: str, value: Any, columns: Mapping[str, str] | None) -> Row:
    """Return a file's value as the row that it is, checked.

    Args:
        path: The file, for messages.
        where: Its place there.
        value: What stands there.
        columns: Which column is which key; None: they are named so.

    Raises:
        InputError: naming the file, the row and what is wrong with it.
    """
    at = f"{path}: {where}"
    value = _object(at, where, value)
    if columns is not None:
        value = _renamed(at, value, columns)
    shape = _shape(at, value)
    row = _read(at, shape, value)
    read = SHAPES[shape] + BESIDE[shape]
    unread = tuple(key for key, said in value.items() if key not in read and said is not None)
    return replace(row, unread=_ONCE.setdefault(unread, unread)) if unread else row


_ONCE: dict[tuple[str, ...], tuple[str, ...]] = {}  # rows of a file have the same keys


def _read(at: str, shape: str, value: dict[str, Any]) -> Row:
    if shape == "text":
        return Row(text=_text(at, "text", value["text"]), shape=shape, where=at)
    if shape == "instruction and output":
        return _instruction(at, value)
    if shape == "prompt and completion":
        return _completion(at, value)
    key = SHAPES[shape][0]
    return _conversation(at, shape, _turns(at, key, value[key]), value)


def read_asked(path: Path | str, where: str, value: Any, columns: Mapping[str, str] | None) -> Row:
    """Return a file's value as a row that is asked: what it says, and the answer that is expected.

    A conversation that ends with the assistant's turn is asked up to that; its ``output``, empty
    where there is none, is what the turn says.

    Args:
        path: The file, for messages.
        where: Its place there.
        value: What stands there.
        columns: Which column is which key; those of an answer may be missing, and a row that has
            none of them is taken as it stands.

    Raises:
        InputError: naming the file, the row and what is wrong with it.
    """
    at = f"{path}: {where}"
    value = _object(at, where, value)
    if columns is not None and not value.keys().isdisjoint(columns.values()):
        there = {key: c for key, c in columns.items() if key not in ANSWERS or c in value}
        value = _renamed(at, value, there)
    value = {key: told for key, told in value.items() if told is not None}
    asking = [shape for shape, keys in SHAPES.items() if keys[0] in value and shape != "text"]
    whole = [shape for shape in asking if all(key in value for key in SHAPES[shape])]
    shapes = whole if len(whole) == 1 else asking
    if len(shapes) > 1:
        raise InputError(f"{at}: can be asked as {' and as '.join(shapes)}; leave one of them")
    if not shapes:
        _shape(at, value)  # which refuses all but a text
        raise InputError(f"{at}: a text asks nothing; what asks is a prompt, say")
    if shapes[0] == "instruction and output":
        row = _instruction(at, value, asked=True)
    elif shapes[0] == "prompt and completion":
        return _asked_prompt(at, value)
    else:
        key = SHAPES[shapes[0]][0]
        row = _spoken(at, shapes[0], _turns(at, key, value[key]), value)
    return _split_off(row) if row.messages else row


def _asked_prompt(at: str, value: Mapping[str, Any]) -> Row:
    """Return a prompt without what completes it."""
    prompt, completion = value["prompt"], value.get("completion")
    if not isinstance(prompt, list):
        return _prompt(at, value, needed=False)
    row = _spoken(at, "prompt of messages", _turns(at, "prompt", prompt), value)
    said = _turns(at, "completion", completion) if completion else []
    return replace(row, output=said[-1].content if said else "")


def _split_off(row: Row) -> Row:
    """Return a conversation up to the assistant's last turn, and what that says as the output."""
    *before, last = row.messages
    if last.role != "assistant":
        return row
    if not before:
        raise InputError(f"{row.where}: its only message is the assistant's, so nothing is asked")
    return replace(row, messages=tuple(before), output=last.content)


TOLD = 6  # keys that are not read
SLIP = 0.8  # how much alike a key must be to one that is read, where other keys are usual


def unread_line(keys: Mapping[str, int]) -> str:
    """Return the keys that no shape reads, in words, and what they may be slips of.

    Args:
        keys: How many rows have each.
    """
    told = list(keys.items())[:TOLD]
    named = [f"{key} in {rows:,} rows{did_you_mean(key, KEYS, SLIP)}" for key, rows in told]
    return ", ".join(named) + (", ..." if len(keys) > TOLD else "")


def value_of(row: Row) -> dict[str, Any]:
    """Return what a file would say of a row that training reads."""
    if row.messages:
        turns = [
            {"role": turn.role, "content": turn.content, **json.loads(turn.more or "{}")}
            for turn in row.messages
        ]
        return {"messages": turns, **({"tools": json.loads(row.tools)} if row.tools else {})}
    if row.text:
        return {"text": row.text}
    said = {"instruction": row.instruction, "input": row.context, "output": row.output}
    return said | ({"answer": row.answer} if row.answer else {})


def _object(at: str, where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        listed = isinstance(value, list) and where == "line 1"
        hint = "; one list of all rows? then name the file .json" if listed else ""
        raise InputError(f"{at}: expected an object, found {kind(value)}{hint}")
    return value


def _renamed(at: str, value: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    for column in columns.values():
        if column not in value:
            have = ", ".join(map(repr, value)) or "none"
            raise InputError(
                f"{at}: no column {column!r}, which data.columns names; its columns are {have}"
                f"{did_you_mean(column, value)}"
            )
    return {key: value[column] for key, column in columns.items()}


def _shape(at: str, value: Mapping[str, Any]) -> str:
    there = [
        shape for shape, keys in SHAPES.items() if all(value.get(key) is not None for key in keys)
    ]
    if len(there) == 1:
        return there[0]
    if there:
        first, second = (", ".join(f"{key}: {key}" for key in SHAPES[shape]) for shape in there[:2])
        raise InputError(
            f"{at}: can be read as {there[0]} and as {there[1]}; say which by data.columns: "
            f"{{{first}}} or {{{second}}}"
        )
    for shape, keys in SHAPES.items():
        missing = [key for key in keys if key not in value]
        if not missing:
            return shape  # and what is null is told
        if len(missing) < len(keys):
            others = [name for name in value if name not in KEYS]
            raise InputError(
                f"{at}: key {missing[0]!r} is missing; found {', '.join(map(repr, value))}"
                f"{did_you_mean(missing[0], others)}; data.columns says which column is which"
            )
    wanted = "; ".join(" and ".join(keys) for keys in SHAPES.values())
    found = ", ".join(map(repr, value)) or "no keys"
    raise InputError(
        f"{at}: none of the shapes that are read ({wanted}); found {found}; data.columns "
        "says which column is which, as {prompt: question, completion: reply}"
    )


def _text(at: str, key: str, text: Any, needed: bool = True) -> str:
    if text is None and not needed:
        return ""
    if not isinstance(text, str):
        raise InputError(f"{at}: {key!r} is {kind(text)}, expected a text")
    if needed and not text.strip():
        raise InputError(f"{at}: {key!r} is empty, so there is nothing to learn")
    # JSON can write half of a surrogate pair, which is no character and which no tokenizer takes.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{at}: {key!r} has half a surrogate pair (\\u{ord(text[error.start]):04x}) at "
            f"character {error.start}"
        ) from None
    return text


def _instruction(at: str, value: Mapping[str, Any], asked: bool = False) -> Row:
    instruction = _text(at, "instruction", value["instruction"])
    output = _text(at, "output", value.get("output"), needed=not asked)
    context = _text(at, "input", value.get("input"), needed=False)
    system = _text(at, "system", value.get("system"), needed=False)
    history = value.get("history")
    if system.strip() or history:
        question = f"{instruction}\n\n{context}" if context else instruction
        turns = [*_history(at, history), Turn("user", question), Turn("assistant", output)]
        if system.strip():
            turns.insert(0, Turn("system", system))
        return Row(messages=tuple(turns), shape="Alpaca with system or history", where=at)
    answer = value.get("answer")  # training needs none, and what it is differs from set to set
    shape = "Alpaca" if answer is None else "LLM-Adapters"
    answer = answer if isinstance(answer, str) else ""
    return Row(instruction, context, output, answer, shape=shape, where=at)


def _history(at: str, history: Any) -> list[Turn]:
    if not history:
        return []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in history
    ):
        raise InputError(f"{at}: 'history': expected a list of [question, answer] pairs")
    turns = []
    for question, answer in history:
        turns += [
            Turn("user", _text(at, "history", question, needed=False)),
            Turn("assistant", _text(at, "history", answer, needed=False)),
        ]
    return turns


def _completion(at: str, value: Mapping[str, Any]) -> Row:
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        asked = [
            Turn(turn.role, turn.content, False, turn.more) for turn in _turns(at, "prompt", prompt)
        ]
        turns = [*asked, *_turns(at, "completion", completion)]
        return _conversation(at, "prompt and completion of messages", turns, value)
    return _prompt(at, value, needed=True)


def _prompt(at: str, value: Mapping[str, Any], needed: bool) -> Row:
    """Return a prompt that is a text, and its completion, which may be needed."""
    prompt = _text(at, "prompt", value["prompt"])
    completion = _text(at, "completion", value.get("completion"), needed)
    for key in ("system", "tools"):
        if value.get(key):
            raise InputError(
                f"{at}: {key!r} has no place beside a prompt that is a text; write it as messages"
            )
    return Row(prompt, "", completion, shape="prompt and completion", where=at)


def _conversation(at: str, shape: str, turns: list[Turn], value: Mapping[str, Any]) -> Row:
    row = _spoken(at, shape, turns, value)
    if not any(
        turn.role == "assistant" and turn.learned and (turn.content.strip() or turn.more)
        for turn in row.messages
    ):
        raise InputError(
            f"{at}: no assistant message with text that is to be learned, so there is nothing to "
            "learn"
        )
    return row


def _spoken(at: str, shape: str, turns: Sequence[Turn], value: Mapping[str, Any]) -> Row:
    """Return turns as a row, behind the system's prompt and with the tools beside them."""
    system = _text(at, "system", value.get("system"), needed=False)
    if system.strip():
        if turns and turns[0].role == "system":
            raise InputError(f"{at}: has a 'system' and a first message of the system: which one?")
        turns = [Turn("system", system), *turns]
    tools = _tools(at, value.get("tools"))
    return Row(messages=tuple(turns), tools=tools, shape=shape, where=at)


def _tools(at: str, tools: Any) -> str:
    """Return tools as JSON: a list of objects, or a text that is one."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            raise InputError(f"{at}: 'tools' is a text, and no JSON list of tools") from None
    if not tools:
        return ""
    functions = [tool.get("function", tool) for tool in tools if isinstance(tool, dict)]
    if not isinstance(tools, list) or not all(
        isinstance(function, dict) and isinstance(function.get("name"), str)
        for function in (*functions, *([None] * (len(tools) - len(functions))))
    ):
        raise InputError(f"{at}: 'tools': expected a list of tools, each with a name")
    return json.dumps(tools, ensure_ascii=False)


def _turns(at: str, key: str, value: Any) -> list[Turn]:
    if isinstance(value, str):  # as tables keep it
        try:
            value = json.loads(value)
        except ValueError:
            raise InputError(f"{at}: {key!r} is a text, and no JSON list of turns") from None
    if not isinstance(value, list) or not value:
        raise InputError(f"{at}: {key!r} is not a list of turns")
    return [_turn(f"{at}: message {number}", turn) for number, turn in enumerate(value, start=1)]


def _turn(at: str, turn: Any) -> Turn:
    if not isinstance(turn, dict):
        raise InputError(f"{at}: expected an object, found {kind(turn)}")
    who, what = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    speaker = turn.get(who)
    if not isinstance(speaker, str):
        raise InputError(f"{at}: {who!r} is missing or not a text{did_you_mean(who, turn)}")
    role = SPEAKERS.get(speaker.lower(), "")
    if not role:
        known = ROLES if who == "role" else tuple(SPEAKERS)
        raise InputError(f"{at}: {who} {not_one_of(speaker, known)}")
    more = {name: turn[name] for name in PASSED_ON if turn.get(name)}
    if role == "function_call":
        return Turn("assistant", "", True, json.dumps({"tool_calls": _called(at, turn.get(what))}))
    if turn.get(FUNCTION_CALL):
        more["tool_calls"] = _called(at, turn[FUNCTION_CALL])
    if more.get("tool_calls"):
        more["tool_calls"] = _calls(at, more["tool_calls"])
    content = turn.get(what)
    if content is None:
        if not more.get("tool_calls"):
            null = f"{what!r} is null, expected a text"
            missing = f"{what!r} is missing or not a text{did_you_mean(what, turn)}"
            raise InputError(f"{at}: {null if what in turn else missing}")
        content = ""
    content = _content(at, what, content)
    said = json.dumps(more, ensure_ascii=False) if more else ""
    return Turn(role, content, _learned(at, turn), said)


def _content(at: str, key: str, content: Any) -> str:
    """Return a turn's text; a list of parts is joined where all of them are text."""
    if isinstance(content, list):
        texts = []
        for part in content:
            text = part.get("text") if isinstance(part, dict) else part
            if not isinstance(text, str):
                what = part.get("type") if isinstance(part, dict) else kind(part)
                raise InputError(f"{at}: {key!r} has a part that is no text: {what!r}")
            texts.append(text)
        content = "".join(texts)
    if not isinstance(content, str):
        raise InputError(f"{at}: {key!r} is missing or not a text")
    return _text(at, key, content, needed=False)


def _learned(at: str, turn: Mapping[str, Any]) -> bool:
    """Return whether a turn is to be learned, as one of its keys may say."""
    for key in LEARNED:
        if turn.get(key) is None:
            continue
        if turn[key] not in (0, 1):
            raise InputError(
                f"{at}: {key!r} is {turn[key]!r}; a turn is learned (1, true) or not (0, false)"
            )
        if not turn[key]:
            return False
    return True


def _called(at: str, call: Any) -> list[dict[str, Any]]:
    """Return the one call of an older format, a JSON text or an object, as a list of calls."""
    if isinstance(call, str):
        try:
            call = json.loads(call)
        except ValueError:
            raise InputError(f"{at}: a call of a function that is no JSON") from None
    return _calls(at, call if isinstance(call, list) else [call])


def _calls(at: str, calls: Any) -> list[dict[str, Any]]:
    """Return calls of tools as templates take them: a name, and arguments as an object."""
    if isinstance(calls, str):
        try:
            calls = json.loads(calls)
        except ValueError:
            raise InputError(f"{at}: 'tool_calls' is a text, and no JSON list") from None
    made = []
    for call in calls if isinstance(calls, list) else [None]:
        if not isinstance(call, dict):
            call = {}
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InputError(f"{at}: 'tool_calls': expected a list of calls, each with a name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError:
                raise InputError(
                    f"{at}: the arguments of the call {function['name']!r} are no JSON"
                ) from None
        known = {"id": call["id"]} if "id" in call else {}
        named = {"name": function["name"], "arguments": arguments}
        made.append({**known, "type": "function", "function": named})
    return made
