"""What the tensors of a model's files are of its parameters, by transformers' own tables.

transformers 5 keeps many models under other names than their files have, an expert's weight as a
part of a stacked one, a fused weight as several. It changes the one into the other as it loads, by
``transformers.conversion_mapping``. The same tables are read here without a number: each piece says
which tensors become which parameters, and in which steps. What scales a parameter is then taken
through the steps backwards, to the tensors as they lie in the files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from san_llm.errors import InputError
from san_llm.measure.copies import without_numbers

Numbers = np.ndarray[Any, Any]
Shape = tuple[int, ...]
# What a parameter is multiplied by, two times, and what is added behind: each of its axes or of
# size 1 along them; None where it changes nothing.
Changes = tuple[Numbers | None, Numbers | None, Numbers | None]
UNCHANGED: Changes = (None, None, None)
_IDLE = (1.0, 1.0, 0.0)  # what each of them is where it changes nothing


class UntranslatedError(InputError):
    """Tensors of files that become parameters in a way that is not known here."""


@dataclass(frozen=True)
class Step:
    """One thing that transformers does with tensors as it loads them.

    Attributes:
        kind: ``stack`` tensors along a new axis, ``join`` or ``cut`` them along one, or ``swap``
            two.
        axis: Which.
        other: The other one that is swapped.
    """

    kind: Literal["stack", "join", "cut", "swap"]
    axis: int
    other: int = 0


@dataclass(frozen=True)
class Piece:
    """Some tensors and the parameters that they become.

    Attributes:
        tensors: By their names in the files; those of each pattern in a row, such as the gates of
            all experts and then their ups.
        parameters: By their names in the model, in order.
        steps: From the ones to the others; none: it is the same tensor, by another name or not.
    """

    tensors: tuple[tuple[str, ...], ...]
    parameters: tuple[str, ...]
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class InFiles:
    """A model's parameters and the tensors of its files.

    Attributes:
        shapes: Of the model's parameters and buffers, by name.
        pieces: By each tensor's name the piece that it is of. A tensor of no piece is loaded by
            nobody.
        missing: Parameters that no tensor is or becomes, and none that they share numbers with.
        tied: The head's weight and the embedding's, where they are one.
        own: Parameters that a tensor of the same name is.
    """

    shapes: Mapping[str, Shape]
    pieces: Mapping[str, Piece]
    missing: tuple[str, ...]
    tied: tuple[str, str] | None
    own: frozenset[str]

    @property
    def names(self) -> dict[str, str]:
        """The tensor that each parameter is, of those that are one as a whole."""
        plain = [piece for piece in self.pieces.values() if not piece.steps]
        return {piece.parameters[0]: piece.tensors[0][0] for piece in plain}

    def changes(self, piece: Piece, of: Callable[[str], Changes]) -> dict[str, Changes]:
        """Return what changes each tensor of a piece.

        Args:
            piece: The piece.
            of: Gives what changes a parameter.
        """
        parts = [_Part(self.shapes[name], of(name)) for name in piece.parameters]
        return {
            name: part.changes
            for row, some in zip(piece.tensors, _backwards(piece, parts), strict=True)
            for name, part in zip(row, some, strict=True)
        }


def in_files(config: Any, model_class: str, stored: Mapping[str, Shape]) -> InFiles:
    """Return what the tensors of a model's files are of its parameters.

    Args:
        config: Its config, of transformers.
        model_class: The name of its class.
        stored: The shapes of the tensors, by name.

    Raises:
        UntranslatedError: when transformers does something to a tensor that is not known here.
        InputError: when there is no such model, or the files have no tensor for a parameter.
    """
    import transformers

    made = getattr(transformers, model_class, None)
    if made is None:
        raise UntranslatedError(f"this version of transformers has no {model_class}")
    model = without_numbers(config, made)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    table, prefix = get_model_conversion_mapping(model), model.base_model_prefix
    converters = [step for step in table if isinstance(step, WeightConverter)]
    of_pattern = {pattern: step for step in converters for pattern in step.source_patterns}
    collected: dict[str, dict[str | None, list[str]]] = {}
    for tensor in sorted(stored, key=dot_natural_key):
        name, pattern = _renamed(tensor, prefix, table, shapes)
        if name in shapes:
            collected.setdefault(name, {}).setdefault(pattern, []).append(tensor)
    pieces: dict[str, Piece] = {}
    for name, tensors in collected.items():
        first = next(iter(tensors))
        piece = (
            Piece(tuple(map(tuple, tensors.values())), (name,))
            if first is None
            else _converted(of_pattern[first], name, tensors, shapes, stored)
        )
        _check(piece, shapes, stored)
        pieces |= {tensor: piece for row in piece.tensors for tensor in row}
    given = {name for piece in pieces.values() for name in piece.parameters}
    shared = _shared(model)
    given |= {name for names in shared if given.intersection(names) for name in names}
    # What a model freezes itself, such as sinusoidal positions, it makes anew where no file has it.
    missing = (n for n, p in model.named_parameters() if p.requires_grad and n not in given)
    own = (name for name in shapes if _renamed(name, prefix, table, shapes) == (name, None))
    return InFiles(shapes, pieces, tuple(missing), _tied(model, shared), frozenset(own))


def _renamed(
    tensor: str, prefix: str, table: Sequence[Any], shapes: Mapping[str, Shape]
) -> tuple[str, str | None]:
    """Return which parameter a tensor becomes, or becomes first; by which converter's pattern."""
    renamings = [step for step in table if isinstance(step, WeightRenaming)]
    converters = [step for step in table if isinstance(step, WeightConverter)]
    known = dict(shapes)
    name, pattern = rename_source_key(tensor, renamings, converters, prefix, known)
    if name not in shapes and tensor in shapes:  # files that were saved under today's names
        name, pattern = rename_source_key(tensor, [], [], prefix, known)
    return name, pattern


