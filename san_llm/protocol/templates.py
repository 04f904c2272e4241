"""Chat templates of our own making, and what is put in front of one: a system prompt of its own.

What stands around the messages is written as strings of the template's language: a line's spaces
before a block would be taken away otherwise.
"""

from __future__ import annotations

import json
from typing import get_args

from san_llm.protocol.prompts import PromptStyle, evaluation_prompt, training_prompt
from san_llm.protocol.template_date import split_date

_PLACE = "@@CONTENT@@"
_CONTENT = "{{ message.content }}"
_BEGIN = "{{ bos_token }}"  # where a tokenizer begins every text so
_SYSTEM = "{%- if not messages or messages[0].role != 'system' -%}{%- set messages = [{'role': "
_SYSTEM += "'system', 'content': "
_BEFORE = "}] + messages -%}{%- endif -%}"


def _said(text: str) -> str:
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


_EMPTY_LINE = _said("\n\n")


def _around(text: str) -> str:
    before, _, behind = text.partition(_PLACE)
    return f"{_said(before)}{_CONTENT}{_said(behind)}"


def _framed(style: PromptStyle) -> str:
    """Return a style's text around each question as a template, a system prompt before it."""
    learned, asked = training_prompt(style, _PLACE), evaluation_prompt(style, _PLACE)
    if style == "llm-adapters-aligned":  # the last space is the first of the response's token
        asked = asked.removesuffix(" ")
    frame = _around(learned)
    if asked != learned:
        frame = f"{{% if add_generation_prompt %}}{_around(asked)}{{% else %}}{frame}{{% endif %}}"
    return (
        "{% for message in messages %}"
        "{% if message.role == 'assistant' %}{{ message.content }}{{ eos_token }}"
        f"{{% elif message.role == 'system' %}}{_CONTENT}{_EMPTY_LINE}"
        f"{{% else %}}{frame}{{% endif %}}{{% endfor %}}"
    )


def _chat(before: str, between: str, behind: str, content: str) -> str:
    """Return a template in which tokens stand around each message and its role."""
    asked = _said(f"{before}assistant{between}")
    return (
        f"{{% for message in messages %}}{_said(before)}{{{{ message.role }}}}{_said(between)}"
        f"{{{{ {content} }}}}{_said(behind)}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{asked}{{% endif %}}"
    )


_TEMPLATES = {
    "chatml": _chat("<|im_start|>", "\n", "<|im_end|>\n", "message.content"),
    "llama-3": _chat(
        "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", "message.content | trim"
    ),
    **{style: _framed(style) for style in get_args(PromptStyle) if style != "chat"},
}
NAMES = tuple(_TEMPLATES)


def template(name: str, begins: bool) -> str:
    """Return the chat template of that name.

    Args:
        name: One of ``NAMES``.
        begins: Whether the tokenizer puts its first token before every text.
    """
    return (_BEGIN if begins else "") + _TEMPLATES[name]


def with_system(template: str, prompt: str) -> str:
    """Return a chat template that begins with a system prompt where a conversation has none."""
    date, rest = split_date(template)
    return f"{date}{_SYSTEM}{json.dumps(prompt, ensure_ascii=False)}{_BEFORE}{rest}"


def system_of(template: str) -> str | None:
    """Return the system prompt that :func:`with_system` has put into a template, or None."""
    rest = split_date(template)[1]
    if not rest.startswith(_SYSTEM):
        return None
    prompt: str = json.JSONDecoder().raw_decode(rest, len(_SYSTEM))[0]
    return prompt
