"""Where a model lets scales move, found on a small copy: the data of the lean form (``san.lean``).

Candidates are read off one forward, by what its modules read and wrote. Each is then tried: scales
are put where they would move to and taken away where they come from, on all blocks at once, and the
copy's output must stay. What fails is halved until what is left stands, so that blocks which look
alike but are not (a rotation in three of four) are told apart. What is not found costs memory,
never a result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from san_llm.measure.copies import Copy
from san_llm.measure.experts import GATES, gate_of
from san_llm.measure.graph import MeasuredFold, MeasuredLink, MeasuredModule
from san_llm.measure.norms import find_norm
from san_llm.measure.probe import channels_in, channels_out
from san_llm.measure.rotation import rotates_halves, with_rotation
from san_llm.measure.units import path_of
from san_llm.ops.scale import ScaledRotary, ScaledSwiGLU

CLOSE = 1e-5  # of the largest output: norms compute in float32, a scale moves it by tenths
EXACT = 1e-9  # of the spread of what an MLP writes, in float64
LINEAR = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class _Run:
    """What a module was given and what it gave."""

    x: Tensor
    out: Tensor


class _Finder:
    """A small copy, what its modules did in one forward, and what is known of them."""

    def __init__(
        self, copy: Copy, links: Mapping[str, MeasuredLink], modules: Iterable[MeasuredModule]
    ) -> None:
        self.copy, self.links = copy, links
        self.modules: dict[str, nn.Module] = dict(copy.model.named_modules())
        self.readers = {
            m.name: m.usable
            for m in modules
            if m.place == "block" and isinstance(self.modules[m.name], LINEAR)
        }
        self.runs: dict[str, _Run] = {}
        self.output = self.ran(self._kept_runs())

    def ran(self, hooks: Iterable[Any]) -> list[Tensor]:
        """Return the tensors that a forward gives, with some hooks, each ``register, hook``."""
        handles = [register(hook) for register, hook in hooks]
        try:
            with torch.no_grad():
                out = self.copy.model(**self.copy.rows)
        finally:
            for handle in handles:
                handle.remove()
        return [value for value in out.values() if isinstance(value, Tensor)]

    def _kept_runs(self) -> Iterator[Any]:
        """Yield hooks that keep what each module of a block was given: one tensor, once."""
        again: set[str] = set()

        def keep(name: str, _module: Any, given: Any, named: Any, out: Any) -> None:
            tensors = (*given, out)
            one = len(given) == 1 and not named and all(isinstance(t, Tensor) for t in tensors)
            if name in again or not one:
                self.runs.pop(name, None)
            else:
                self.runs[name] = _Run(given[0], out)
            again.add(name)

        for name, module in self.modules.items():
            if path_of(name):
                register = partial(module.register_forward_hook, with_kwargs=True)
                yield register, partial(keep, name)

    def inside(self, path: str) -> Iterator[str]:
        """Yield the modules below a path that ran."""
        return (name for name in self.runs if name.startswith(path))


def find_folds(
    copy: Copy, links: Mapping[str, MeasuredLink], modules: Iterable[MeasuredModule]
) -> tuple[MeasuredFold, ...]:
    """Return where a model's scales can move.

    Args:
        copy: A small copy of it.
        links: What feeds its modules, by name.
        modules: Those of its graph.
    """
    finder = _Finder(copy, links, modules)
    found = [*_attention(finder), *_gated(finder)]
    for candidates in (_norms, _activations, _rotations, _products):
        found += _standing(finder, list(candidates(finder)))
    return tuple(sorted(found, key=lambda fold: list(finder.modules).index(fold.members[0])))


def _standing(finder: _Finder, folds: list[MeasuredFold]) -> list[MeasuredFold]:
    """Return those of some folds that leave the copy's output as it is."""
    if not folds or _stand(finder, folds):
        return folds
    half = len(folds) // 2
    return [*_standing(finder, folds[:half]), *_standing(finder, folds[half:])] if half else []


def _stand(finder: _Finder, folds: list[MeasuredFold]) -> bool:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        try:
            found = finder.ran(hook for fold in folds for hook in _TRIES[fold.kind](finder, fold))
        except Exception:  # a model's own code, of whatever kind
            return False
    return all(
        one.shape == other.shape and bool((one - other).abs().max() <= CLOSE * other.abs().max())
        for one, other in zip(found, finder.output, strict=True)
    )


# A hook, and what registers it.
_Hooks = Iterator[tuple[Callable[[Any], Any], Callable[..., Any]]]


def _random(count: int) -> Tensor:
    return 0.5 + torch.rand(count, dtype=torch.float64)