def _converted(
    converter: Any,
    name: str,
    tensors: Mapping[str | None, list[str]],
    shapes: Mapping[str, Shape],
    stored: Mapping[str, Shape],
) -> Piece:
    """Return what a converter makes of tensors, of which ``name`` is the first parameter."""
    first, *others = converter.target_patterns
    before, found, after = name.partition(first)
    if others and not found:
        raise UntranslatedError(
            f"transformers makes several parameters of {name} that are not known"
        )
    rows = tuple(tuple(tensors.get(pattern, ())) for pattern in converter.source_patterns)
    names = (name, *(f"{before}{other}{after}" for other in others))
    steps = [
        step for op in converter.operations for step in _steps(op, rows, names, shapes, stored)
    ]
    if all(step.kind != "stack" for step in steps):  # all tensors of a pattern are joined
        rows = tuple((tensor,) for row in rows for tensor in row)
    return Piece(rows, names, tuple(steps))


def _steps(
    op: Any,
    tensors: Sequence[Sequence[str]],
    names: Sequence[str],
    shapes: Mapping[str, Shape],
    stored: Mapping[str, Shape],
) -> list[Step]:
    """Return the steps that an operation of transformers is.

    Raises:
        UntranslatedError: of one that is not known.
    """
    match type(op).__name__:
        case "MergeModulelist":
            return [Step("stack", op.dim)]
        case "Concatenate":
            return [Step("join", op.dim)]
        case "Split":
            return [Step("cut", op.dim)]
        case "Chunk" if getattr(op, "num_shards_attribute", None) is None:
            return [Step("cut", op.dim)]
        case "Transpose":
            as_it_is = op.check_dims and stored.get(tensors[0][0]) == shapes.get(names[0])
            return [] if as_it_is else [Step("swap", op.dim0, op.dim1)]
    raise UntranslatedError(
        f"transformers makes {names[0]} of {tensors[0][0]} by {type(op).__name__}, which is not "
        "known here"
    )


def _check(piece: Piece, shapes: Mapping[str, Shape], stored: Mapping[str, Shape]) -> None:
    """Refuse a piece whose steps do not lead to its tensors, as they are in the files.

    Raises:
        UntranslatedError: when they do not.
        InputError: when a tensor has another shape than its parameter.
    """
    names = [tensor for row in piece.tensors for tensor in row]
    if not piece.steps:
        if len(names) > 1:
            raise UntranslatedError(f"{names[0]} and {names[1]} are both {piece.parameters[0]}")
        own, made = stored[names[0]], shapes[piece.parameters[0]]
        if own != made:
            raise InputError(f"{names[0]} has the shape {own}, by its config.json it is {made}")
        return
    try:
        parts = [_Part(shapes[name], UNCHANGED) for name in piece.parameters]
        found = [part.shape for row in _backwards(piece, parts) for part in row]
    except (KeyError, IndexError, ValueError):
        found = []
    if found != [stored[name] for name in names]:
        raise UntranslatedError(f"transformers makes {piece.parameters[0]} otherwise of {names[0]}")


