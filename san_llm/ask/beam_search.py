"""Beam search over packed sequences, with the texts of transformers' own.

Each step is one forward: of the last token of every beam of the prompts at work, and of whole
prompts that join. The beams of a prompt are a tree: its prompt is there once, and a beam is a list
of the places of its tokens. Hypotheses are kept as ``GenerationMixin._beam_search`` (transformers
5.23) keeps them, with a length penalty of 1 and ``early_stopping=False``.

Two things end sooner than there, and change no text. A beam leaves when it cannot win: its score,
the sum of log-probabilities, can only fall, and a hypothesis counts by its score over its length;
so ``score / new_tokens`` bounds all that can come of it. A beam whose bound is below the best
finished hypothesis is dead. Every candidate that comes of it scores less than every one that can
still win, and takes no place from it. And a prompt is done when no beam is left.

transformers ends a prompt, too, when it has as many finished hypotheses as beams and the best
running score over the current length is not above the worst of them. A hypothesis of a dead beam
cannot bring that about while another beam lives: it scores less than the living beam and is no
longer, so that its score over its length is the lower one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from san_llm.ask.packed import Prefix, packed_forward, packing, shared_prefix
from san_llm.ops.attention import added, attention
from san_llm.ops.causal import Segments, last_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


JOINING_TOKENS = 1024  # prompts join a step until they have that many
CHUNK = 256  # of the vocabulary, searched only if its largest number is among the largest

Answer = Callable[[int, list[int]], str | None]


@dataclass
class Beam:
    """A running hypothesis.

    Attributes:
        tokens: What was generated.
        score: The sum of their log-probabilities.
        columns: Where their keys and values are; the last one's are not computed yet.
        answer: What is read from the tokens, where that is asked for.
    """

    tokens: list[int]
    score: float
    columns: list[int]
    answer: str | None = None


@dataclass
class Search:
    """The search for one prompt's continuation.

    Attributes:
        number: The prompt's number.
        prompt: The prompt's tokens.
        beams: The hypotheses that still run, best first.
        finished: ``(score / length, tokens, answer)``, best first, as many as beams at most.
    """

    number: int
    prompt: list[int]
    beams: list[Beam] = field(default_factory=list)
    finished: list[tuple[float, list[int], str | None]] = field(default_factory=list)


@dataclass(frozen=True)
class BeamSearch:
    """How to search.

    Attributes:
        beams: Running hypotheses a prompt.
        new_tokens: Generated at most.
        ends: Tokens that end a hypothesis.
        answer: Reads the answer of a prompt from generated tokens, None while there is none. It
            must not change when more tokens follow. With it a prompt is done when every hypothesis
            that can still win has the same answer; its text may then be cut short.
    """

    beams: int
    new_tokens: int
    ends: Collection[int]
    answer: Answer | None = None

    @property
    def candidates(self) -> int:
        """How many continuations a step looks at, so that enough remain when some end."""
        return max(2, 1 + len(self.ends)) * self.beams

    def advance(self, search: Search, candidates: list[tuple[float, Beam, int]]) -> None:
        """Take a step with ``(score, beam, token)``, best first."""
        running: list[Beam] = []
        length = len(search.beams[0].tokens) + 1
        for rank, (score, beam, token) in enumerate(candidates[: self.candidates]):
            if token in self.ends or length == self.new_tokens:
                if rank < self.beams:
                    tokens = [*beam.tokens, token]
                    answer = beam.answer or self._read(search, tokens)
                    search.finished.append((score / length, tokens, answer))
            elif len(running) < self.beams:
                running.append(Beam([*beam.tokens, token], score, beam.columns, beam.answer))
        search.finished.sort(key=lambda hypothesis: -hypothesis[0])  # stable: the earlier first
        del search.finished[self.beams :]
        search.beams = running
        if not search.finished or not running:
            return
        if (
            len(search.finished) == self.beams
            and running[0].score / length <= search.finished[-1][0]
        ):
            search.beams = []
            return
        best = search.finished[0][0]
        search.beams = [beam for beam in running if beam.score / self.new_tokens >= best]

    def result(self, search: Search) -> list[int] | None:
        """Return the tokens that a search comes to, or None while it has to go on."""
        if not search.beams:
            return search.finished[0][1]
        if self.answer is None:
            return None
        for beam in search.beams:
            beam.answer = beam.answer or self._read(search, beam.tokens)
        answers = {beam.answer for beam in search.beams}
        answers |= {answer for _, _, answer in search.finished[:1]}
        if len(answers) > 1 or None in answers:
            return None
        return search.finished[0][1] if search.finished else search.beams[0].tokens

    def _read(self, search: Search, tokens: list[int]) -> str | None:
        return None if self.answer is None else self.answer(search.number, tokens)

    def run(
        self,
        model: PreTrainedModel,
        prompts: Sequence[tuple[int, list[int]]],
        at_once: int,
    ) -> Iterator[list[tuple[int, list[int]]]]:
        """Give the continuation of every prompt as it is found.

        Args:
            model: One that can be packed.
            prompts: ``(number, tokens)`` in the order in which they begin.
            at_once: How many are worked at; a prompt joins when one is done. With 1 nothing is
                shared, and no number depends on what other prompts there are.

        Yields:
            ``(number, new tokens)`` of the prompts that a step has finished.
        """
        waiting = [Search(number, tokens) for number, tokens in reversed(prompts)]
        longest = max(len(search.prompt) for search in waiting)
        with packing(model):
            prefix = shared_prefix(model, [tokens for _, tokens in prompts] if at_once > 1 else [])
            columns = longest + self.beams * self.new_tokens
            memory = Memory(min(at_once, len(prompts)), columns, prefix)
            while waiting or memory.searches:
                self._step(model, memory, prefix, waiting, at_once - len(memory.searches))
                ended = []
                for slot in reversed(range(len(memory.searches))):
                    result = self.result(memory.searches[slot])
                    if result is not None:
                        ended.append((memory.searches[slot].number, result))
                        memory.leave(slot)
                if ended:
                    yield ended[::-1]

    def _step(
        self,
        model: PreTrainedModel,
        memory: Memory,
        prefix: Prefix,
        waiting: list[Search],
        room: int,
    ) -> None:
        tokens, positions = memory.continue_beams()
        wanted, joined = list(range(len(tokens))), 0
        while waiting and room and joined < JOINING_TOKENS:
            search = waiting.pop()
            memory.join(search, len(tokens))
            search.beams = [Beam([], 0.0, [])]
            tokens += search.prompt[prefix.length :]
            positions += range(prefix.length, len(search.prompt))
            wanted.append(len(tokens) - 1)
            joined += len(search.prompt) - prefix.length
            room -= 1
        logprobs = packed_forward(model, tokens, positions, wanted, memory)
        scores = [beam.score for search in memory.searches for beam in search.beams]
        values, ids = largest(logprobs, min(self.candidates, logprobs.shape[1]))
        totals = (values + torch.tensor(scores, device=values.device)[:, None]).tolist()
        words = ids.tolist()
        row = 0
        for search in memory.searches:
            candidates: list[tuple[float, Beam, int]] = []
            for beam in search.beams:
                candidates += zip(totals[row], repeat(beam), words[row], strict=False)
                row += 1
            candidates.sort(key=lambda candidate: -candidate[0])
            self.advance(search, candidates)


class Memory:
    """Keys and values of the prompts at work and of their beams, and what each token attends to.

    A block's are (slots, kv_heads, columns, head_dim). A slot is one prompt; its columns are the
    prompt's tokens and then those of its beams, in no order. The slots in use are the first ones.
    """

    def __init__(self, slots: int, columns: int, prefix: Prefix) -> None:
        """Make room, taken when the first keys come."""
        self.searches: list[Search] = []
        self._slots, self._columns, self._prefix = slots, columns, prefix
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        # The next forward: slot, place and column of each beam's token, what it sees, who joins.
        self._at = torch.empty(3, 0, dtype=torch.long)
        self._seen = torch.empty(0)
        self._joining: list[tuple[int, int, Segments]] = []  # slot, first token, what it sees

    def continue_beams(self) -> tuple[list[int], list[int]]:
        """Plan a forward with the last token of each beam; return these and their positions."""
        self._joining = []
        tokens, positions, slots, places, columns = [], [], [], [], []
        ancestors: list[tuple[int, int, int]] = []
        for slot, search in enumerate(self.searches):
            start = len(search.prompt)
            used = {column for beam in search.beams for column in beam.columns}
            free = (column for column in range(start, self._columns) if column not in used)
            for place, beam in enumerate(search.beams):
                beam.columns = [*beam.columns, next(free)]
                tokens.append(beam.tokens[-1])
                positions.append(start + len(beam.tokens) - 1)
                slots.append(slot)
                places.append(place)
                columns.append(beam.columns[-1])
                ancestors += [(slot, place, column) for column in beam.columns]
        if tokens:
            lengths = torch.tensor([len(search.prompt) for search in self.searches])
            width = max(int(lengths.max()), *(column + 1 for _, _, column in ancestors))
            seen = torch.arange(width) < lengths[:, None, None]  # (slots in use, 1, width)
            seen = seen.repeat(1, max(places) + 1, 1)
            seen[tuple(torch.tensor(ancestors).T)] = True
            self._seen = seen
        self._at = torch.tensor([slots, places, columns], dtype=torch.long)
        return tokens, positions

    def join(self, search: Search, first: int) -> None:
        """Let a prompt join the planned forward, its tokens after the prefix from ``first`` on."""
        length = len(search.prompt)
        seen = Segments.of_last(length - self._prefix.length, length)
        self._joining.append((len(self.searches), first, seen))
        self.searches.append(search)

    def leave(self, slot: int) -> None:
        """Free a slot; the last one in use moves there."""
        last = self.searches.pop()
        if slot == len(self.searches):
            return
        self.searches[slot] = last
        width = max([len(last.prompt), *(column + 1 for b in last.beams for column in b.columns)])
        for tensor in (*self._keys, *self._values):
            tensor[slot, :, :width] = tensor[len(self.searches), :, :width]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Keep the new keys and values and attend; see :class:`san_llm.ask.packed.Past`."""
        if layer == len(self._keys):
            room = (self._slots, key.shape[1], self._columns, key.shape[2])
            # Zeros, since what is not seen is multiplied by 0, and what lay in memory may be NaN.
            self._keys.append(key.new_zeros(room))
            self._values.append(value.new_zeros(room))
        groups = query.shape[1] // key.shape[1]
        if layer == 0 and self._at.numel():
            self._seen = added(self._seen.to(query.device), query.dtype, groups)
        keys, values = self._keys[layer], self._values[layer]
        out = torch.empty_like(query)
        slot, place, column = self._at.to(query.device)
        beams = len(slot)
        if beams:
            keys[slot, :, column] = key[:beams]
            values[slot, :, column] = value[:beams]
            used, _, most, width = self._seen.shape
            padded = query.new_zeros(used, most // groups, *query.shape[1:])
            padded[slot, place] = query[:beams]
            past = keys[:used, :, :width], values[:used, :, :width]
            out[:beams] = attention(padded, *past, self._seen, scale)[slot, place]
        start = self._prefix.length
        for number, first, seen in self._joining:
            (row,) = seen.rows
            new = slice(first, first + row.queries)
            if start:
                keys[number, :, :start] = self._prefix.keys[layer]
                values[number, :, :start] = self._prefix.values[layer]
            keys[number, :, start : row.stop] = key[new].transpose(0, 1)
            values[number, :, start : row.stop] = value[new].transpose(0, 1)
            k, v = (tensor[number, :, : row.stop].transpose(0, 1) for tensor in (keys, values))
            out[new] = last_of(query[new], k, v, seen, row, scale)
        return out


def largest(numbers: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest numbers of each row and their places, as ``topk`` does, faster."""
    rows, width = numbers.shape
    chunks = width // CHUNK
    if chunks < 4 * count:
        return numbers.topk(count)
    # The largest numbers are in the chunks with the largest maxima, or in the rest.
    whole = numbers[:, : chunks * CHUNK].view(rows, chunks, CHUNK)
    chosen = whole.amax(-1).topk(count).indices  # (rows, count)
    places = (chosen[..., None] * CHUNK + torch.arange(CHUNK, device=numbers.device)).flatten(1)
    rest = torch.arange(chunks * CHUNK, width, device=numbers.device).expand(rows, -1)
    places = torch.cat([places, rest], 1)
    values, where = numbers.gather(1, places).topk(count)
    return values, places.gather(1, where)
