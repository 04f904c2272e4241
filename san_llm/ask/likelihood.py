"""How likely a model finds each choice after a prompt, as lm-evaluation-harness defines it.

A choice's score is the sum of its tokens' log-probabilities. ``acc`` takes the choice with the
highest score, ``acc_norm`` the one with the highest score a character. Where a choice's tokens
begin is decided as ``lm_eval``'s ``HFLM`` does (version 0.4.13, ``_encode_pair``): white space at
the prompt's end belongs to the choice, and the choice is what the tokens of both have after as many
tokens as the prompt has alone.

A prompt is computed once, its choices are branches of it, and what choices begin with in common is
one branch. Questions are packed into one forward, and what all prompts begin with is computed once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from san_llm.ask.packed import Prefix, can_pack, packed_forward, packing, shared_prefix
from san_llm.data.encode import prompt_tokens
from san_llm.errors import InputError
from san_llm.measure.behaviour import taken
from san_llm.ops.attention import added, attention
from san_llm.ops.causal import Segments, last_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


FORWARD_TOKENS = 2048  # of the questions in a forward, unless one alone has more

Encoded = tuple[list[int], list[list[int]]]  # a prompt's tokens, and those of each choice


@dataclass(frozen=True)
class ChoiceQuestion:
    """A prompt, and the texts that may follow it directly; a space between is the choice's."""

    prompt: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class ChoiceScore:
    """How likely a choice is.

    Attributes:
        logprob: The sum of its tokens' log-probabilities.
        greedy: Whether each of its tokens is the most likely one.
        length: Its characters, by which ``acc_norm`` divides.
    """

    logprob: float
    greedy: bool
    length: int


def score_choices(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[ChoiceQuestion],
) -> Iterator[list[ChoiceScore]]:
    """Give the scores of every question's choices.

    Args:
        model: A causal LM, in eval mode.
        tokenizer: The model's tokenizer.
        questions: What is asked.

    Yields:
        The scores of each question's choices, in their order; question by question.

    Raises:
        InputError: when a choice has no tokens, or does not fit into the model's context.
    """
    encoded = [encode_question(question, tokenizer) for question in questions]
    _check_lengths(model, questions, encoded)
    longest = max((len(p) + max(map(len, c), default=0) for p, c in encoded), default=0)
    packs = can_pack(model, longest)
    with packing(model) if packs else torch.inference_mode():
        scored = _packed(model, encoded) if packs else _plain(model, encoded)
        for question, scores in zip(questions, scored, strict=True):
            yield [
                ChoiceScore(logprob, greedy, len(text))
                for text, (logprob, greedy) in zip(question.choices, scores, strict=True)
            ]


def encode_question(question: ChoiceQuestion, tokenizer: PreTrainedTokenizerFast) -> Encoded:
    """Return the tokens of the prompt, and of each choice after it.

    Raises:
        InputError: when there is nothing to begin with: no prompt, and no start token.
    """
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def encode(text: str, bare: bool = False) -> list[int]:
        # A chat template writes the start token itself.
        if bare or (start is not None and text.startswith(str(tokenizer.decode(start)))):
            return list(tokenizer.encode(text, add_special_tokens=False))
        return prompt_tokens(tokenizer, text)

    prompt = question.prompt.rstrip()
    if not prompt:
        # Something must come before the first token: the start token does.
        if start is None:
            raise InputError("a prompt is empty, and the tokenizer has no start or end token")
        alone = [encode(question.prompt + choice, bare=True) for choice in question.choices]
        return [start], [tokens[1:] if tokens[:1] == [start] else tokens for tokens in alone]
    before = encode(prompt)
    space = question.prompt[len(prompt) :]
    return before, [encode(prompt + space + choice)[len(before) :] for choice in question.choices]


def _check_lengths(
    model: PreTrainedModel,
    questions: Sequence[ChoiceQuestion],
    encoded: Sequence[Encoded],
) -> None:
    context = getattr(model.config, "max_position_embeddings", None)
    for number, (prompt, choices) in enumerate(encoded):
        for text, choice in zip(questions[number].choices, choices, strict=True):
            if not choice:
                raise InputError(f"question {number}: the choice {text!r} has no tokens")
            if context is not None and len(prompt) + len(choice) > context:
                raise InputError(
                    f"question {number}: with the choice {text!r} it has "
                    f"{len(prompt) + len(choice):,} tokens, more than the model's context of "
                    f"{context:,}"
                )


def _plain(
    model: PreTrainedModel, encoded: Sequence[Encoded]
) -> Iterator[list[tuple[float, bool]]]:
    """Give the scores by a forward for each choice, where a model cannot be packed."""
    for prompt, choices in encoded:
        scores = []
        for choice in choices:
            tokens = torch.tensor([prompt + choice[:-1]], device=model.device)
            keep = taken(model, logits_to_keep=len(choice))
            logits = model(input_ids=tokens, **keep).logits[0, -len(choice) :]
            logprobs, rows = logits.float().log_softmax(-1), torch.arange(len(choice))
            scores.append(_score(logprobs, logprobs.argmax(-1), rows, choice))
        yield scores


