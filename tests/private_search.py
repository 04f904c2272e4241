"""The search for names with an underscore that a source takes from libraries."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import textwrap
from typing import Any

PACKAGE = "san_llm"


def resolve(path: str) -> Any:
    """Return what a dotted path leads to: through modules first, then through attributes."""
    names = path.split(".")
    target = importlib.import_module(names[0])
    for end, name in enumerate(names[1:], start=2):
        try:
            target = getattr(target, name)
        except AttributeError:
            try:
                target = importlib.import_module(".".join(names[:end]))
            except ModuleNotFoundError:
                before = ".".join(names[: end - 1])
                raise AssertionError(f"{before} has no {name} any more") from None
    return target


def is_private(name: str) -> bool:
    return bool(re.fullmatch(r"_+[A-Za-z]\w*", name)) and not name.endswith("__")


def private_parts(dotted: str) -> set[str]:
    return {name for name in dotted.split(".") if is_private(name)}


def is_ours(path: str | None) -> bool:
    return path is not None and path.split(".")[0] == PACKAGE


def made_in(node: ast.ClassDef) -> set[str]:
    """Return the names that a class defines, or assigns to in itself."""
    names = set()
    for inner in node.body:
        match inner:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                names.add(name)
            case ast.Assign(targets=targets):
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
    for inner in ast.walk(node):
        match inner:
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                names.add(name)
    return names


def written(kind: type) -> ast.ClassDef | None:
    """Return a class's source; None where it is not written in Python."""
    try:
        node = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    return node if isinstance(node, ast.ClassDef) else None


@functools.cache
def names_of(kind: type) -> frozenset[str]:
    """Return the names that a library's class has, or touches in itself; not those of its bases."""
    names, node = set(vars(kind)) | set(inspect.get_annotations(kind)), written(kind)
    for inner in ast.walk(node) if node else ():
        match inner:
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name):
                names.add(name)
    return frozenset(names)


class Search:
    """The private names in a source that are not its own, with the lines where they stand.

    Its own is what it defines, or another source of the package does. But in a class that is made
    from a library's, a name that the library's has, too, is the library's: one takes the place of
    the other. And a method there that nothing in the source calls is called by the library.

    Names that are put together at run time are not seen, nor is one that is read from a thing
    whose class is not known where a class in the same source has that name as well.

    Attributes:
        names: The lines of each private name.
        classes: The source's classes by name.
    """

    def __init__(self, source: str) -> None:
        self.names: dict[str, set[int]] = {}
        self.classes: dict[str, ast.ClassDef] = {}
        self._imports: dict[str, str] = {}
        self._no_names: set[int] = set()  # texts that only begin or end one
        self._judged: set[int] = set()  # attributes, in their class
        nodes = list(ast.walk(ast.parse(source)))
        for node in nodes:
            self._prepare(node)
        self._made = {name for node in self.classes.values() for name in made_in(node)}
        self._bare = {node.id for node in nodes if isinstance(node, ast.Name)}
        self._parameters = {node.arg for node in nodes if isinstance(node, ast.arg)}
        self._called = {
            node.attr
            for node in nodes
            if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Load)
            and ast.unparse(node.value) != "super()"
        }
        for node in self.classes.values():
            self._judge_class(node)
        for node in nodes:
            self._judge(node)

    def _add(self, names: set[str], line: int) -> None:
        for name in filter(is_private, names):
            self.names.setdefault(name, set()).add(line)

    def _prepare(self, node: ast.AST) -> None:
        match node:
            case ast.ClassDef(name=name):
                self.classes[name] = node
            case ast.Import(names=names):
                for alias in names:
                    short = alias.asname or alias.name.split(".")[0]
                    self._imports[short] = alias.name if alias.asname else short
            case ast.ImportFrom(module=module, level=level, names=names):
                home = PACKAGE if level else module
                for alias in names:
                    self._imports[alias.asname or alias.name] = f"{home}.{alias.name}"
            case ast.JoinedStr(values=values):
                self._no_names |= {id(value) for value in values}
            case ast.Call(func=ast.Attribute(attr=name), args=values) if hasattr(str, name):
                self._no_names |= {id(value) for value in values}

    def _home(self, node: ast.AST) -> str | None:
        """Return the full name of an imported thing, or None."""
        match node:
            case ast.Name(id=name):
                return self._imports.get(name)
            case ast.Attribute(value=value, attr=name):
                above = self._home(value)
                return above and f"{above}.{name}"
            case ast.Subscript(value=value) | ast.Call(func=value):
                return self._home(value)
        return None

    def bases(self, node: ast.ClassDef) -> tuple[list[ast.ClassDef], list[type]]:
        """Return the classes of ours that a class is made from, itself first; and a library's."""
        ours: list[ast.ClassDef] = [node]
        theirs: list[type] = []
        for base in node.bases:
            bare = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(bare, ast.Name) and bare.id in self.classes:
                more, others = self.bases(self.classes[bare.id])
                ours, theirs = ours + more, theirs + others
                continue
            known = resolve(self._home(bare) or f"builtins.{ast.unparse(bare)}")
            for kind in getattr(known, "__mro__", (object,))[:-1]:
                if not is_ours(kind.__module__):
                    theirs.append(kind)
                elif (source := written(kind)) is not None:
                    ours.append(source)
        return ours, theirs

    def _judge_class(self, node: ast.ClassDef) -> None:
        attributes = [x for x in ast.walk(node) if isinstance(x, ast.Attribute)]
        if not any(map(is_private, made_in(node) | {x.attr for x in attributes})):
            return  # most have none, and a library's classes take their time to read
        ours, theirs = self.bases(node)
        above = {name for each in ours[1:] for name in made_in(each)}
        known = {name for kind in theirs for name in names_of(kind)}
        own = (made_in(node) | above) - known
        for inner in attributes:
            match inner.value:
                case ast.Name(id="self" | "cls"):
                    self._add({inner.attr} - own, inner.lineno)
                case ast.Call(func=ast.Name(id="super")):
                    self._add({inner.attr} - above, inner.lineno)
                case _:
                    continue
            self._judged.add(id(inner))
        for inner in node.body:
            match inner:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    called = not theirs or name in self._called or self._is_validator(inner)
                    self._add({name} - own if called else {name}, inner.lineno)
                case (
                    ast.Assign(targets=[ast.Name(id=name)])
                    | ast.AnnAssign(target=ast.Name(id=name))
                ):
                    self._add({name} - own, inner.lineno)

    def _is_validator(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
        """Whether pydantic gets to know a method by a decorator, whatever its name is."""
        return any((self._home(each) or "").startswith("pydantic.") for each in node.decorator_list)

    def _judge(self, node: ast.AST) -> None:
        match node:
            case ast.Attribute(attr=name) if id(node) not in self._judged:
                if not is_ours(self._home(node)):
                    self._add({name} - self._made, node.lineno)
            case ast.Import(names=names):
                for alias in names:
                    if not is_ours(alias.name):
                        self._add(private_parts(alias.name), node.lineno)
            case ast.ImportFrom(module=str(module), level=0, names=names) if not is_ours(module):
                self._add(private_parts(module) | {alias.name for alias in names}, node.lineno)
            case ast.Call(func=function, keywords=keywords) if not is_ours(self._home(function)):
                for keyword in keywords:
                    self._add({keyword.arg or ""} - self._parameters, keyword.value.lineno)
            case ast.Constant(value=str(text)) if id(node) not in self._no_names:
                if re.fullmatch(r"[\w.]+", text):
                    self._add(private_parts(text) - self._made - self._bare, node.lineno)
