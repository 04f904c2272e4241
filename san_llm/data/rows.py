"""One row of training or test data, whatever file and shape it came from."""

from __future__ import annotations

from dataclasses import dataclass, field

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Turn:
    """What one side of a conversation says at once.

    Attributes:
        role: One of ``ROLES``.
        content: Its text.
        learned: Whether it is, if the assistant says it.
        more: What else a chat template is told of it, as JSON: its calls of tools, its thinking.
    """

    role: str
    content: str
    learned: bool = True
    more: str = ""


@dataclass(frozen=True)
class Row:
    """One example: an instruction, a conversation or a plain text.

    Attributes:
        instruction: What is asked.
        context: The row's ``input``; empty for none.
        output: The response to learn.
        answer: The label that an evaluation compares with; empty where there is none.
        messages: The turns of a conversation, which has no instruction.
        tools: What may be called in it, as JSON; empty for nothing.
        text: What is learned whole, without a frame; all else is then empty.
        choices: The answers that an evaluation lets a model choose from, where the row has its own.
        shape: How it was read, in words.
        unread: Keys of the file's row that say something no shape reads: an id, a score, a slip.
        where: File and row, for messages; two rows of the same content are equal.
    """

    instruction: str = ""
    context: str = ""
    output: str = ""
    answer: str = ""
    messages: tuple[Turn, ...] = ()
    tools: str = ""
    text: str = ""
    choices: tuple[str, ...] = field(default=(), compare=False)
    shape: str = field(default="", compare=False)
    unread: tuple[str, ...] = field(default=(), compare=False)
    where: str = field(default="a row", compare=False)
