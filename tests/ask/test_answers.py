"""Generation: the packed beam search against plain ``generate``, batches, order, memory."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from san.adapted import adapt
from tiny import CHARACTERS, save_tiny, tiny_config, tiny_model, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from san_llm.ask.answers import answers as answered
from san_llm.ask.answers import end_tokens, fitting_batch_size
from san_llm.data.encode import evaluation_text
from san_llm.data.sources import POCKET
from san_llm.data.task_rows import read_task
from san_llm.models.load import load_base
from san_llm.models.locate import find_base
from san_llm.protocol.tasks import TASKS
from san_llm.recipe.schema import Base

TOKENIZER = tiny_tokenizer()
VOCABULARY = len(CHARACTERS) + 4
LETTERS = range(4, VOCABULARY)


def confident(model):
    """Sharpen a model's likelihoods, so that beams part and none ends in a tie."""
    model.lm_head.weight.data.mul_(4)
    return model


def in_all(batches):
    """Return every answered text by its prompt's number."""
    return {number: text for batch in batches for number, text in batch}


def answers(model, prompts, batch_size=None, tokenizer=TOKENIZER):
    """Return the text for each prompt, in the prompts' order."""
    found = in_all(answered(model, tokenizer, prompts, batch_size))
    assert sorted(found) == list(range(len(prompts)))
    return [found[number] for number in range(len(prompts))]


def alone(model, prompts, tokenizer=TOKENIZER, **more):
    """Return the text that stock ``generate`` gives each prompt on its own, unpadded."""
    texts = []
    for prompt in prompts:
        tokens = torch.tensor([prompt], device=model.device)
        out = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            num_beams=4,
            max_new_tokens=32,
            pad_token_id=2,
            **more,
        )
        texts.append(tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True))
    return texts


def random_prompts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def models():
    return [confident(tiny_model(seed)) for seed in range(3)]


@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=5),
    seed=st.integers(0, 2),
    batch_size=st.integers(1, 5),
)
@settings(deadline=None, max_examples=15)
def test_each_prompt_is_answered_as_plain_generate_answers_it_alone(
    models, lengths, seed, batch_size
):
    prompts = random_prompts(lengths, seed=sum(lengths))
    assert answers(models[seed], prompts, batch_size) == alone(models[seed], prompts)


@given(st.permutations(range(7)), st.sampled_from([1, 2, 5, 7]))
@settings(deadline=None, max_examples=10)
def test_answers_depend_on_neither_the_order_nor_the_batch(models, order, batch_size):
    prompts = random_prompts([1, 1, 3, 8, 8, 21, 40])
    expected = answers(models[0], prompts, 3)
    found = answers(models[0], [prompts[i] for i in order], batch_size)
    assert found == [expected[i] for i in order]
    assert len(set(expected)) > 1, "the model answers different prompts differently"


def test_every_end_token_of_the_models_own_ends_an_answer(models):
    prompts = random_prompts([2, 5, 9, 14])
    without = alone(models[1], prompts)
    # End where the answers pass: at tokens that occur in them.
    ends = sorted({TOKENIZER.convert_tokens_to_ids(text[4]) for text in without if len(text) > 4})
    model = confident(tiny_model(1))
    model.generation_config = GenerationConfig(eos_token_id=[1, *ends], pad_token_id=2)
    expected = alone(model, prompts)
    assert expected != without
    assert answers(model, prompts, 3) == expected


def test_the_tokenizers_end_token_ends_an_answer_of_a_model_that_names_another(models):
    prompts = random_prompts([2, 5, 9])
    model = confident(tiny_model(2))
    model.lm_head.weight.data[1] = 3 * model.lm_head.weight.data[50]  # ends often
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=2)
    assert answers(model, prompts, 2) == alone(model, prompts, eos_token_id=[0, 1])