def _reads(module: nn.Module, scale: Tensor) -> Any:
    """Return a hook that scales what a module reads."""
    return module.register_forward_pre_hook, lambda _, given: (given[0] * scale, *given[1:])


def _writes(module: nn.Module, scale: Tensor) -> Any:
    """Return a hook that scales what a module writes."""
    return module.register_forward_hook, lambda _, __, out: out * scale


def _norms(finder: _Finder) -> Iterator[MeasuredFold]:
    """Yield norms with all Linears of their block that read them."""
    reading: dict[tuple[str, tuple[float, ...]], list[str]] = {}
    for name in finder.readers:
        if name in finder.runs:
            reading.setdefault((path_of(name), _seen(finder.runs[name].x)), []).append(name)
    for name, run in finder.runs.items():
        if any(True for _ in finder.modules[name].children()):
            continue
        readers = reading.get((path_of(name), _seen(run.out)), [])
        if not readers or not all(finder.readers[reader] for reader in readers):
            continue
        how = find_norm(finder.modules[name])
        if how is not None:
            yield MeasuredFold("norm", tuple(readers), name, how)


def _seen(features: Tensor) -> tuple[float, ...]:
    """Return what of features stays when tokens change places: their largest by channel."""
    return tuple(features.flatten(0, -2).abs().amax(0).tolist())


def _try_norm(finder: _Finder, fold: MeasuredFold) -> _Hooks:
    s = _random(finder.runs[fold.at].out.shape[-1])
    yield _writes(finder.modules[fold.at], s)
    for reader in fold.members:
        yield _reads(finder.modules[reader], 1 / s)


def _activations(finder: _Finder) -> Iterator[MeasuredFold]:
    """Yield modules that are given all of what one Linear writes, and give all that another reads.

    Tokens apart: a module with several axes of them is one that knows of none.
    """
    for link in finder.links.values():
        first, second = link.anterior, link.posterior
        if link.exactness != "activation" or not _both_run(finder, first, second):
            continue
        given, taken = finder.runs[first].out, finder.runs[second].x
        for name in finder.inside(path_of(second)):
            run, module = finder.runs[name], finder.modules[name]
            if any(True for _ in module.parameters()) or run.x.shape != run.out.shape:
                continue
            if _equal(run.x, given) and _equal(run.out, taken) and _of_tokens(module, run):
                yield MeasuredFold("activation", (first, second), name)
                break


def _of_tokens(module: nn.Module, run: _Run) -> bool:
    """Return whether a module computes each token alone, and leaves what it is given."""
    given = run.x.flatten(0, -2)
    before = given.clone()
    out = torch.cat([module(row[None]) for row in given])
    return torch.equal(given, before) and torch.allclose(out, run.out.flatten(0, -2))


def _try_activation(finder: _Finder, fold: MeasuredFold) -> _Hooks:
    first, second = (finder.modules[name] for name in fold.members)
    g, s = _random(channels_out(first)), _random(channels_in(second))
    act = finder.modules[fold.at]
    yield _writes(first, 1 / g)
    yield _reads(act, g)
    yield _writes(act, s)
    yield _reads(second, 1 / s)


def _attention(finder: _Finder) -> Iterator[MeasuredFold]:
    """Yield values, all of whose channels attention hands on, with what reads them."""
    for link in finder.links.values():
        v, o = link.anterior, link.posterior
        if link.kind == "attention" and link.exactness == "exact" and _both_run(finder, v, o):
            sizes = channels_out(finder.modules[v]), channels_in(finder.modules[o])
            if len(set(link.channels.source(*sizes).tolist())) == sizes[0]:
                yield MeasuredFold("attention", (v, o))


def _rotations(finder: _Finder) -> Iterator[MeasuredFold]:
    """Yield attentions that rotate what two Linears write, as they write it."""
    if not finder.copy.whole_heads:
        return
    rotating = {n: m for n, m in finder.modules.items() if path_of(n) and rotates_halves(m)}
    rotated: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Any:
        rotated[name] = (query, key)
        return (ScaledRotary.apply(features, None, cos, sin) for features in (query, key))

    with _rotated({module: partial(keep, name) for name, module in rotating.items()}):
        try:
            finder.ran(())
        except Exception:  # one that calls it otherwise
            return
    for name, pair in rotated.items():
        members = [
            next((n for n in finder.inside(name + ".") if _equal(finder.runs[n].out, flat)), None)
            for flat in (features.transpose(1, 2).flatten(2) for features in pair)
        ]
        q, k = members
        if q in finder.readers and k in finder.readers:
            yield MeasuredFold("rotation", (str(q), str(k)), name)


