"""Prompt styles, as pure text: what a row looks like in training and in evaluation.

``llm-adapters`` reproduces the published scripts (Hu et al. 2023), which train with one text and
evaluate with a slightly different one. ``llm-adapters-aligned`` trains alike and evaluates with the
training text. ``alpaca`` is the un-indented Alpaca text (Taori et al. 2023). ``chat`` is the
model's own chat template, which only its tokenizer knows; see ``data.encode``.
"""

from __future__ import annotations

from typing import Literal, get_args

from san_llm.errors import InputError, not_one_of

PromptStyle = Literal["llm-adapters", "llm-adapters-aligned", "alpaca", "chat"]
Frame = Literal[PromptStyle, "none"]  # what may stand around a question: a style, or nothing

STYLES: tuple[PromptStyle, ...] = get_args(PromptStyle)

_PLAIN = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
_PAIRED = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request."
)
# The published scripts are indented by 16 spaces inside their string, and so are their prompts.
_INDENT = " " * 16


def prompt_style(name: str) -> PromptStyle:
    """Return the style of that name.

    Raises:
        InputError: listing the styles and the nearest spelling.
    """
    for style in STYLES:
        if style == name:
            return style
    raise InputError(f"prompt style {not_one_of(name, STYLES)}")


def _blocks(instruction: str, context: str) -> list[tuple[str, str]]:
    blocks = [("Instruction", instruction)]
    if context:
        blocks.append(("Input", context))
    return blocks


def training_prompt(style: Frame, instruction: str, context: str = "") -> str:
    """Return the text before the response in training.

    Args:
        style: Any but ``chat``. ``none`` is the question alone, and a space where it does not end
            in white space, as lm-evaluation-harness delimits a target.
        instruction: What is asked.
        context: The row's ``input``; empty for none.
    """
    if style == "none":
        text = evaluation_prompt(style, instruction, context)
        return text if not text or text[-1].isspace() else f"{text} "
    lead = _PAIRED if context else _PLAIN
    if style == "alpaca":
        body = "".join(f"### {name}:\n{text}\n\n" for name, text in _blocks(instruction, context))
        return f"{lead}\n\n{body}### Response:\n"
    _refuse_chat(style)
    # Two spaces end the first line, one where there is an input; empty lines are 16 spaces.
    body = "".join(
        f"{_INDENT}### {name}:\n{_INDENT}{text}\n{_INDENT}\n"
        for name, text in _blocks(instruction, context)
    )
    spaces = " " if context else "  "
    return f"{lead}{spaces}\n\n{body}{_INDENT}### Response:\n{_INDENT}"


def evaluation_prompt(style: Frame, instruction: str, context: str = "") -> str:
    """Return the text after which the model goes on in evaluation; see :func:`training_prompt`."""
    if style == "none":
        return f"{instruction}\n\n{context}" if context else instruction
    if style != "llm-adapters":
        return training_prompt(style, instruction, context)
    lead = _PAIRED if context else _PLAIN
    # One space ends the first line, none where there is an input; empty lines are empty.
    body = "".join(
        f"{_INDENT}### {name}:\n{_INDENT}{text}\n\n" for name, text in _blocks(instruction, context)
    )
    spaces = "" if context else " "
    return f"{lead}{spaces}\n\n{body}{_INDENT}### Response:\n{_INDENT}"


def _refuse_chat(style: Frame) -> None:
    if style == "chat":
        raise ValueError("the chat style is the tokenizer's template, not a text of ours")
