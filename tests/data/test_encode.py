"""Tokens and labels: what is learned of a row, what the cutoff does, what the cache keeps."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import rows as boolq_rows
from tiny import tiny_tokenizer
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from san_llm.data.batches import Pad, pad_id
from san_llm.data.encode import IGNORE, Encoding, evaluation_text, label_rows
from san_llm.data.rows import Row, Turn
from san_llm.data.sources import read_rows
from san_llm.data.tokenized import Rows, encode_rows, kept_rows, refuse_longer
from san_llm.errors import InputError, SanError
from san_llm.protocol.prompts import evaluation_prompt, training_prompt

BOS, EOS = 0, 1  # of the tiny tokenizer
ROOT = Path(__file__).resolve().parents[2]
STYLES = ("llm-adapters", "llm-adapters-aligned", "alpaca")
ROW = Row("Is it?", "", "the correct answer is true", "true")
CHAT = Row(
    messages=(
        Turn("system", "Be kind."),
        Turn("user", "Hi"),
        Turn("assistant", "Hello"),
        Turn("user", "Bye"),
        Turn("assistant", "See you"),
    )
)


def one(row, tokenizer, style="alpaca", loss="response", cutoff=1000):
    """Return the tokens and labels of a row."""
    encoded = encode_rows([row], Encoding(tokenizer, style, loss, cutoff))
    return encoded.rows[0]["input_ids"], encoded.rows[0]["labels"]


def learned(labels):
    return [label for label in labels if label != IGNORE]


def runs(tokenizer, labels):
    """Return the text of each unbroken run of learned tokens."""
    texts, run = [], []
    for label in [*labels, IGNORE]:
        if label != IGNORE:
            run.append(label)
        elif run:
            texts.append(tokenizer.decode(run))
            run = []
    return texts


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose words hold the space before them, as those of LLaMA do."""
    text = training_prompt("llm-adapters", ROW.instruction) + ROW.output + " false zzz"
    tokenizer = Tokenizer(models.WordLevel({}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|[\s\S]"), "isolated")
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    words = ["<s>", "</s>", "<unk>", *dict.fromkeys(pieces)]
    tokenizer.model = models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.mark.parametrize("style", STYLES)
def test_exactly_the_response_and_the_end_token_are_learned(tokenizer, style):
    tokens, labels = one(ROW, tokenizer, style)
    prompt = training_prompt(style, ROW.instruction)
    assert tokens == tokenizer(prompt + ROW.output)["input_ids"] + [EOS]
    assert labels == [IGNORE] * len(prompt) + tokens[len(prompt) :]  # one token a character


@settings(deadline=None, max_examples=40)
@given(
    instruction=st.text("ab \n", min_size=1, max_size=8),
    context=st.text("ab \n", max_size=4),
    output=st.text("ab \n", min_size=1, max_size=8),
    style=st.sampled_from(STYLES),
)
def test_any_response_is_learned_character_by_character(instruction, context, output, style):
    tokens, labels = one(Row(instruction, context, output), tiny_tokenizer(), style)
    assert tiny_tokenizer().decode(learned(labels)) == output + "</s>"
    assert len(tokens) == len(training_prompt(style, instruction, context)) + len(output) + 1


def test_a_token_that_holds_the_first_letter_of_the_response_is_learned():
    words = word_tokenizer()
    tokens, labels = one(ROW, words, "llm-adapters")
    assert words.decode(tokens[:-1]) == training_prompt("llm-adapters", "Is it?") + ROW.output
    # The first token is the prompt's last space and the response's first word.
    assert words.decode(learned(labels)) == " the correct answer is true</s>"
    assert labels.index(learned(labels)[0]) == len(labels) - 6


def test_a_loss_on_all_leaves_out_the_first_token_alone(tokenizer):
    tokens, labels = one(ROW, tokenizer, loss="all")
    assert labels == [IGNORE, *tokens[1:]]
    assert tokens[-1] == EOS


def test_the_answer_does_not_change_what_is_learned(tokenizer):
    assert one(replace(ROW, answer="false"), tokenizer) == one(ROW, tokenizer)


def test_a_response_that_ends_in_the_end_token_gets_no_second_one(tokenizer):
    tokens, labels = one(replace(ROW, output="yes</s>"), tokenizer)
    assert tokens.count(EOS) == 1
    assert tokenizer.decode(learned(labels)) == "yes</s>"


@pytest.mark.parametrize("loss", ["response", "all"])
def test_the_cutoff_counts_what_it_cuts_and_drops(tokenizer, loss):
    prompt = len(training_prompt("alpaca", "Is it?"))
    rows = [
        replace(ROW, output="ab"),  # 2 and the end token: fits
        replace(ROW, output="abc"),  # loses its end token alone
        replace(ROW, output="abcdefgh"),  # loses most
        replace(ROW, instruction="Is it??", output="abc"),  # one character less room
        replace(ROW, instruction="Is it????", output="a"),  # no room: its response is cut away
        replace(ROW, instruction="x" * 500),
    ]
    encoded = encode_rows(rows, Encoding(tokenizer, "alpaca", loss, prompt + 3))
    assert (encoded.dropped, encoded.cut) == (2, 3)
    assert [tokenizer.decode(row["input_ids"][-3:]) for row in encoded.rows] == [
        "ab</s>",
        "abc",
        "abc",
        "\nab",
    ]
    if loss == "response":
        assert encoded.supervised == 3 + 3 + 3 + 2
    else:
        assert encoded.supervised == 4 * (prompt + 2)
    assert encoded.supervised == sum(len(learned(row["labels"])) for row in encoded.rows)


def test_a_cutoff_that_leaves_one_token_of_a_response_keeps_the_row(tokenizer):
    prompt = len(training_prompt("alpaca", "Is it?"))
    tokens, labels = one(ROW, tokenizer, cutoff=prompt + 1)
    assert len(tokens) == prompt + 1
    assert tokenizer.decode(learned(labels)) == "t"


@pytest.mark.parametrize("loss", ["response", "all"])
def test_rows_longer_than_the_cutoff_altogether_are_refused_with_their_file(
    tokenizer, tmp_path, loss
):
    path = tmp_path / "long.json"
    path.write_text(json.dumps(boolq_rows(3)))
    with pytest.raises(InputError) as error:
        encode_rows(read_rows(path), Encoding(tokenizer, "alpaca", loss, 20))
    assert str(error.value) == (
        "no tokens to learn: the cutoff of 20 tokens cuts away the response of all 3 rows, "
        f"from {path}: row 1 on; raise data.cutoff"
    )


def test_a_response_of_which_no_token_is_made_is_refused_with_file_and_row(tmp_path):
    deaf = tiny_tokenizer()
    deaf.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    path = tmp_path / "rows.jsonl"
    good = {"instruction": "Is it?", "output": "yes"}
    path.write_text("\n".join(json.dumps(row) for row in (good, good | {"output": "\u200b"})))
    with pytest.raises(InputError, match=r"rows\.jsonl: line 2: .* no tokens of its response"):
        encode_rows(read_rows(path), Encoding(deaf, "alpaca", "all", 1000))


# --- chat ---


def test_every_assistant_turn_is_learned_with_its_end_token(tokenizer):
    tokens, labels = one(CHAT, tokenizer, "chat")
    assert tokenizer.decode(tokens) == (
        "<|system|>Be kind.</s>\n<|user|>Hi</s>\n<|assistant|>Hello</s>\n"
        "<|user|>Bye</s>\n<|assistant|>See you</s>\n"
    )
    assert runs(tokenizer, labels) == ["Hello</s>", "See you</s>"]


def test_a_loss_on_all_of_a_conversation_leaves_out_the_first_token_alone(tokenizer):
    tokens, labels = one(CHAT, tokenizer, "chat", loss="all")
    assert labels == [IGNORE, *tokens[1:]]


def test_what_follows_the_last_response_is_not_learned(tokenizer):
    row = Row(messages=(*CHAT.messages, Turn("user", "Still there?")))
    assert runs(tokenizer, one(row, tokenizer, "chat")[1]) == ["Hello</s>", "See you</s>"]


def test_an_instruction_row_becomes_one_exchange_in_the_chat_style(tokenizer):
    tokens, labels = one(replace(ROW, context="Look."), tokenizer, "chat")
    assert tokenizer.decode(tokens) == (
        "<|user|>Is it?\n\nLook.</s>\n<|assistant|>the correct answer is true</s>\n"
    )
    assert runs(tokenizer, labels) == ["the correct answer is true</s>"]


def test_a_chat_template_without_an_end_token_gets_one_learned(tokenizer):
    bare = tiny_tokenizer()
    bare.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokens, labels = one(CHAT, bare, "chat")
    assert runs(bare, labels) == ["Hello", "See you</s>"]
    assert bare.decode(tokens).endswith("assistant: See you</s>")


def test_a_last_turn_without_the_end_token_that_earlier_ones_have_gets_one_learned(tokenizer):
    bare = tiny_tokenizer()
    bare.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{% if m.content != 'See you' %}</s>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokens, labels = one(CHAT, bare, "chat")
    assert runs(bare, labels) == ["Hello</s>", "See you</s>"]
    assert bare.decode(tokens).endswith("Hello</s>user: Bye</s>assistant: See you</s>")


def test_a_conversation_cut_after_its_first_response_is_kept_and_counted(tokenizer):
    first = len("<|system|>Be kind.") + 2 + len("<|user|>Hi") + 2 + len("<|assistant|>Hello") + 1
    encoded = encode_rows([CHAT], Encoding(tokenizer, "chat", "response", first))
    assert (encoded.dropped, encoded.cut, encoded.supervised) == (0, 1, 6)


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, CHAT.messages[2:], "begins with the assistant's message"),
        ("{{ raise_exception('roles must alternate') }}", CHAT.messages, "roles must alternate"),
        ("{{ nothing.here }}", CHAT.messages, "refuses it: 'nothing' is undefined"),
        ("{{ 1 // 0 }}", CHAT.messages, "refuses it: "),
        ("{% for m in messages %}", CHAT.messages, "refuses it: "),
        (
            "{% for m in messages %}{% if not loop.first %}{{ m.content }}{% endif %}{% endfor %}",
            CHAT.messages,
            "leaves out message 1 (system), which would be lost",
        ),
    ],
)
def test_a_conversation_that_the_template_cannot_write_is_refused_with_file_and_row(
    tmp_path, template, messages, message
):
    strict = tiny_tokenizer()
    strict.chat_template = template or strict.chat_template
    path = tmp_path / "chat.jsonl"
    turns = [{"role": turn.role, "content": turn.content} for turn in messages]
    path.write_text(json.dumps({"messages": turns}))
    with pytest.raises(InputError) as error:
        encode_rows(read_rows(path), Encoding(strict, "chat", "response", 1000))
    assert str(error.value).startswith(f"{path}: line 1: ")
    assert message in str(error.value)


