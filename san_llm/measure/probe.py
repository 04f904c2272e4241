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

from san_llm.measure.copies import Copy

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
AT_ONCE = 64  # channels in one batch
FACTORS = (2.0, -1.0)  # what passes with both of them is linear: ReLU passes the first alone
EXACT = 1e-6  # relative: what is lost on the way, also where a model computes a part in float32
SMALL = 1e-3  # of a writer's spread: what is added to a channel
LARGE = 4.0  # likewise, to wake a channel that an activation keeps at 0

# Of a writer's output, how many rows it has, and whether it is a convolution's.
Change = Callable[[Tensor, int, bool], Tensor]


@dataclass(frozen=True)
class Reach:
    """What the channels of a writer do to what one reader reads.

    Attributes:
        exact: Whether a reader's channel is multiplied by whatever a writer's is, and no other is:
            (d_out, d_in).
        moved: How far a reader's channel moves when something is added to a writer's, averaged
            over tokens and relative to what is added: (d_out, d_in).
        woken: The same, for something large that is added.
        across: Whether a token of the reader moves with another token of the writer.
        alone: Whether a reader's channels depend on nothing but the writer's output.
    """

    exact: Tensor
    moved: Tensor
    woken: Tensor
    across: bool
    alone: bool


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


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, CONVOLUTIONS)


def _by_row(features: Tensor, rows: int, convolution: bool) -> Tensor:
    """Return features as (rows, tokens, channels), however a model lays out its batch."""
    if convolution:
        features = features.movedim(1, -1)
    return features.reshape(rows, -1, features.shape[-1])


class Probe:
    """A small copy whose writers can be moved, and whose readers are listened to."""

    def __init__(self, copy: Copy) -> None:
        """Hold a copy."""
        self._copy = copy
        self._modules = dict(copy.model.named_modules())

    def order(self, names: Sequence[str]) -> list[str]:
        """Return those of some modules that a forward runs, in the order of their first run."""
        ran: dict[str, None] = {}

        def note(name: str) -> Callable[..., None]:
            return lambda *_: ran.setdefault(name)

        with self._hooks((self._modules[name].register_forward_hook, note(name)) for name in names):
            self._run(1)
        return list(ran)

    def reach(self, writer: str, readers: Sequence[str]) -> dict[str, Reach]:
        """Return what a writer's channels do to each of some readers that run after it."""
        out = self._output(writer)
        count, spread = out.shape[-1], float(out.std())
        across, alone = self._across(writer, readers), self._alone(writer, readers)
        parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in readers}
        for start in range(0, count, AT_ONCE):
            channels = range(start, min(count, start + AT_ONCE))
            moved = self._moved(writer, readers, channels, SMALL * spread)
            woken = moved
            if any(alone.values()):
                woken = self._moved(writer, readers, channels, LARGE * spread)
            exact = {name: torch.zeros_like(x, dtype=torch.bool) for name, x in moved.items()}
            if any(_moves_some(x) for x in moved.values()):
                exact = self._exact(writer, readers, channels)
            for name in readers:
                parts[name].append((exact[name], moved[name], woken[name]))
        reaches = {}
        for name in readers:
            exact_rows, moved_rows, woken_rows = zip(*parts[name], strict=True)
            reaches[name] = Reach(
                torch.cat(exact_rows),
                torch.cat(moved_rows),
                torch.cat(woken_rows),
                across[name],
                alone[name],
            )
        return reaches

    def _moved(
        self, writer: str, readers: Sequence[str], channels: range, amount: float
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

        def keep(module: nn.Module, _inputs: Any, out: Tensor) -> None:
            kept.append(_by_row(out, 1, _is_convolution(module)))
            raise DoneError

        with self._hooks([(self._modules[writer].register_forward_hook, keep)]):
            self._run(1)
        return kept[0]

    def _across(self, writer: str, readers: Sequence[str]) -> dict[str, bool]:
        """Return at which readers another token than the one that was moved moves, too."""

        def move(out: Tensor, rows: int, convolution: bool) -> Tensor:
            view = _by_row(out, rows, convolution).clone()
            view[1, 0] += view.std()
            return _as_it_was(view, out, convolution)

        seen = self._listen(writer, readers, 2, move)
        return {
            name: bool((x[1, 1:] - x[0, 1:]).abs().max() > EXACT) if x.shape[1] > 1 else False
            for name, x in seen.items()
        }

    def _alone(self, writer: str, readers: Sequence[str]) -> dict[str, bool]:
        """Return which readers read the same of whatever row, while the writer's output stands."""
        kept: list[Tensor] = []

        def keep(out: Tensor, rows: int, convolution: bool) -> Tensor:
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
        module = self._modules[writer]

        def write(_module: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
            return change(out, rows, _is_convolution(module))

        def listen(name: str) -> Callable[..., None]:
            convolution = _is_convolution(self._modules[name])

            def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                heard.setdefault(name, _by_row(inputs[0], rows, convolution))
                if len(heard) == len(readers):
                    raise DoneError

            return hook

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

    def changed(out: Tensor, rows: int, convolution: bool) -> Tensor:
        view = _by_row(out, rows, convolution).clone()
        for row, channel in enumerate(channels, start=1):
            view[row, :, channel] = change(view[row, :, channel])
        return _as_it_was(view, out, convolution)

    return changed


def _as_it_was(view: Tensor, out: Tensor, convolution: bool) -> Tensor:
    if not convolution:
        return view.reshape(out.shape)
    moved = out.movedim(1, -1)
    return view.reshape(moved.shape).movedim(-1, 1)


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
