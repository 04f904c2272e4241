"""The date that a chat template writes: one that is said, in place of each day's own.

Llama 3.2's template and others ask transformers for today's date (``strftime_now``). What a model
learns and is asked would be another text every day. Here a template gets a macro of that name in
front, so that all who render it, or key something by it, have the date in it.
"""

from __future__ import annotations

import json
import string
from datetime import datetime

A_DATE = "2024-07-26"  # in messages; what Llama 3.2's chat template writes where it knows none
ASKS = "strftime_now"
_MACRO, _END = f"{{%- macro {ASKS}(format) -%}}", "{%- endmacro %}\n"


def with_date(template: str, date: str | None) -> str:
    """Return a chat template that writes a date, at midnight; one that asks for none as it is.

    Args:
        template: The template; one that was saved with a date has that until another is said.
        date: As ``check_date`` gives it; None: the template refuses to be rendered.
    """
    if ASKS not in template:
        return template
    own, bare = split_date(template)
    if own and date is None:
        return template
    if date is None:
        says = (
            f"it writes today's date, which makes another text each day; say which one: "
            f"data.date={A_DATE} in a recipe, --date {A_DATE} in eval"
        )
        body = f"{{{{- raise_exception({json.dumps(says)}) -}}}}"
    else:
        moment = datetime.fromisoformat(date)
        codes = [f"%{flag}{letter}" for flag in ("", "-") for letter in string.ascii_letters]
        meant = [[code, moment.strftime(code)] for code in codes if code in template]
        body = (
            "{%- set written = namespace(text=format) -%}"
            f"{{%- for code, text in {json.dumps(meant)} -%}}"
            "{%- set written.text = written.text | replace(code, text) -%}"
            "{%- endfor -%}{{- written.text -}}"
        )
    # The line break behind a block is not written: what follows begins a text and a line, as ever.
    return f"{_MACRO}{body}{_END}{bare}"


def split_date(template: str) -> tuple[str, str]:
    """Return what :func:`with_date` has put in front of a template, and the template behind it."""
    if not template.startswith(_MACRO):
        return "", template
    before, end, behind = template.partition(_END)
    return before + end, behind