def test_a_conversation_in_a_text_style_is_refused_with_file_and_row(tokenizer, tmp_path):
    path = tmp_path / "chat.json"
    turns = [{"role": turn.role, "content": turn.content} for turn in CHAT.messages]
    path.write_text(json.dumps([boolq_rows(1)[0], {"messages": turns}]))
    with pytest.raises(InputError, match=r"chat\.json: row 2: a conversation cannot be written"):
        encode_rows(read_rows(path), Encoding(tokenizer, "alpaca", "response", 1000))


@pytest.mark.slow
def test_a_mistake_is_named_also_when_several_threads_tokenize(tokenizer, tmp_path):
    path = tmp_path / "many.json"
    turns = [{"role": turn.role, "content": turn.content} for turn in CHAT.messages]
    path.write_text(json.dumps([*boolq_rows(4200), {"messages": turns}]))
    with pytest.raises(InputError, match=r"many\.json: row 4201: a conversation cannot be"):
        encode_rows(read_rows(path), Encoding(tokenizer, "alpaca", "response", 1000, workers=2))


@pytest.mark.slow
def test_several_threads_give_the_tokens_of_one(tokenizer):
    rows = [replace(ROW, instruction=f"Is {n} it?") for n in range(4200)]
    one_thread = encode_rows(rows, Encoding(tokenizer, "alpaca", "response", 1000, workers=1))
    kept = one_thread.rows[:]
    os.environ["SAN_LLM_CACHE"] += "-2"  # restored by the fixture of every test
    assert (
        encode_rows(rows, Encoding(tokenizer, "alpaca", "response", 1000, workers=2)).rows[:]
        == kept
    )


