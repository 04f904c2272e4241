"""What is wrong with a recipe, and where: line and key, what was found, what would be right."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from san_llm.errors import did_you_mean, not_one_of
from san_llm.recipe.aliases import called_here
from san_llm.recipe.schema import Method, Recipe, SanMethod, Section, section_keys

PathInProject = tuple[str | int, ...]


@dataclass
class Source:
    """Where each key of a file was written: a line of it or an argument.

    Attributes:
        file: The file's name.
        lines: The line of each key.
        arguments: The argument that set a key instead.
        model: What the file says, as a type.
        kind: What the file is called in messages.
        kept: Control characters that a text may have.
    """

    file: str
    lines: dict[PathInProject, int] = field(default_factory=dict)
    arguments: dict[PathInProject, str] = field(default_factory=dict)
    model: type[Section] = Recipe
    kind: str = "a recipe"
    kept: str = ""

    def of(self, path: PathInProject) -> str:
        """Return ``file:line`` or the argument that set ``path`` or the nearest key above it."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.arguments:
                return f"argument {self.arguments[path[:end]]!r}"
            if path[:end] in self.lines:
                return f"{self.file}:{self.lines[path[:end]]}"
        return self.file


def dotted(path: Iterable[str | int]) -> str:
    """Return a key's place as a recipe's user writes it: ``data.train[0]``."""
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else key
    return text


def _strip(location: tuple[int | str, ...], raw: Any, missing: bool) -> PathInProject:
    """Return a location without what pydantic adds: the tag of a union's member is in no file."""
    path: list[str | int] = []
    value = raw
    for index, key in enumerate(location):
        inside = isinstance(value, Mapping) and key in value
        listed = isinstance(value, (list, tuple)) and isinstance(key, int)
        absent = missing and index == len(location) - 1
        if not (inside or listed or absent):
            continue
        path.append(key)
        value = value[key] if inside or (listed and int(key) < len(value)) else None
    return tuple(path)


def _fields(model: Any, path: PathInProject, raw: Mapping[str, Any]) -> list[str]:
    """Return the keys that a schema knows beside ``path``'s last one."""
    for key in path[:-1]:
        if key == "method":
            name = raw["method"].get("name") if isinstance(raw.get("method"), Mapping) else None
            members = get_args(get_args(Method)[0])
            named = [m for m in members if m.model_fields["name"].annotation == Literal[name]]
            model = named[0] if named else SanMethod
        elif isinstance(key, str):
            model = _section(model.model_fields[key].annotation)
    return list(model.model_fields)


def _section(annotation: Any) -> Any:
    """Return the section that a key holds, alone or as one of several kinds or of a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section, get_args(annotation))), None)


_EXPECTED = {
    "string_type": "text",
    "string_too_short": "text",
    "string_unicode": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "too_short": "at least one",
    "dict_type": "a section with keys",
    "model_type": "a section with keys",
    "model_attributes_type": "a section with keys",
    "string_pattern_mismatch": "letters, digits, '.', '_', '-', the first a letter or digit",
}
# Where a value may be of two kinds.
_EITHER: dict[PathInProject, str] = {
    ("data", "train"): "'pocket', a file, {hub: ID} or a list of these",
    ("data", "held_out"): "a number of rows, a share, a file or a list of files",
    ("choices",): "a list of two texts or more, or the name of a column with one",
}


def explained(error: Any, raw: dict[str, Any], source: Source) -> str:
    """Return one of pydantic's errors as one line: where, which key, what would be right."""
    kind, context = error["type"], error.get("ctx", {})
    path = _strip(error["loc"], raw, missing=kind == "missing")
    if kind.startswith("union_tag"):
        path = ("method", "name")
    where, key, value = source.of(path), dotted(path), _listed(error["input"])
    if kind == "extra_forbidden":
        return f"{where}: {key}: unknown key{_way_out(path, raw, source)}"
    if kind in ("missing", "union_tag_not_found"):
        return f"{where}: {key}: missing"
    if kind == "union_tag_invalid":
        names = [tag.strip(" '") for tag in context["expected_tags"].split(",")]
        value = _listed(raw["method"]["name"])
        return f"{where}: {key}: {not_one_of(value, names)}"
    if kind == "literal_error":
        names = re.findall(r"'([^']*)'", context["expected"])
        also = "; names are written as a list" if path == ("method", "target_modules") else ""
        return f"{where}: {key}: {not_one_of(value, names)}{also}"
    if kind == "value_error":
        message = str(context["error"])
        return f"{where}: {key}: {message}" if key else f"{where}: {message}"
    shown = "nothing" if value is None else repr(value)
    named = tuple(key for key in path if isinstance(key, str))
    expected = _EITHER.get(named) or _EXPECTED.get(kind)
    if expected:
        quoted = kind == "string_type" and type(value) in (int, float)
        hint = "; write it in quotes" if quoted and named not in _EITHER else ""
        return f"{where}: {key}: expected {expected}, found {shown}{hint}"
    return f"{where}: {key}: {error['msg'][0].lower()}{error['msg'][1:]}, found {shown}"


def _way_out(path: PathInProject, raw: Mapping[str, Any], source: Source) -> str:
    """Return where an unknown key belongs, what it is called here, or the nearest one."""
    name, known = str(path[-1]), _fields(source.model, path, raw)
    if source.model is Recipe:
        for section, keys in section_keys().items():
            if name in keys and name != "name" and section != path[0]:
                return f" (it belongs to {section!r})"
        if place := called_here(name):
            return f" ({place})"
    # Long names of other programs are half alike to many: early_stopping_threshold, learning_rate.
    return did_you_mean(name, known, alike=0.65) or f": known here are {', '.join(known)}"


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