def test_a_conversation_ends_as_its_template_ends_a_turn(models):
    """Of a base whose end of text is another token, as Qwen 2.5's: a turn's end is none of its."""
    model = models[0] if isinstance(models, (list, tuple)) else models
    chats = tiny_tokenizer()
    chats.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    chats.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
    turn = chats.convert_tokens_to_ids("<|end|>")
    assert turn not in end_tokens(model, chats, chat=False)
    assert turn in end_tokens(model, chats, chat=True)
    assert end_tokens(model, tiny_tokenizer(), chat=True) == (
        end_tokens(model, tiny_tokenizer(), chat=False)
    )


@pytest.mark.parametrize(
    "habit",
    [
        {"do_sample": True, "temperature": 5.0, "top_p": 0.9},
        {"repetition_penalty": 4.0},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 31},
        {"length_penalty": -9.0},
        {"suppress_tokens": list(range(4, 60))},
        {"max_length": 3},
        {"num_return_sequences": 2, "num_beams": 2},
        {"use_cache": False},
    ],
    ids=lambda habit: next(iter(habit)),
)
def test_a_models_own_generation_settings_change_no_answer(models, habit):
    prompts = random_prompts([2, 9, 14])
    model = confident(tiny_model(0))
    model.generation_config = kept = GenerationConfig(eos_token_id=1, pad_token_id=2, **habit)
    before = kept.to_dict()
    assert answers(model, prompts) == answers(models[0], prompts)
    assert model.generation_config is kept
    assert kept.to_dict() == before


def test_the_settings_come_back_after_a_failure():
    class Failing(LlamaForCausalLM):
        def forward(self, *arguments, **named):
            raise RuntimeError("no")

    model = Failing(tiny_model().config)
    kept = model.generation_config
    with pytest.raises(RuntimeError, match="no"):
        answers(model, random_prompts([3]))
    assert model.generation_config is kept


def test_an_adapted_model_answers_as_its_dense_form_does():
    model = adapt(tiny_model(3), mode="both")
    prompts = random_prompts([1, 4, 11])
    found = answers(model, prompts, 3)
    assert found != answers(tiny_model(3), prompts, 3)
    assert found == alone(model.merge_and_unload(), prompts)


def test_lora_answers_do_not_depend_on_the_batch():
    from peft import LoraConfig

    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_model(0), lora).eval()
    prompts = random_prompts([2, 7, 30])
    assert answers(model, prompts, 1) == answers(model, prompts, 3)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_an_adapter_on_a_quantized_base_is_answered_as_plain_generate_answers_it(
    quantization, tmp_path
):
    save_tiny(tmp_path, hidden_size=64, intermediate_size=64)
    model = adapt(
        load_base(find_base(Base(model=str(tmp_path), dtype="float32", quantization=quantization)))
    )
    prompts = random_prompts([1, 4, 11])
    assert answers(model.eval(), prompts, 1) == alone(model, prompts)


def test_a_sliding_window_shorter_than_the_prompts_is_kept():
    torch.manual_seed(0)
    config = MistralConfig(
        **tiny_config(initializer_range=0.2).to_dict() | {"model_type": "mistral"},
        sliding_window=6,
    )
    model = confident(MistralForCausalLM(config).eval())
    prompts = random_prompts([1, 3, 6, 7, 20])
    expected = alone(model, prompts)
    assert answers(model, prompts, 1) == expected
    assert answers(model, prompts, 5) == expected


def test_bfloat16_answers_do_not_depend_on_the_batch():
    model = confident(tiny_model(4)).to(torch.bfloat16)
    prompts = random_prompts([5, 5, 5])
    assert answers(model, prompts, 3) == answers(model, prompts, 1)


def test_answers_only_gives_the_same_answers_and_may_say_less(models):
    prompts = random_prompts([3, 9, 14, 20])
    whole = answers(models[0], prompts)
    letters = sorted({text[5] for text in whole})

    def first_match(number, text):
        assert prompts[number]
        return next((letter for letter in text if letter in letters), None)

    found = in_all(answered(models[0], TOKENIZER, prompts, None, first_match))
    for number, text in enumerate(whole):
        assert first_match(number, found[number]) == first_match(number, text) is not None
    assert sum(map(len, found.values())) < sum(map(len, whole))


