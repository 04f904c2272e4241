"""Packed choice scoring against lm_eval's own HFLM and against one plain forward a choice."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from san.adapted import adapt
from tiny import tiny_config, tiny_model, tiny_tokenizer
from transformers import MistralConfig, MistralForCausalLM

from san_llm.ask.likelihood import ChoiceQuestion, score_choices
from san_llm.errors import InputError

TOKENIZER = tiny_tokenizer()
texts = st.text(alphabet="abcde 1.\n", min_size=1, max_size=9)
questions = st.builds(
    ChoiceQuestion,
    prompt=st.text(alphabet="abcde 1.\n", max_size=30),
    choices=st.lists(texts, min_size=1, max_size=4).map(tuple),
)


@pytest.fixture(scope="module")
def model():
    return tiny_model(0)


def by_hand(model, question):
    """Return ``(logprob, greedy)`` of each choice from a forward of its own; a letter a token."""
    start = [] if question.prompt.strip() else [TOKENIZER.bos_token_id]
    prompt = question.prompt if start else question.prompt.rstrip()
    found = []
    for choice in question.choices:
        whole = TOKENIZER.encode(question.prompt + choice)
        first = len(start) or len(prompt)
        tokens = torch.tensor([start + whole])
        logprobs = model(tokens).logits[0].log_softmax(-1)[first - 1 : -1]
        wanted = tokens[0, first:]
        found.append(
            (
                logprobs.gather(1, wanted[:, None]).sum().item(),
                bool((logprobs.argmax(-1) == wanted).all()),
            )
        )
    return found


@given(st.lists(questions, max_size=5))
@settings(deadline=None, max_examples=40)
def test_a_choice_scores_what_a_forward_of_its_own_gives_it(model, asked):
    with torch.inference_mode():
        expected = [by_hand(model, question) for question in asked]
    found = list(score_choices(model, TOKENIZER, asked))
    assert [[score.greedy for score in scores] for scores in found] == [
        [greedy for _, greedy in scores] for scores in expected
    ]
    for scores, wanted in zip(found, expected, strict=True):
        assert [score.logprob for score in scores] == pytest.approx(
            [logprob for logprob, _ in wanted], abs=2e-4
        )
    assert [[score.length for score in scores] for scores in found] == [
        [len(choice) for choice in question.choices] for question in asked
    ]


def test_scores_are_those_of_lm_eval(model):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    asked = [
        ChoiceQuestion("Which?  ", ("one", "two three", "four")),
        ChoiceQuestion("", ("one", " two")),
        ChoiceQuestion("A longer question\n\n", ("yes", "yes, indeed", "no")),
        ChoiceQuestion("<s>marked: ", ("a", "b")),
    ]
    adapted = adapt(tiny_model(1), mode="both")
    peer = HFLM(pretrained=adapted, tokenizer=TOKENIZER, batch_size=3, device="cpu")
    requests = [
        Instance("loglikelihood", {}, (question.prompt, choice), 0)
        for question in asked
        for choice in question.choices
    ]
    expected = peer.loglikelihood(requests, disable_tqdm=True)
    found = [score for scores in score_choices(adapted, TOKENIZER, asked) for score in scores]
    assert [score.greedy for score in found] == [greedy for _, greedy in expected]
    assert [score.logprob for score in found] == pytest.approx(
        [logprob for logprob, _ in expected], abs=2e-4
    )


@pytest.mark.parametrize("window", [4, 1000])
def test_a_sliding_window_is_kept(window):
    torch.manual_seed(0)
    config = MistralConfig(
        **tiny_config(initializer_range=0.2).to_dict() | {"model_type": "mistral"},
        sliding_window=window,
    )
    model = MistralForCausalLM(config).eval()
    asked = [ChoiceQuestion("abcdefgh", ("ij", "ik", "l")), ChoiceQuestion("abc", ("d",))]
    with torch.inference_mode():
        expected = [by_hand(model, question) for question in asked]
    found = list(score_choices(model, TOKENIZER, asked))
    assert [score.logprob for scores in found for score in scores] == pytest.approx(
        [logprob for scores in expected for logprob, _ in scores], abs=2e-4
    )


def test_scores_depend_on_neither_the_other_questions_nor_the_memory_of_a_forward(model):
    asked = [ChoiceQuestion("same start " + "x" * n, ("one", "on", "two")) for n in range(40)]
    asked.append(ChoiceQuestion("same start " + "y" * 900, ("one",)))
    alone = [next(score_choices(model, TOKENIZER, [question])) for question in asked]
    together = score_choices(model, TOKENIZER, asked)
    for scores, expected in zip(together, alone, strict=True):
        assert [score.logprob for score in scores] == pytest.approx(
            [score.logprob for score in expected], abs=2e-4
        )


def test_a_choice_without_tokens_is_named(model):
    asked = [ChoiceQuestion("a", ("b",)), ChoiceQuestion("a", ("b", ""))]
    with pytest.raises(InputError, match="question 1: the choice '' has no tokens"):
        list(score_choices(model, TOKENIZER, asked))


def test_a_question_longer_than_the_context_is_named(model):
    with pytest.raises(InputError, match=r"question 0: .* 1,026 tokens, .* context of 1,024"):
        list(score_choices(model, TOKENIZER, [ChoiceQuestion("x" * 1024, ("bc",))]))


def test_every_question_is_scored(model):
    told = [0 for _ in score_choices(model, TOKENIZER, [ChoiceQuestion("a", ("b", "c"))] * 5)]
    assert len(told) == 5


def test_a_tokenizer_without_start_and_end_tokens_needs_a_prompt(model):
    bare = tiny_tokenizer()
    bare.bos_token = bare.eos_token = None
    asked = [ChoiceQuestion("ab c", (" d", "e.")), ChoiceQuestion("1.", ("a",))]
    expected = list(score_choices(model, TOKENIZER, asked))
    assert list(score_choices(model, bare, asked)) == expected
    with pytest.raises(InputError, match="a prompt is empty, and the tokenizer has no start or"):
        list(score_choices(model, bare, [ChoiceQuestion("", ("a",))]))