def _shared(model: Any) -> list[list[str]]:
    """Return the names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [some for some in names.values() if len(some) > 1]


def _tied(model: Any, shared: Sequence[Sequence[str]]) -> tuple[str, str] | None:
    """Return the head's weight and the embedding's, where they are one and of no other module."""
    for names in shared:
        modules = [model.get_submodule(name.rpartition(".")[0]) for name in names]
        tables = [isinstance(module, nn.Embedding) for module in modules]
        if len(names) == 2 and sum(tables) == 1:
            return names[tables.index(False)], names[tables.index(True)]
    return None


@dataclass(frozen=True)
class _Part:
    """A tensor between file and model: its shape, and what changes it."""

    shape: Shape
    changes: Changes

    def of_each(self, shape: Shape, change: Callable[[Numbers], Numbers]) -> _Part:
        first, second, third = (None if c is None else change(c) for c in self.changes)
        return replace(self, shape=shape, changes=(first, second, third))


def _backwards(piece: Piece, parts: list[_Part]) -> list[list[_Part]]:
    """Return the tensors of a piece, those of each pattern in a row, from its parameters."""
    rows: list[list[_Part]] | None = None
    for step in reversed(piece.steps):
        if rows is not None:
            raise ValueError("stacked tensors are changed before they are stacked")
        match step.kind:
            case "swap":
                parts = [_swapped(part, step.axis, step.other) for part in parts]
            case "join":
                (whole,) = parts
                parts = _cut(whole, step.axis, len(piece.tensors))
            case "cut":
                parts = [_joined(parts, step.axis)]
            case "stack":
                rows = [_unstacked(part, step.axis) for part in parts]
    return rows or [[part] for part in parts]


def _swapped(part: _Part, one: int, other: int) -> _Part:
    shape = list(part.shape)
    shape[one], shape[other] = shape[other], shape[one]
    return part.of_each(tuple(shape), lambda change: change.swapaxes(one, other))


def _cut(whole: _Part, axis: int, count: int) -> list[_Part]:
    size, left = divmod(whole.shape[axis], count)
    if left:
        raise ValueError("not cut into equal parts")
    shape = _at(whole.shape, axis, size)

    def some(first: int) -> Callable[[Numbers], Numbers]:
        place = (*(slice(None),) * axis, slice(first, first + size))
        return lambda change: change if change.shape[axis] == 1 else change[place]

    return [whole.of_each(shape, some(first)) for first in range(0, size * count, size)]


def _unstacked(whole: _Part, axis: int) -> list[_Part]:
    shape = (*whole.shape[:axis], *whole.shape[axis + 1 :])

    def one(number: int) -> Callable[[Numbers], Numbers]:
        return lambda change: change.take(0 if change.shape[axis] == 1 else number, axis)

    return [whole.of_each(shape, one(number)) for number in range(whole.shape[axis])]


def _joined(parts: list[_Part], axis: int) -> _Part:
    size = sum(part.shape[axis] for part in parts)
    first, second, third = (
        _together([(part.shape, part.changes[which]) for part in parts], axis, idle)
        for which, idle in enumerate(_IDLE)
    )
    return _Part(_at(parts[0].shape, axis, size), (first, second, third))


def _together(
    changes: Sequence[tuple[Shape, Numbers | None]], axis: int, idle: float
) -> Numbers | None:
    """Return what changes tensors that are joined, from what changes each of them."""
    given = [change for _, change in changes if change is not None]
    if not given:
        return None
    same = len(given) == len(changes) and all(np.array_equal(given[0], one) for one in given)
    if same and given[0].shape[axis] == 1:
        return given[0]
    ones = [1] * given[0].ndim
    filled = [np.full(ones, idle, given[0].dtype) if one is None else one for _, one in changes]
    wide = np.broadcast_shapes(*(_at(one.shape, axis, 1) for one in filled))
    each = zip(filled, changes, strict=True)
    return np.concatenate(
        [np.broadcast_to(one, _at(wide, axis, shape[axis])) for one, (shape, _) in each], axis
    )


def _at(shape: Shape, axis: int, size: int) -> Shape:
    """Return a shape with another size along an axis."""
    return (*shape[:axis], size, *shape[axis + 1 :])