def _score(logprobs: Tensor, likely: Tensor, rows: Tensor, choice: list[int]) -> tuple[float, bool]:
    """Return a choice's log-probability, and whether it is what is likely.

    Args:
        logprobs: (n, vocabulary).
        likely: The most likely token of each row, (n,).
        rows: Which row predicts each of the choice's tokens.
        choice: The choice's tokens.
    """
    rows, tokens = rows.to(logprobs.device), torch.tensor(choice, device=logprobs.device)
    return logprobs[rows, tokens].sum().item(), bool((likely[rows] == tokens).all())


def _packed(
    model: PreTrainedModel, encoded: Sequence[Encoded]
) -> Iterator[list[tuple[float, bool]]]:
    """Give the scores with many questions in a forward."""
    prefix = shared_prefix(model, [prompt for prompt, _ in encoded])
    waiting = deque(Tree(prompt[prefix.length :], choices) for prompt, choices in encoded)
    while waiting:
        trees: list[Tree] = []
        tokens = 0
        while waiting and (not trees or tokens + len(waiting[0].tokens) <= FORWARD_TOKENS):
            trees.append(waiting.popleft())
            tokens += len(trees[-1].tokens)
        starts = [0, *accumulate(len(tree.tokens) for tree in trees)]
        logprobs = packed_forward(
            model,
            [token for tree in trees for token in tree.tokens],
            [prefix.length + depth for tree in trees for depth in tree.depths],
            [start + i for start, tree in zip(starts, trees, strict=False) for i in tree.wanted],
            Branches(prefix, trees),
        )
        likely, row = logprobs.argmax(-1), 0
        for tree in trees:
            paths = [(torch.tensor(nodes) + row, choice) for nodes, choice in tree.paths]
            yield [_score(logprobs, likely, *path) for path in paths]
            row += len(tree.wanted)


class Tree:
    """The tokens of a question: its prompt's, then those of its choices, each shared one once.

    A choice's last token is predicted, but nothing comes after it, so that it is not there.

    Attributes:
        tokens: The tokens of all nodes, parents first.
        depths: Each node's depth, from 0: the positions.
        parents: The parent of each node that is a choice's.
        wanted: The nodes that predict a token of a choice.
        paths: For each choice where in ``wanted`` its tokens are predicted, and its tokens.
    """

    def __init__(self, prompt: list[int], choices: Sequence[list[int]]) -> None:
        """Branch after the prompt (one token at least)."""
        self.tokens = list(prompt)
        self.depths = list(range(len(prompt)))
        self.parents: list[int] = []
        last = len(prompt) - 1
        self.wanted = [last]
        self.paths: list[tuple[list[int], list[int]]] = []
        children: dict[tuple[int, int], int] = {}
        for choice in choices:
            node, path = last, [0]
            for token in choice[:-1]:
                if (node, token) not in children:
                    children[node, token] = len(self.tokens)
                    self.wanted.append(len(self.tokens))
                    self.parents.append(node)
                    self.depths.append(self.depths[node] + 1)
                    self.tokens.append(token)
                node = children[node, token]
                path.append(node - last)
            self.paths.append((path, choice))

    def seen(self, before: int) -> Tensor:
        """Return what choices see, (their nodes, before + nodes): all before, ancestors, itself."""
        nodes, prompt = len(self.tokens), len(self.tokens) - len(self.parents)
        seen = torch.zeros(len(self.parents), before + nodes, dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent < prompt:
                seen[node, : before + prompt] = True
            else:
                seen[node] = seen[parent - prompt]
            seen[node, before + prompt + node] = True
        return seen


class Branches:
    """The past of packed trees: each has the prefix before it and its own tokens."""

    def __init__(self, prefix: Prefix, trees: Sequence[Tree]) -> None:
        """Take the trees in the order of their tokens."""
        self._prefix, self._trees = prefix, trees
        lengths = [len(tree.tokens) - len(tree.parents) for tree in trees]
        self._prompts = [Segments.of_last(n, prefix.length + n) for n in lengths]
        self._seen: list[Tensor] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attend within each tree; see :class:`san_llm.ask.packed.Past`."""
        prefix = self._prefix
        if not self._seen:
            groups = query.shape[1] // key.shape[1]
            self._seen = [
                added(tree.seen(prefix.length).to(query.device), query.dtype, groups)
                for tree in self._trees
            ]
        out, start = torch.empty_like(query), 0
        for tree, prompt, seen in zip(self._trees, self._prompts, self._seen, strict=True):
            own = slice(start, start + len(tree.tokens))
            keys, values = key[own].transpose(0, 1), value[own].transpose(0, 1)
            if prefix.length:
                keys = torch.cat([prefix.keys[layer], keys], 1)
                values = torch.cat([prefix.values[layer], values], 1)
            (row,) = prompt.rows
            asked = slice(start, start + row.queries)
            k, v = (tensor[:, : row.stop].transpose(0, 1) for tensor in (keys, values))
            out[asked] = last_of(query[asked], k, v, prompt, row, scale)
            chosen = slice(asked.stop, own.stop)
            if tree.parents:
                out[chosen] = attention(query[None, chosen], keys[None], values[None], seen, scale)[
                    0
                ]
            start = own.stop
        return out