def test_no_prompts_are_no_work(models):
    assert list(answered(models[0], TOKENIZER, [], None)) == []


def test_every_answer_is_told_once_and_with_one_at_a_time_the_longest_prompts_come_first(models):
    prompts = random_prompts([3, 9, 1, 9, 4])
    told = list(answered(models[0], TOKENIZER, prompts, 1))
    assert [[number for number, _ in batch] for batch in told] == [[1], [3], [4], [0], [2]]
    told = list(answered(models[0], TOKENIZER, prompts, 3))
    assert sorted(number for batch in told for number, _ in batch) == [0, 1, 2, 3, 4]


def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_answered_twice_or_lost(models):
    def refuse(_model, _arguments, named):  # a device that holds the two longest prompts
        if named["input_ids"].numel() > 11 + 10:
            raise torch.OutOfMemoryError("out of memory")

    small = confident(tiny_model(0))
    small.register_forward_pre_hook(refuse, with_kwargs=True)
    prompts = random_prompts(range(1, 12))
    told = list(answered(small, TOKENIZER, prompts, None))
    # 32, 16, 8, 4 and 2 as the size: with 2, one prompt after another joins.
    assert sorted(number for batch in told for number, _ in batch) == list(range(11))
    found = in_all(told)
    assert [found[n] for n in range(11)] == answers(models[0], prompts)
    with pytest.raises(torch.OutOfMemoryError):
        answers(small, prompts, 4)  # asked for: not changed behind the user's back


def test_a_single_prompt_that_does_not_fit_is_an_error():
    class Full(LlamaForCausalLM):
        def forward(self, *arguments, **named):
            raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        answers(Full(tiny_model().config).eval(), random_prompts([3, 3]))


LLAMA_8B = SimpleNamespace(
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    hidden_size=4096,
    num_hidden_layers=32,
    vocab_size=128256,
)


@pytest.mark.parametrize("free", [1e9, 4e9, 2e10, 8e10])
def test_the_batch_size_is_what_fits_twice_into_free_memory(free):
    # Per token: keys and values (2) of 32 blocks of 8 x 128 numbers in 4 bytes.
    token = 2 * 32 * 8 * 128 * 4
    prompt = (300 + 4 * 32) * token + 4 * 8 * 128256 * 4
    expected = min(32, max(1, int(free / 2 / prompt)))
    assert fitting_batch_size(LLAMA_8B, 300, int(free)) == expected


def test_the_batch_size_is_between_1_and_32_and_shrinks_with_length():
    assert fitting_batch_size(LLAMA_8B, 300, 0) == 1
    assert fitting_batch_size(LLAMA_8B, 300, 10**15) == 32
    sizes = [fitting_batch_size(LLAMA_8B, length, 4 * 10**10) for length in (10, 100, 1000, 9000)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]
    bare = SimpleNamespace(
        num_attention_heads=4, hidden_size=32, num_hidden_layers=4, vocab_size=99
    )
    wide = SimpleNamespace(**vars(bare), num_key_value_heads=4, head_dim=8)
    assert fitting_batch_size(bare, 50, 10**7) == fitting_batch_size(wide, 50, 10**7) < 32


@pytest.mark.slow
def test_the_real_model_says_what_transformers_generate_makes_it_say(smollm2):
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    task = TASKS["ARC-Easy"]
    rows = read_task(POCKET / task.name / "test.json", task, 2)
    prompts = [evaluation_text("llm-adapters", row, tokenizer)[1] for row in rows]
    width = max(map(len, prompts))
    padded = [[tokenizer.pad_token_id] * (width - len(row)) + row for row in prompts]
    seen = [[0] * (width - len(row)) + [1] * len(row) for row in prompts]
    out = model.generate(
        input_ids=torch.tensor(padded),
        attention_mask=torch.tensor(seen),
        num_beams=4,
        max_new_tokens=32,
        pad_token_id=tokenizer.pad_token_id,
    )
    expected = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    assert answers(model, prompts, tokenizer=tokenizer) == expected
    assert answers(model, prompts, 1, tokenizer) == expected
    assert len(set(expected)) > 1
