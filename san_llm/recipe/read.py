"""From YAML to a recipe and back; ``recipe.mistakes`` tells what is refused, with its line."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from san_llm.errors import InputError
from san_llm.recipe.carried_on import adapter_folder, method_of
from san_llm.recipe.mistakes import PathInProject, Source, dotted, explained
from san_llm.recipe.schema import Recipe, Section, as_tuples, leaves
from san_llm.shown import masked

LONGEST = 256 * 2**10  # bytes of a recipe: what YAML's parser reads in a second
INSTEAD = {"warmup_steps": "warmup_share", "warmup_share": "warmup_steps"}  # two ways to say one
_Model = TypeVar("_Model", bound=Section)
# Asked after YAML's own resolver of whole numbers, which it would match, too.
_NUMBER = (
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, reading ``1e-4`` as the number that it is in YAML 1.2 and in Python.

    Anchors, aliases, merge keys and tags are refused: a recipe says everything where it stands, and
    a short file cannot unfold into a long one.
    """

    kind = "a recipe"

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            raise yaml.MarkedYAMLError(
                problem=f"{sign}{event.anchor}: {self.kind} has no anchors and aliases",
                problem_mark=event.start_mark,
            )
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(
                problem=f"{event.tag}: {self.kind} has no tags", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)


# A date is text to a recipe, and "<<" a key like any other.
_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0].rsplit(":", 1)[1] not in ("timestamp", "merge")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(*_NUMBER)


class _Dumper(yaml.SafeDumper):
    """Writes what any YAML loader reads alike: what one would take for a number gets quotes."""


_Dumper.add_implicit_resolver(*_NUMBER)


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    # Outside double quotes a control character such as U+0085 would come back as a line break.
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def to_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML: every key with the value that is used."""
    return yaml.dump(
        recipe.model_dump(mode="json"),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=100,
    )


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return a recipe, read, overridden and checked.

    Args:
        path: The YAML file.
        overrides: ``key=value`` arguments such as ``training.learning_rate=1e-3``; the value is
            read as YAML.

    Raises:
        InputError: with one line for each mistake: where, what was found, what would be right.
    """
    return parse_recipe(text_of(path), str(path), overrides)


def given_keys(path: Path, overrides: Sequence[str] = ()) -> set[str]:
    """Return the dotted keys that a recipe's file or arguments give; all others are defaults."""
    return set(leaves(_raw(text_of(path), Source(str(path)), overrides)))


def text_of(path: Path, kind: str = "a recipe") -> str:
    """Return the text of a recipe, or of another small file of that kind.

    Raises:
        InputError: when it cannot be read as one.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"{path}: a pipe or a device; expected {kind}, a YAML file")
    try:
        with path.open("rb") as file:
            raw = file.read(LONGEST + 1)
        if len(raw) > LONGEST:
            raise InputError(f"{path}: more than {LONGEST // 2**10} KiB; {kind} is a small file")
        return raw.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: byte {error.start} is not valid") from None


def parse_recipe(text: str, file: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return a recipe from its text; ``file`` names it in messages. See :func:`load_recipe`."""
    source = Source(file)
    raw = _raw(text, source, overrides)
    base = raw.get("base")
    if isinstance(base, dict) and isinstance(base.get("adapter"), str) and "method" not in raw:
        try:
            folder = adapter_folder(os.path.expanduser(base["adapter"]))
            assert folder is not None
            raw["method"] = method_of(folder)
        except InputError as error:
            raise InputError(f"{source.of(('base', 'adapter'))}: {error}") from None
    return checked(Recipe, raw, source)


def checked(
    model: type[_Model], raw: dict[str, Any], source: Source, also: Sequence[str] = ()
) -> _Model:
    """Return what a file says, as its type; ``name`` is the file's stem unless it says otherwise.

    Args:
        model: The type.
        raw: The file's values.
        source: Where they stand.
        also: Mistakes that were found besides, a line each.

    Raises:
        InputError: with one line for each mistake.
    """
    _check_texts(raw, (), source)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source.file).stem).lstrip("._-").rstrip("-")
    raw.setdefault("name", stem or "recipe")
    lines = list(also)
    try:
        # JSON has lists where the schema has tuples; YAML likewise, so validate as JSON does.
        found = model.model_validate(as_tuples(raw))
    except ValidationError as errors:
        lines += [
            explained(error, raw, source)
            for error in errors.errors()
            # A list whose items are wrong also counts as too short: said by the items already.
            if not (error["type"] == "too_short" and error["input"])
        ]
    if lines:
        # A value that may be of two kinds gives one error for each.
        raise InputError("\n".join(dict.fromkeys(lines)))
    return found


