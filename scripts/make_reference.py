"""Write the reference pages ``docs/commands.md`` and ``docs/recipe.md``.

One is made of the command line's own help, the other of the recipe's schema, so neither can say
anything else than the program does; ``tests/test_docs.py`` holds the pages to this.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from san_llm.cli import app
from san_llm.recipe.shipped import recipe_schema

DOCS = Path(__file__).resolve().parents[1] / "docs"
MADE = "<!-- Made by scripts/make_reference.py: change the help texts instead. -->"
# What an option without a metavar of its own takes.
TAKES = {int: "N", float: "X", Path: "PATH"}


def commands_page() -> str:
    """Return every command with its arguments, options and examples, as Markdown."""
    blocks = [
        MADE,
        "# Commands",
        "Every command also takes `--help`. Results go to stdout, progress to stderr; exit codes "
        "are in [long runs](running.md#stops-and-exit-codes).",
    ]
    for words, command in _walk(("san-llm",), typer.main.get_command(app)):
        if words[1:]:
            blocks += [f"{'#' * len(words)} {' '.join(words[1:])}", _cell(command.help)]
        blocks += _parameters(words, command)
        examples = [
            line.strip() for line in (command.epilog or "").splitlines() if "san-llm " in line
        ]
        if examples:
            # These are examples of help pages, for many a setting: text, not a session.
            blocks.append("\n".join(["```text", *examples, "```"]))
    return "\n\n".join(blocks) + "\n"


def _walk(words: tuple[str, ...], command: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield words, command
    for name, below in getattr(command, "commands", {}).items():
        if not below.hidden:
            yield from _walk((*words, name), below)


def _parameters(words: tuple[str, ...], command: Any) -> list[str]:
    shown = [p for p in command.params if not getattr(p, "hidden", False)]
    usage = " ".join([*words, *(_argument(p) for p in shown if p.param_type_name == "argument")])
    lines = [] if hasattr(command, "commands") else [f"    {usage}"]
    if shown:
        rows = [f"| `{_spelling(p)}` | {_cell(p.help)}{_default(p)} |" for p in shown]
        lines.append("\n".join(["| | |", "| --- | --- |", *rows]))
    return lines


def _argument(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    return name if parameter.required or name.startswith("[") else f"[{name}]"


def _spelling(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return _argument(parameter).replace("|", "\\|")
    text = ", ".join(parameter.opts + parameter.secondary_opts)
    if not parameter.is_flag:
        takes = parameter.metavar or TAKES.get(parameter.type_descriptor.annotation, "TEXT")
        text += f" {takes}"
    return text.replace("|", "\\|")


def _default(parameter: Any) -> str:
    value = parameter.default
    plain = not getattr(parameter, "is_flag", False) and isinstance(value, str | int | float | Path)
    return f" Default: `{value}`." if plain else ""


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|").replace("<", "&lt;")


def recipe_page() -> str:
    """Return every key of a recipe with its kind, default and meaning, as Markdown."""
    schema = recipe_schema()
    kinds = schema["$defs"]
    blocks = [
        MADE,
        "# Recipe fields",
        "A recipe is a YAML file with the sections below; `name` is the file's stem unless the "
        "file says otherwise. `key=value` on the command line overrides any key, as in "
        "`training.learning_rate=1e-3`. A key without a default has to be there. "
        "[Recipes](recipes.md) shows how they are used.",
    ]
    for section in ("base", "data", "training", "evaluation"):
        blocks += _section(f"## {section}", section, kinds[section.capitalize()])
        if section == "data":
            for part, kind in (("data.train", "Source"), ("data.columns", "Columns")):
                blocks += _section(f"### {part}: {kind.lower()}", part, kinds[kind])
    blocks += [
        "## method",
        "`method.name` chooses one of six; each has keys of its own.",
    ]
    for name in ("san", "lora", "dora", "ia3", "peft", "full"):
        blocks += _section(f"### {name}", "method", kinds[f"{name.capitalize()}Method"])
    return "\n\n".join(blocks) + "\n"


def _section(title: str, section: str, about: dict[str, Any]) -> list[str]:
    rows = [
        f"| `{section}.{key}` | {_kind(field)} | {_standard(field)} "
        f"| {_cell(field.get('description'))} |"
        for key, field in about["properties"].items()
    ]
    table = ["| key | value | default | |", "| --- | --- | --- | --- |", *rows]
    return [title, _cell(about["description"]), "\n".join(table)]


def _kind(field: dict[str, Any]) -> str:
    if options := field.get("anyOf") or field.get("oneOf"):
        kinds = [_kind(option) for option in options if option.get("type") != "null"]
        return " or ".join(kinds)
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "$ref" in field:
        return "section"
    if field["type"] == "array":
        return f"list of {_kind(field['items'])}"
    if field["type"] == "object":
        return "section"
    words = {
        "string": "text",
        "integer": "whole number",
        "number": "number",
        "boolean": "true or false",
    }
    return words[field["type"]] + _range(field)


def _range(field: dict[str, Any]) -> str:
    """Return what bounds a number, but for the bounds that only slips exceed."""
    bounds = [
        (sign, field[key])
        for sign, key in (
            ("≥", "minimum"),
            (">", "exclusiveMinimum"),
            ("<", "exclusiveMaximum"),
        )
        if key in field
    ]
    return ",".join(f" {sign} {value}" for sign, value in bounds)


def _standard(field: dict[str, Any]) -> str:
    if "default" not in field:
        return ""
    value = field["default"]
    return "none" if value is None else f"`{json.dumps(value).replace(chr(34), '')}`"


def main() -> None:
    """Write both pages."""
    for name, text in (("commands", commands_page()), ("recipe", recipe_page())):
        (DOCS / f"{name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