@contextmanager
def _rotated(by_module: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let attentions rotate by other functions for a while."""
    for attention, rotate in by_module.items():
        attention.forward = partial(with_rotation(attention, rotate), attention)
    try:
        yield
    finally:
        for attention in by_module:
            del attention.forward


def _try_rotation(finder: _Finder, fold: MeasuredFold) -> _Hooks:
    linears = [finder.modules[name] for name in fold.members]
    scales = [_random(channels_out(linear)) for linear in linears]
    attention = finder.modules[fold.at]

    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Any:
        both = zip((query, key), scales, strict=True)
        return (ScaledRotary.apply(features, scale, cos, sin) for features, scale in both)

    for linear, scale in zip(linears, scales, strict=True):
        yield _writes(linear, 1 / scale)
    yield partial(_Rotating, attention), rotate


class _Rotating:
    """An attention that rotates by another function, until it is removed as a hook is."""

    def __init__(self, attention: Any, rotate: Callable[..., Any]) -> None:
        attention.forward = partial(with_rotation(attention, rotate), attention)
        self._attention = attention

    def remove(self) -> None:
        del self._attention.forward


def _products(finder: _Finder) -> Iterator[MeasuredFold]:
    """Yield the other two that read what values read: of them the product alone may act."""
    for link in finder.links.values():
        v = link.anterior
        if link.kind != "attention" or v not in finder.runs:
            continue
        parent = v.rpartition(".")[0] + "."
        beside = [
            name
            for name in finder.inside(parent)
            if name in finder.readers
            and name != v
            and _equal(finder.runs[name].x, finder.runs[v].x)
        ]
        if len(beside) == 2 and len({channels_out(finder.modules[n]) for n in beside}) == 1:
            yield MeasuredFold("product", tuple(beside))


def _try_product(finder: _Finder, fold: MeasuredFold) -> _Hooks:
    q, k = (finder.modules[name] for name in fold.members)
    scale = _random(channels_out(q))
    yield _writes(q, scale)
    yield _writes(k, 1 / scale)


def _gated(finder: _Finder) -> Iterator[MeasuredFold]:
    """Yield MLPs whose forward is ``down(act(gate(x)) * up(x))``, with no dropout in training."""
    for link in finder.links.values():
        up, down = link.anterior, link.posterior
        if link.kind != "mlp" or link.exactness != "exact" or not _both_run(finder, up, down):
            continue
        name = _parent(up, down)
        if name not in finder.runs or not path_of(f"{name}.x"):
            continue
        x = finder.runs[up].x
        gates = [
            n
            for n in finder.inside(f"{name}.")
            if n in finder.readers and n not in (up, down) and _equal(finder.runs[n].x, x)
        ]
        fused = channels_out(finder.modules[up]) == 2 * channels_in(finder.modules[down])
        gates += [up] if fused else []
        for gate in gates[:1]:
            how = _gate_of(finder, name, gate, up, down)
            if how is not None:
                yield MeasuredFold("gated", (gate, up, down), name, how)


def _parent(*names: str) -> str:
    """Return the innermost module that two others are in."""
    alike = takewhile(
        lambda pair: pair[0] == pair[1], zip(*(n.split(".") for n in names), strict=False)
    )
    return ".".join(part for part, _ in alike)


def _gate_of(finder: _Finder, name: str, gate: str, up: str, down: str) -> str | None:
    """Return the activation of a gated MLP, or None for one that computes otherwise."""
    mlp, run = finder.modules[name], finder.runs[name]
    last: Any = finder.modules[down]
    parts = [finder.runs[n].out for n in dict.fromkeys((gate, up))]
    both = parts[0].chunk(2, dim=-1) if len(parts) == 1 else parts
    how = next((how for how in map(gate_of, mlp.modules()) if how), None)
    if how is None:
        return None
    with torch.random.fork_rng([]), torch.no_grad():
        mlp.train()  # in which a dropout would show
        try:
            wanted = mlp(run.x)
        finally:
            mlp.eval()
        found: Tensor = last(ScaledSwiGLU.apply(*both, None, None, GATES[how]))
    return how if torch.allclose(found, wanted, rtol=0, atol=EXACT * float(wanted.std())) else None


def _both_run(finder: _Finder, *names: str) -> bool:
    return all(name in finder.runs and name in finder.readers for name in names)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same numbers in the same order."""
    if one is other:
        return True
    return one.numel() == other.numel() and torch.equal(one.reshape(-1), other.reshape(-1))


_TRIES: dict[str, Callable[[_Finder, MeasuredFold], _Hooks]] = {
    "norm": _try_norm,
    "activation": _try_activation,
    "rotation": _try_rotation,
    "product": _try_product,
}