# --- the batched way beside a plain one ---


def plainly(row, tokenizer, style, cutoff):
    """Return tokens, labels and fate of a row, token by token, as the offsets tell them."""
    prompt = training_prompt(style, row.instruction, row.context)
    encoding = tokenizer(prompt + row.output, return_offsets_mapping=True)
    tokens, eos = encoding["input_ids"], tokenizer.eos_token_id
    learned = [end > start and end > len(prompt) for start, end in encoding["offset_mapping"]]
    last = max(place for place, on in enumerate(learned) if on)
    if tokens[last] != eos:
        if eos not in tokens[last + 1 :]:
            tokens, learned = [*tokens, eos], [*learned, True]
        else:
            learned[tokens.index(eos, last + 1)] = True
    kept = sum(learned[:cutoff])
    fate = "whole" if kept == sum(learned) else "cut" if kept else "dropped"
    labels = [t if on else IGNORE for t, on in zip(tokens, learned, strict=True)]
    return tokens[:cutoff], labels[:cutoff], fate


def with_special_tokens(template: str) -> PreTrainedTokenizerFast:
    """Return the character tokenizer, with tokens before and behind as LLaMA's and T5's have."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("</s>", EOS)]
    )
    return tokenizer


SPECIAL = {
    "none": tiny_tokenizer(),
    "before": with_special_tokens("<s> $A"),
    "around": with_special_tokens("<s> $A </s>"),
    "words": word_tokenizer(),
}


@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(st.tuples(st.text(max_size=9), st.text(min_size=1, max_size=9)), min_size=1),
    kind=st.sampled_from(sorted(SPECIAL)),
    style=st.sampled_from(STYLES),
    cutoff=st.integers(8, 260),
)
def test_rows_in_batches_are_the_rows_one_by_one(texts, kind, style, cutoff):
    rows = [Row(instruction, "", output) for instruction, output in texts]
    for row, got in zip(
        rows, label_rows(rows, Encoding(SPECIAL[kind], style, "response", cutoff)), strict=True
    ):
        expected = plainly(row, SPECIAL[kind], style, cutoff)
        assert (got.tokens, got.labels, got.fate) == expected
        assert got.supervised == len(learned(got.labels))


@pytest.mark.slow
def test_real_tokens_in_batches_are_those_one_by_one(real):
    rows = [
        *read_rows(ROOT / "san_llm" / "data" / "pocket" / "train.json", limit=60),
        *(replace(ROW, output=output) for output in RESPONSES),
    ]
    for style in STYLES:
        for row, got in zip(
            rows, label_rows(rows, Encoding(real, style, "response", 90)), strict=True
        ):
            assert (got.tokens, got.labels, got.fate) == plainly(row, real, style, 90)


def test_a_tokenizer_file_that_asks_for_a_cutoff_or_padding_changes_nothing(tokenizer):
    rows = [ROW, replace(ROW, output="no")]
    expected = list(label_rows(rows, Encoding(tokenizer, "alpaca", "response", 1000)))
    eager = tiny_tokenizer()
    eager.backend_tokenizer.enable_truncation(16)
    eager.backend_tokenizer.enable_padding(length=400)
    assert list(label_rows(rows, Encoding(eager, "alpaca", "response", 1000))) == expected


def test_an_instruction_of_100_000_characters_is_dropped_and_counted(tokenizer):
    huge = replace(ROW, instruction="x" * 100_000, where="rows.json: row 2")
    encoded = encode_rows([ROW, huge], Encoding(tokenizer, "alpaca", "response", 256))
    assert (len(encoded.rows), encoded.dropped, encoded.cut) == (1, 1, 0)
    with pytest.raises(InputError, match=r"cuts away the response of all 1 rows, from rows\.json"):
        encode_rows([huge], Encoding(tokenizer, "alpaca", "response", 256))


def test_a_row_that_a_model_cannot_hold_is_named_also_behind_one_that_was_dropped(tokenizer):
    outputs = ("a" * 300, "ab", "a" * 9, "a" * 7)
    huge, *rows = (replace(ROW, output=text, where=f"row {n}") for n, text in enumerate(outputs))
    huge = replace(huge, instruction="x" * 400)
    encoding = Encoding(tokenizer, "alpaca", "response", 256)
    encoded = encode_rows([huge, *rows], encoding)
    assert kept_rows(encoded, [huge, *rows], encoding) == rows
    assert kept_rows(encode_rows(rows, encoding), rows, encoding) == rows
    prompt = len(training_prompt("alpaca", ROW.instruction)) + 1  # and the end token
    for context in (None, prompt + 9):
        refuse_longer(encoded, [huge, *rows], encoding, context)
    for context, more in ((prompt + 8, ""), (prompt + 2, ", as in 1 more rows")):
        with pytest.raises(InputError) as error:
            refuse_longer(encoded, [huge, *rows], encoding, context)
        assert str(error.value) == (
            f"row 2: {prompt + 9} tokens, more than the model's context of {context}{more}: "
            f"data.cutoff={context} cuts them there"
        )


def test_lengths_are_those_of_the_rows(tokenizer):
    rows = [replace(ROW, output="a" * length) for length in (3, 1, 2)]
    data = Rows(encode_rows(rows, Encoding(tokenizer, "alpaca", "response", 1000)))
    assert data.lengths == [len(data[place]["input_ids"]) for place in range(3)]


# --- tokenizers that cannot serve ---


def test_a_tokenizer_without_an_end_token_is_refused():
    endless = tiny_tokenizer()
    endless.eos_token = None
    with pytest.raises(InputError, match="no end-of-text token"):
        encode_rows([ROW], Encoding(endless, "alpaca", "response", 100))


def test_a_tokenizer_without_a_fast_version_is_refused():
    with pytest.raises(InputError, match="no fast version"):
        encode_rows([ROW], Encoding(ByT5Tokenizer(), "alpaca", "response", 100))


def test_the_chat_style_needs_a_chat_template():
    mute = tiny_tokenizer()
    mute.chat_template = None
    for use in (
        lambda: encode_rows([ROW], Encoding(mute, "chat", "response", 100)),
        lambda: evaluation_text("chat", ROW, mute),
    ):
        with pytest.raises(InputError, match=r"no chat template; choose data\.prompt alpaca"):
            use()


def test_padding_falls_back_to_the_end_token_and_then_is_refused(tokenizer):
    assert pad_id(tokenizer) == 2
    bare = tiny_tokenizer()
    bare.pad_token = None
    assert pad_id(bare) == EOS
    bare.eos_token = None
    with pytest.raises(SanError, match="no token to pad with"):
        pad_id(bare)


def test_a_tokenizer_without_a_padding_token_learns_the_end_token_all_the_same():
    bare = tiny_tokenizer()
    bare.pad_token = None
    assert one(ROW, bare)[1][-1] == EOS


# --- evaluation ---


def prefixes_agree(tokenizer, row):
    """Check that evaluation's tokens are training's up to the first learned one."""
    tokens, labels = one(row, tokenizer, "llm-adapters-aligned", cutoff=10_000)
    first = next(i for i, label in enumerate(labels) if label != IGNORE)
    text, prompt = evaluation_text("llm-adapters-aligned", row, tokenizer)
    assert prompt == tokens[:first]
    assert text == training_prompt("llm-adapters", row.instruction, row.context)
    return prompt


def test_aligned_evaluation_is_the_training_tokens_up_to_the_response(tokenizer):
    prompt = prefixes_agree(tokenizer, ROW)
    assert prompt == tokenizer(training_prompt("llm-adapters", "Is it?"))["input_ids"]
    words = word_tokenizer()
    prompt = prefixes_agree(words, ROW)
    # The last of the 16 spaces is the response's.
    assert prompt == words(training_prompt("llm-adapters", "Is it?")[:-1])["input_ids"]


def test_the_published_evaluation_keeps_its_mismatch():
    words = word_tokenizer()
    text, prompt = evaluation_text("llm-adapters", ROW, words)
    assert text == evaluation_prompt("llm-adapters", "Is it?")
    assert prompt == words(text)["input_ids"]
    training = one(ROW, words, "llm-adapters")[0]
    assert prompt != training[: len(prompt)]


@pytest.mark.parametrize("style", STYLES)
def test_evaluation_asks_with_the_rows_context(tokenizer, style):
    text, prompt = evaluation_text(style, replace(ROW, context="Look."), tokenizer)
    assert text == evaluation_prompt(style, "Is it?", "Look.")
    assert text.count("Look.") == 1
    assert tokenizer.decode(prompt) == text


def test_chat_evaluation_asks_in_the_template(tokenizer):
    text, prompt = evaluation_text("chat", replace(ROW, context="Look."), tokenizer)
    assert text == "<|user|>Is it?\n\nLook.</s>\n<|assistant|>"
    assert prompt == one(replace(ROW, context="Look."), tokenizer, "chat")[0][: len(prompt)]


# --- the real tokenizer ---


@pytest.fixture(scope="session")
def real(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


RESPONSES = [
    "the correct answer is true",
    "naïve 日本語 🙂👍🏽 ﬁ",
    "42",
    "\n\nYes",
    " x",
    "(a)",
    "É",
]


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_the_real_tokenizer_learns_the_whole_response(real, style):
    rows = [replace(ROW, output=output) for output in RESPONSES]
    encoded = encode_rows(rows, Encoding(real, style, "response", 1000))
    for row, got in zip(rows, encoded.rows, strict=True):
        prompt = training_prompt(style, row.instruction)
        assert real.decode(got["input_ids"]) == prompt + row.output + "<|im_end|>"
        text = real.decode(learned(got["labels"]))
        # A token may begin with white space of the prompt, and no token before it is learned.
        assert text.lstrip() == row.output.lstrip() + "<|im_end|>"
        assert got["labels"][-len(learned(got["labels"])) :] == learned(got["labels"])
        before = real.decode(got["input_ids"][: -len(learned(got["labels"]))])
        assert prompt.startswith(before)
        assert before.rstrip() == prompt.rstrip()


@pytest.mark.slow
def test_the_real_chat_template_learns_every_assistant_turn(real):
    tokens, labels = one(CHAT, real, "chat")
    assert real.decode(tokens) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\nSee you<|im_end|>\n"
    )
    assert runs(real, labels) == ["Hello<|im_end|>", "See you<|im_end|>"]
    text, prompt = evaluation_text("chat", ROW, real)
    assert text.endswith("<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n")
    assert prompt == one(ROW, real, "chat")[0][: len(prompt)]


@pytest.mark.slow
def test_aligned_evaluation_is_the_real_training_tokens_up_to_the_response(real):
    pocket = read_rows(ROOT / "san_llm" / "data" / "pocket" / "train.json", limit=40)
    for row in [*pocket[::4], replace(ROW, context="Some context.")]:
        prompt = prefixes_agree(real, row)
        published = evaluation_text("llm-adapters", row, real)[1]
        assert prompt != published  # the mismatch that the aligned style removes


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(instruction=st.text(max_size=30), answer=st.sampled_from(["true", "ending3", "option1"]))
def test_aligned_evaluation_holds_for_any_instruction(real, instruction, answer):
    prefixes_agree(real, Row(instruction, "", f"the correct answer is {answer}"))


# --- the cache ---


def cached() -> dict[str, float]:
    folder = Path(os.environ["SAN_LLM_CACHE"]) / "tokenized"
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*") if path.is_dir()}


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAN_LLM_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("empty_cache")
def test_the_same_rows_are_read_from_the_cache_whatever_their_file(tokenizer):
    first = encode_rows([ROW], Encoding(tokenizer, "alpaca", "response", 200))
    before = cached()
    assert len(before) == 1
    again = encode_rows(
        [replace(ROW, where="other.json: row 9")],
        Encoding(tiny_tokenizer(), "alpaca", "response", 200),
    )
    assert cached() == before
    assert again.rows[:] == first.rows[:]
    assert (again.dropped, again.cut, again.supervised) == (0, 0, first.supervised)


@pytest.mark.usefixtures("empty_cache")
def test_other_settings_rows_or_tokenizers_are_tokenized_anew(tokenizer):
    encode_rows([ROW], Encoding(tokenizer, "alpaca", "response", 200))
    template = tiny_tokenizer()
    template.chat_template = template.chat_template.replace("<|", "<<")
    more = tiny_tokenizer()
    more.add_tokens(["Is"])
    changes = [
        ([ROW], tokenizer, "llm-adapters", "response", 300),
        ([ROW], tokenizer, "alpaca", "all", 200),
        ([ROW], tokenizer, "alpaca", "response", 201),
        ([replace(ROW, output="no")], tokenizer, "alpaca", "response", 200),
        ([replace(ROW, context="no")], tokenizer, "alpaca", "response", 300),
        ([ROW, ROW], tokenizer, "alpaca", "response", 200),
        ([ROW], more, "alpaca", "response", 200),
        ([ROW], tokenizer, "chat", "response", 200),
        ([ROW], template, "chat", "response", 200),
    ]
    for number, change in enumerate(changes, start=2):
        rows, *settings = change
        encode_rows(rows, Encoding(*settings))
        assert len(cached()) == number, change


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize("style", ["alpaca", "chat"])
def test_special_tokens_over_the_same_backend_are_tokenized_anew(tokenizer, style):
    other, start = tiny_tokenizer(), tiny_tokenizer()
    other.eos_token, start.bos_token = "<pad>", "<unk>"
    for one_of in (other, start):
        assert one_of.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
        one_of.chat_template = tokenizer.chat_template = (
            "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
        )
    ends = {}
    for one_of in (tokenizer, other, start):
        tokens, labels = one(ROW, one_of, style)
        ends[one_of.eos_token, one_of.bos_token] = tokens[0], tokens[-1], labels[-1]
    first = (0, 3) if style == "chat" else (ends["</s>", "<s>"][0],) * 2
    assert ends == {
        ("</s>", "<s>"): (first[0], EOS, EOS),
        ("<pad>", "<s>"): (first[0], 2, 2),
        ("</s>", "<unk>"): (first[1], EOS, EOS),
    }
    assert len(cached()) == 3


@pytest.mark.usefixtures("empty_cache")
def test_other_turns_of_a_conversation_are_tokenized_anew(tokenizer):
    system, user, answer, more, last = CHAT.messages
    conversations = (
        CHAT.messages,
        (user, answer, more, last),
        (system, user, answer),
        (Turn("system", "Be short."), user, answer, more, last),
        (Turn("user", "Be kind."), user, answer, more, last),
        (system, user, Turn("assistant", "No"), more, last),
    )
    for number, messages in enumerate(conversations, start=1):
        encode_rows([Row(messages=messages)], Encoding(tokenizer, "chat", "response", 200))
        assert len(cached()) == number, messages


@pytest.mark.usefixtures("empty_cache")
def test_a_folder_of_the_cache_that_is_not_whole_is_made_anew(tokenizer):
    encoding = Encoding(tokenizer, "alpaca", "response", 200)
    first = encode_rows([ROW], encoding)
    (folder,) = (Path(os.environ["SAN_LLM_CACHE"]) / "tokenized" / name for name in cached())
    (folder / "fates.json").unlink()
    again = encode_rows([ROW], encoding)
    assert again.rows[:] == first.rows[:]
    assert (folder / "fates.json").is_file()


@pytest.mark.usefixtures("empty_cache")
def test_rows_that_are_refused_leave_nothing_in_the_cache(tokenizer):
    with pytest.raises(InputError):
        encode_rows([ROW, CHAT], Encoding(tokenizer, "alpaca", "response", 200))
    assert cached() == {}


@pytest.mark.slow
@pytest.mark.usefixtures("empty_cache")
def test_two_processes_at_once_tokenize_once_and_get_the_same(tokenizer, tiny_base):
    script = (
        "# forked from: all\n"
        "import json, sys\n"
        "from transformers import AutoTokenizer\n"
        "from san_llm.data.encode import Encoding\n"
        "from san_llm.data.tokenized import encode_rows\n"
        "from san_llm.data.rows import Row\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "rows = [Row(f'Is {n} it?', '', 'yes') for n in range(1500)]\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "encoded = encode_rows(rows, Encoding(tokenizer, 'alpaca', 'response', 300))\n"
        "print(json.dumps([encoded.supervised, len(encoded.rows)]))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tiny_base)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert json.loads(out) == [1500 * 4, 1500]
    assert len(cached()) == 1


# --- batches ---


def test_a_batch_is_padded_on_the_right_to_a_multiple_of_eight():
    batch = Pad(7)(
        [{"input_ids": [3, 4], "labels": [IGNORE, 4]}, {"input_ids": [5] * 9, "labels": [5] * 9}]
    )
    assert batch["input_ids"].tolist() == [[3, 4] + [7] * 14, [5] * 9 + [7] * 7]
    assert batch["attention_mask"].tolist() == [[1, 1] + [0] * 14, [1] * 9 + [0] * 7]
    assert batch["labels"].tolist() == [[IGNORE, 4] + [IGNORE] * 14, [5] * 9 + [IGNORE] * 7]


def test_the_filler_behind_the_rows_teaches_nothing(tokenizer):
    data = Rows(encode_rows([ROW], Encoding(tokenizer, "alpaca", "response", 200)))
    assert len(data) == 1
    assert data.lengths == [len(data[0]["input_ids"])]
    assert data[1]["labels"] == [IGNORE]
    with pytest.raises(IndexError):
        data[2]


def test_a_row_with_a_token_past_the_embedding_is_named_with_it_and_both_sizes():
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    tokenizer.add_tokens(["<tool>"])
    rows = [Row("Say b.", "", "b", where="row 1"), Row("Use <tool> now.", "", "ok", where="row 2")]
    encode_rows(rows, Encoding(tokenizer, "alpaca", "response", 1000, vocabulary=size + 1))
    encode_rows(rows[:1], Encoding(tokenizer, "alpaca", "response", 1000, vocabulary=size))
    # Not even where the same rows were kept for a larger embedding.
    with pytest.raises(InputError) as caught:
        encode_rows(rows, Encoding(tokenizer, "alpaca", "response", 1000, vocabulary=size))
    assert str(caught.value).startswith(
        f"row 2: the token '<tool>' has the id {size}, past the model's embedding of {size} rows "
        f"(its tokenizer has {size + 1} tokens)"
    )


def ending_everything():
    """Return a tokenizer as it is saved with ``add_eos_token``: every text gets an end token."""
    ends = tiny_tokenizer()
    ends.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return ends


@pytest.mark.parametrize("style", ["none", "alpaca", "llm-adapters", "llm-adapters-aligned"])
def test_no_end_token_stands_behind_a_question(tokenizer, style):
    ends = ending_everything()
    assert ends("x")["input_ids"][-1] == EOS
    found, plain = (evaluation_text(style, ROW, made)[1] for made in (ends, tokenizer))
    assert found[-1] != EOS
    assert found == [BOS, *plain]


def test_an_answer_ends_once_whatever_the_tokenizer_adds(tokenizer):
    tokens, labels = one(ROW, ending_everything())
    assert tokens.count(EOS) == 1
    assert learned(labels) == learned(one(ROW, tokenizer)[1])