def _raw(text: str, source: Source, overrides: Sequence[str]) -> dict[str, Any]:
    raw = parse_yaml(text, source)
    if not isinstance(raw, dict):
        raise InputError(
            f"{source.file}: expected a mapping with the sections "
            f"{', '.join(name for name in Recipe.model_fields if name != 'name')}"
            f"{'; rows belong in data.train of a recipe' if isinstance(raw, list) else ''}"
        )
    # The method's name first: it decides which other keys there are.
    for argument in sorted(overrides, key=lambda text: not text.startswith("method.name=")):
        _override(raw, argument, source)
    return raw


def _check_texts(value: Any, path: PathInProject, source: Source) -> None:
    """Refuse texts that must not be shown or kept: a recipe is printed, and goes into its run."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_texts(key, (*path, key), source)
            _check_texts(item, (*path, key), source)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_texts(item, (*path, index), source)
    elif isinstance(value, str):
        where = f"{source.of(path)}: {dotted(path)}"
        if any(unicodedata.category(c) == "Cc" and c not in source.kept for c in value):
            raise InputError(f"{where}: has a control character in {value!r}")
        if masked(value) != value:
            raise InputError(
                f"{where}: a password or a token has no place in a recipe; set HF_TOKEN, or sign "
                "in with `hf auth login`"
            )


def parse_yaml(text: str, source: Source) -> Any:
    """Return what a YAML text holds, and note the line of each key in its source.

    Raises:
        InputError: when it is empty or not YAML, or gives a key twice.
    """
    loader = None
    try:
        loader = _Loader(text)
        loader.kind = source.kind
        node = loader.get_single_node()
        if node is None:
            raise InputError(f"{source.file}: the file is empty")
        _record_lines(node, (), source)
        return loader.construct_document(node)
    except InputError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{source.file}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{source.file}: not valid YAML: {_first_line(error)}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _first_line(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if "Exceeds the limit" in str(error):  # Python's word on 4,300 digits
        return "a number of too many digits"
    return str(error).splitlines()[0]


def _record_lines(node: yaml.Node, path: PathInProject, source: Source) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag != "tag:yaml.org,2002:str":
                shown = key.value if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
                raise InputError(
                    f"{source.file}:{line}: {dotted((*path, shown or 'null'))}: a key must be "
                    "text; write it in quotes"
                )
            name = str(key.value)
            if (*path, name) in source.lines:
                first = source.lines[(*path, name)]
                raise InputError(
                    f"{source.file}:{line}: {dotted((*path, name))}: given twice, first in "
                    f"line {first}"
                )
            source.lines[(*path, name)] = line
            _record_lines(value, (*path, name), source)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            source.lines[(*path, index)] = item.start_mark.line + 1
            _record_lines(item, (*path, index), source)


def _override(raw: dict[str, Any], argument: str, source: Source) -> None:
    key, equals, text = argument.partition("=")
    names = tuple(key.split("."))
    if not equals or not all(names):
        raise InputError(
            f"argument {argument!r}: expected key=value, such as training.learning_rate=1e-3"
        )
    try:
        value = yaml.load(text, Loader=_Loader)
        node = yaml.compose(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = getattr(error, "problem", None) or _first_line(error)
        raise InputError(f"argument {argument!r}: the value is not valid YAML: {problem}") from None
    if node is not None:
        _record_lines(node, names, Source(f"argument {argument!r}"))  # refuses a key given twice
    section = raw
    for depth, name in enumerate(names[:-1], start=1):
        if name not in section:
            section[name] = {}
            source.arguments[names[:depth]] = argument
        below = section[name]
        if not isinstance(below, dict):
            raise InputError(f"argument {argument!r}: {name!r} is a value, not a section")
        section = below
    if names[0] == "method" and names[-1] == "name" and section.get("name") != value:
        # Another method has other options: those written for the old one would all be unknown.
        section.clear()
    other = (*names[:-1], INSTEAD.get(names[-1], ""))
    if other not in source.arguments:
        section.pop(other[-1], None)  # what the file says in the other way
    section[names[-1]] = value
    source.arguments[names] = argument
    for path in [path for path in source.lines if path[: len(names)] == names]:
        del source.lines[path]  # what stood in the file is no longer what is read
