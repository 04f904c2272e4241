"""The packed beam search against transformers': families, ends, beams, and the early stops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHARACTERS, tiny_config, tiny_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from san_llm.ask.beam_search import BeamSearch, largest
from san_llm.ask.packed import can_pack

VOCABULARY = len(CHARACTERS) + 4


def random_prompts(lengths, seed, start=()):
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(4, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    return [[*start, *prompt] for prompt in prompts]


def found(model, prompts, at_once=3, **how):
    """Return the new tokens of each prompt."""
    steps = BeamSearch(**how).run(model, list(enumerate(prompts)), at_once)
    result = {number: tokens for ended in steps for number, tokens in ended}
    return [result[number] for number in range(len(prompts))]


def stock(model, prompts, beams, new_tokens, ends):
    """Return what transformers generates for each prompt on its own, up to its end token."""
    results = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        out = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            num_beams=beams,
            max_new_tokens=new_tokens,
            eos_token_id=ends or None,
            pad_token_id=2,
            do_sample=False,
        )[0, len(prompt) :].tolist()
        end = next((i for i, token in enumerate(out) if token in ends), len(out) - 1)
        results.append(out[: end + 1])
    return results


@pytest.fixture(scope="module")
def models():
    """Two models: one flat, whose beams live long, and one sharp, whose beams die early."""
    flat, sharp = tiny_model(0), tiny_model(1)
    sharp.lm_head.weight.data.mul_(4)
    return [flat, sharp]


@given(
    which=st.integers(0, 1),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    start=st.sampled_from([(), (5, 6, 7), tuple(range(10, 60))]),
    beams=st.integers(2, 5),
    new_tokens=st.integers(1, 14),
    ends=st.lists(st.integers(1, VOCABULARY - 1), max_size=12, unique=True),
    at_once=st.integers(1, 4),
)
@settings(deadline=None, max_examples=60)
def test_it_finds_what_transformers_finds(
    models, which, lengths, start, beams, new_tokens, ends, at_once
):
    prompts = random_prompts(lengths, sum(lengths), start)
    expected = stock(models[which], prompts, beams, new_tokens, ends)
    how = {"beams": beams, "new_tokens": new_tokens, "ends": ends}
    assert found(models[which], prompts, at_once, **how) == expected


@given(
    which=st.integers(0, 1),
    ends=st.lists(st.integers(1, VOCABULARY - 1), max_size=12, unique=True),
    answers=st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=30, unique=True),
    seed=st.integers(0, 9),
)
@settings(deadline=None, max_examples=40)
def test_where_only_the_answer_is_asked_for_it_is_the_whole_texts(
    models, which, ends, answers, seed
):
    def read(_, tokens):
        return next((str(token) for token in tokens if token in answers), None)

    prompts = random_prompts([3, 9, 4], seed)
    how = {"beams": 4, "new_tokens": 12, "ends": ends}
    whole = found(models[which], prompts, **how)
    short = found(models[which], prompts, **how, answer=read)
    assert [read(0, tokens) for tokens in short] == [read(0, tokens) for tokens in whole]
    assert all(len(a) <= 12 for a in short)


def forwards(model, prompts, **how):
    """Return how many tokens went through the model."""
    counted = []
    hook = model.register_forward_pre_hook(
        lambda _model, _arguments, named: counted.append(named["input_ids"].numel()),
        with_kwargs=True,
    )
    try:
        found(model, prompts, **how)
    finally:
        hook.remove()
    return sum(counted)


def test_a_prompt_is_computed_once_and_what_all_begin_with_once_for_all(models):
    prompts = random_prompts([5, 6, 7], 0, start=range(10, 60))
    how = {"beams": 4, "new_tokens": 1, "ends": []}
    assert forwards(models[0], prompts, **how) == 50 + 5 + 6 + 7
    assert forwards(models[0], prompts, at_once=1, **how) == 55 + 56 + 57


def test_an_answer_that_all_hypotheses_have_ends_the_work(models):
    prompts = random_prompts([5, 5, 5], 0)
    how = {"beams": 4, "new_tokens": 20, "ends": []}
    assert forwards(models[0], prompts, **how) == 15 + 3 * 4 * 19
    assert forwards(models[0], prompts, **how, answer=lambda *_: "yes") == 15


def test_dead_beams_leave(models):
    sharp, prompts = models[1], random_prompts([5] * 6, 3)
    plain = stock(sharp, prompts, 4, 30, [])
    ends = sorted({tokens[2] for tokens in plain})  # so that hypotheses finish early
    how = {"beams": 4, "new_tokens": 30, "ends": ends}
    assert found(sharp, prompts, **how) == stock(sharp, prompts, 4, 30, ends)
    assert forwards(sharp, prompts, **how) < (30 + 6 * 4 * 29) / 2


def family(config, **more):
    torch.manual_seed(0)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "vocab_size", "max_position_embeddings")
    same = {name: getattr(tiny_config(), name) for name in names}
    special = {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}
    built = config(**same | special | {"initializer_range": 0.2} | more)
    return AutoModelForCausalLM.from_config(built).eval()


FAMILIES = {
    "mistral": (MistralConfig, {"sliding_window": None}, True),
    "mistral, a wide window": (MistralConfig, {"sliding_window": 60}, True),
    "mistral, a narrow window": (MistralConfig, {"sliding_window": 10}, False),
    "qwen2": (Qwen2Config, {}, True),
    "qwen3": (Qwen3Config, {"head_dim": 16}, True),
    "gemma": (GemmaConfig, {"head_dim": 16}, True),
    "gemma2, which caps scores": (Gemma2Config, {"head_dim": 16}, False),
    "gemma3": (Gemma3TextConfig, {"head_dim": 16, "sliding_window": 60}, True),
    "phi3": (Phi3Config, {}, True),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_packed_where_every_token_sees_all_before_it(name):
    config, more, packs = FAMILIES[name]
    model = family(config, **more)
    assert can_pack(model, 40) is packs
    if not packs:
        return
    prompts = random_prompts([1, 7, 20], 5, start=(8, 9))
    before = model.config._attn_implementation
    how = {"beams": 4, "new_tokens": 12, "ends": [1, 30, 40, 50]}
    assert found(model, prompts, **how) == stock(model, prompts, 4, 12, [1, 30, 40, 50])
    assert model.config._attn_implementation == before


def test_rows_that_their_length_rotates_otherwise_are_not_packed():
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny_model(rope_parameters=scaling)
    assert can_pack(model, 1024)
    assert not can_pack(model, 1025)


@given(
    rows=st.integers(1, 3), width=st.sampled_from([9, 1023, 1500, 20000]), count=st.integers(1, 9)
)
@settings(deadline=None)
def test_the_largest_numbers_are_those_of_topk(rows, width, count):
    numbers = torch.randn(rows, width, generator=torch.Generator().manual_seed(width + count))
    values, places = largest(numbers, count)
    expected = numbers.topk(count)
    assert torch.equal(values, expected.values)
    assert torch.equal(places, expected.indices)
