"""What a module's channels do to what later modules read, one channel moved at a time.

The rows of a batch are one and the same row; in each but the first another channel of the writer's
output is moved. What differs between the rows at a reader is what that channel does there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from operator import add, mul
from typing import Any

import torch
from torch import Tensor, nn

from san_llm.errors import InputError
from san_llm.measure.copies import Copy

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
AT_ONCE = 64  # channels in one batch
FACTORS = (2.0, -1.0)  # what passes with both of them is linear: ReLU passes the first alone
EXACT = 1e-6  # relative: what is lost on the way, also where a model computes a part in float32
SMALL = 1e-3  # of a writer's spread: what is added to a channel
LARGE = 4.0  # likewise, to wake a channel that an activation keeps at 0
LARGER = 16.0  # likewise, where the activation keeps a sum with other writers at 0

# Of what a writer writes, as (rows, tokens, channels).
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Reach:
    """What the channels of a writer do to what one reader reads.

    Attributes:
        exact: Whether a reader's channel is multiplied by whatever a writer's is, and no other is:
            (d_out, d_in).
        moved: How far a reader's channel moves when something is added to a writer's, averaged
            over tokens and relative to what is added: (d_out, d_in).
        woken: The same, for something large that is added, where an activation stands between.
        across: Whether a token of the reader moves with another token of the writer.
        alone: Whether a reader's channels depend on nothing but the writer's output.
        sleeps: Whether some of a reader's channels move with nothing small, as behind a ReLU.
    """

    exact: Tensor
    moved: Tensor
    woken: Tensor
    across: bool
    alone: bool
    sleeps: bool


class DoneError(Exception):
    """All readers have been seen: the rest of the forward is not needed."""


def channels_out(module: nn.Module) -> int:
    """Return how many channels a module writes."""
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    if isinstance(module, CONVOLUTIONS):
        return module.out_channels
    if isinstance(module, nn.Linear):
        return module.out_features
    weight: Any = module.weight  # transformers' Conv1D is a transposed Linear
    return int(weight.shape[1])


def channels_in(module: nn.Module) -> int:
    """Return how many channels a module reads; 0 of an embedding."""
    if isinstance(module, nn.Embedding):
        return 0
    if isinstance(module, CONVOLUTIONS):
        return module.in_channels
    if isinstance(module, nn.Linear):
        return module.in_features
    weight: Any = module.weight
    return int(weight.shape[0])


@dataclass(frozen=True)
class _Layout:
    """How a module's features are laid out.

    Attributes:
        batch: The axis of the rows, which tokens may share: 1 of an encoder that has tokens first.
        channels: The axis of the channels: 1 of a convolution.
    """

    batch: int
    channels: int

    def by_row(self, features: Tensor, rows: int) -> Tensor:
        """Return features as (rows, tokens, channels)."""
        first = self._moved(features)
        if first.shape[0] % rows:
            raise InputError("it computes some tokens apart from others, as routed experts do")
        return first.reshape(rows, -1, first.shape[-1])

    def as_it_was(self, by_row: Tensor, features: Tensor) -> Tensor:
        """Return what ``by_row`` made of some features, laid out as they are."""
        first = by_row.reshape(self._moved(features).shape)
        return first.movedim((0, -1), (self.batch, self.channels))

    def _moved(self, features: Tensor) -> Tensor:
        return features.movedim((self.batch, self.channels), (0, -1))


def _layout(module: nn.Module, one: Any, two: Any) -> _Layout | None:
    """Return the layout of what a module writes, or None where it has no axis of rows.

    Args:
        module: It.
        one: What it wrote of one row.
        two: Of two rows.
    """
    if not isinstance(one, Tensor) or not isinstance(two, Tensor) or one.dim() != two.dim():
        return None
    grown = [axis for axis, size in enumerate(one.shape) if two.shape[axis] != size]
    channels = 1 if isinstance(module, CONVOLUTIONS) else -1
    return _Layout(grown[0], channels) if len(grown) == 1 else None


class Probe:
    """A small copy whose writers can be moved, and whose readers are listened to."""

    def __init__(self, copy: Copy) -> None:
        """Hold a copy."""
        self._copy = copy
        self._modules = dict(copy.model.named_modules())
        self._layouts: dict[str, _Layout] = {}

    def order(self, names: Sequence[str]) -> list[str]:
        """Return those of some modules that a forward runs, in the order of their first run.

        Without those that write no features of rows: a router's choice, or what stands for
        distances between tokens. The others can be measured from now on.
        """
        one, two = (self._first_outputs(names, rows) for rows in (1, 2))
        for name, out in one.items():
            layout = _layout(self._modules[name], out, two.get(name))
            if layout is not None:
                self._layouts[name] = layout
        return list(self._layouts)

    def _first_outputs(self, names: Sequence[str], rows: int) -> dict[str, Any]:
        """Return what some modules write in their first run, in the order of those."""
        wrote: dict[str, Any] = {}

        def note(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, out: Any) -> None:
                wrote.setdefault(name, out)

            return hook

        with self._hooks((self._modules[name].register_forward_hook, note(name)) for name in names):
            self._run(rows)
        return wrote

    def reach(self, writer: str, readers: Sequence[str]) -> dict[str, Reach]:
        """Return what a writer's channels do to each of some readers that run after it."""
        out = self._output(writer)
        count, spread = out.shape[-1], float(out.std())
        across, alone = self._across(writer, readers), self._alone(writer, readers)
        chunks = [range(at, min(count, at + AT_ONCE)) for at in range(0, count, AT_ONCE)]

        def all_of(some: Callable[[range], dict[str, Tensor]]) -> dict[str, Tensor]:
            parts = [some(channels) for channels in chunks]
            return {name: torch.cat([part[name] for part in parts]) for name in readers}

        moved = all_of(partial(self._moved, writer, readers, SMALL * spread))
        sleeps = {name: _sleeps(x) for name, x in moved.items()}
        woken, exact = moved, {name: torch.zeros_like(x).bool() for name, x in moved.items()}
        if any(alone.values()):
            woken = all_of(partial(self._moved, writer, readers, LARGE * spread))
        if asleep := [name for name in readers if sleeps[name] and not alone[name]]:
            awake = all_of(partial(self._moved, writer, readers, LARGER * spread))
            woken = woken | {name: awake[name] for name in asleep}
        if any(_moves_some(x) for x in moved.values()):
            exact = all_of(partial(self._exact, writer, readers))
        return {
            name: Reach(
                exact[name], moved[name], woken[name], across[name], alone[name], sleeps[name]
            )
            for name in readers
        }

    def _moved(
        self, writer: str, readers: Sequence[str], amount: float, channels: range
    ) -> dict[str, Tensor]:
        heard = self._listen(
            writer, readers, len(channels) + 1, _each(channels, partial(add, amount))
        )
        return {name: (x[1:] - x[:1]).abs().mean(1) / amount for name, x in heard.items()}

    def _exact(self, writer: str, readers: Sequence[str], channels: range) -> dict[str, Tensor]:
        passes = [
            self._listen(writer, readers, len(channels) + 1, _each(channels, partial(mul, factor)))
            for factor in FACTORS
        ]
        return {
            name: torch.stack(
                [_multiplied(x[name], f) for x, f in zip(passes, FACTORS, strict=True)]
            ).all(0)
            for name in readers
        }

    def _output(self, writer: str) -> Tensor:
        """Return what a writer writes, (1, tokens, channels)."""
        kept: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, out: Tensor) -> None:
            kept.append(self._layouts[writer].by_row(out, 1))
            raise DoneError

        with self._hooks([(self._modules[writer].register_forward_hook, keep)]):
            self._run(1)
        return kept[0]

    def _across(self, writer: str, readers: Sequence[str]) -> dict[str, bool]:
        """Return at which readers another token than the one that was moved moves, too."""

        def move(out: Tensor) -> Tensor:
            moved = out.clone()
            moved[1, 0] += out.std()
            return moved

        seen = self._listen(writer, readers, 2, move)
        return {
            name: bool((x[1, 1:] - x[0, 1:]).abs().max() > EXACT) if x.shape[1] > 1 else False
            for name, x in seen.items()
        }

    def _alone(self, writer: str, readers: Sequence[str]) -> dict[str, bool]:
        """Return which readers read the same of whatever row, while the writer's output stands."""
        kept: list[Tensor] = []

        def keep(out: Tensor) -> Tensor:
            if not kept:
                kept.append(out)
            return kept[0]

        first = self._listen(writer, readers, 1, keep)
        second = self._listen(writer, readers, 1, keep, self._copy.more)
        return {
            name: first[name].shape == second[name].shape
            and bool((first[name] - second[name]).abs().max() <= EXACT * first[name].abs().max())
            for name in readers
        }

    def _listen(
        self,
        writer: str,
        readers: Sequence[str],
        rows: int,
        change: Change,
        arguments: dict[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """Return what readers read of a changed writer, (rows, tokens, channels)."""
        heard: dict[str, Tensor] = {}
        wrote: list[torch.Size] = []

        def write(_module: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
            wrote.append(out.shape)
            if out.shape != wrote[0]:  # run again, of something else: distances between tokens
                return out
            layout = self._layouts[writer]
            return layout.as_it_was(change(layout.by_row(out, rows)), out)

        def listen(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                if name not in heard:
                    heard[name] = self._layouts[name].by_row(inputs[0], rows)
                if len(heard) == len(readers):
                    raise DoneError

            return hook

        module = self._modules[writer]
        hooks = [(self._modules[name].register_forward_pre_hook, listen(name)) for name in readers]
        with self._hooks([(module.register_forward_hook, write), *hooks]):
            self._run(rows, arguments)
        return heard

    def _run(self, rows: int, arguments: dict[str, Any] | None = None) -> None:
        given = self._copy.rows if arguments is None else arguments
        repeated = {
            name: value.repeat(rows, *(1,) * (value.dim() - 1))
            if isinstance(value, Tensor)
            else value
            for name, value in given.items()
        }
        with torch.no_grad(), suppress(DoneError):
            self._copy.model(**repeated)

    @contextmanager
    def _hooks(self, wanted: Any) -> Iterator[None]:
        handles = [register(hook) for register, hook in wanted]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _each(channels: range, change: Callable[[Tensor], Tensor]) -> Change:
    """Return what changes another channel in each row but the first."""

    def changed(out: Tensor) -> Tensor:
        moved = out.clone()
        for row, channel in enumerate(channels, start=1):
            moved[row, :, channel] = change(moved[row, :, channel])
        return moved

    return changed


def _sleeps(moved: Tensor) -> bool:
    """Return whether some of a reader's channels move and others do not."""
    still = moved.amax(0) <= EXACT * moved.max()
    return bool(still.any() and not still.all())


def _moves_some(moved: Tensor) -> bool:
    """Return whether a channel moves some of the reader's, and not all, as exact ones do."""
    counts = (moved > EXACT * moved.max()).sum(-1)
    return bool(((counts > 0) & (counts < moved.shape[-1])).any())


def _multiplied(x: Tensor, factor: float) -> Tensor:
    """Return which channels of a reader each moved channel multiplies by ``factor``, alone."""
    base, others = x[:1], x[1:]
    scale = base.abs().amax()
    change = (others - base).abs().amax(1)
    apart = (others - factor * base).abs().amax(1)
    changed = change > EXACT * scale
    exact = changed & (apart <= EXACT * scale)
    return exact & (changed == exact).all(-1, keepdim=True)
