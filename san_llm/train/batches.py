"""Which rows make a batch: rows of like length together, in an order that a seed says."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from torch.utils.data import Sampler

from san_llm.data.rows import Row
from san_llm.data.tokenized import Rows
from san_llm.recipe.schema import Recipe


def batch_names(recipe: Recipe, step: int, data: Rows, named: Callable[[], list[Row]]) -> str:
    """Return file and row of each example in the batch of a step."""
    training = recipe.training
    sampler = GroupedByLength(
        data.lengths, training.batch_size, training.seed, step=lambda: step - 1, last=lambda: step
    )
    rows = named()
    files: dict[str, list[str]] = {}
    for file, _, place in (
        rows[index].where.rpartition(": ") for index in sorted(sampler.batch(step))
    ):
        files.setdefault(file, []).append(place)
    return ", ".join(f"{file}: {', '.join(places)}" for file, places in files.items())


class GroupedByLength(Sampler[int]):
    """Shuffled rows in global batches of like length; the same on any number of processes.

    Every epoch is filled up to whole batches with the filler row (index ``len(lengths)``).
    """

    WINDOW = 50  # global batches sorted together: enough for like lengths, few enough to shuffle

    def __init__(
        self,
        lengths: list[int],
        batch_size: int,
        seed: int,
        step: Callable[[], int],
        last: Callable[[], int],
    ) -> None:
        """Group rows of these token counts into batches of ``batch_size``.

        ``step`` gives the optimizer steps done, and ``last`` how many there will be. The epoch
        follows from ``step`` alone: Trainer's ``set_epoch`` does not reach a sampler that resumes
        in several processes. After the last step there are no rows: Trainer, resumed there, would
        train one step more.
        """
        self._lengths, self._batch_size, self._seed = lengths, batch_size, seed
        self._step, self._last = step, last
        self._shuffled: tuple[int, list[list[int]]] = (-1, [])

    def __len__(self) -> int:
        """Return the rows of an epoch, fillers included."""
        return -(-len(self._lengths) // self._batch_size) * self._batch_size

    def __iter__(self) -> Iterator[int]:
        """Iterate over row numbers."""
        if self._step() >= self._last():
            return
        for batch in self._batches(self._step() // (len(self) // self._batch_size)):
            yield from batch
            yield from [len(self._lengths)] * (self._batch_size - len(batch))

    def batch(self, step: int) -> list[int]:
        """Return the rows of an optimizer step, counted from 1, without fillers."""
        epoch, number = divmod(step - 1, len(self) // self._batch_size)
        return self._batches(epoch)[number]

    def _batches(self, epoch: int) -> list[list[int]]:
        if self._shuffled[0] == epoch:
            return self._shuffled[1]
        dice = random.Random(f"{self._seed} {epoch}")
        rows = list(range(len(self._lengths)))
        dice.shuffle(rows)
        window = self.WINDOW * self._batch_size
        batches = []
        for start in range(0, len(rows), window):
            near = sorted(rows[start : start + window], key=lambda row: -self._lengths[row])
            batches += [
                near[i : i + self._batch_size] for i in range(0, len(near), self._batch_size)
            ]
        dice.shuffle(batches)
        self._shuffled = (epoch, batches)
        return batches
