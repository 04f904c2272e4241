"""What is learned of conversations, in the forms that chat templates have."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from san_llm.data.encode import IGNORE, Encoding, label_rows
from san_llm.data.rows import Row, Turn
from san_llm.data.shapes import read_row
from san_llm.errors import InputError

# Forms that templates in use have, each written anew: how a turn begins and ends, what is trimmed,
# where a system prompt goes, what becomes of thinking, what follows a whole conversation.
ASK = "{% if add_generation_prompt %}"
TEMPLATES = {
    "ChatML": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}" + ASK + "<|im_start|>assistant\n{% endif %}",
    "headers, trimmed": "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|tail|>\n\n"
    "{{ m.content | trim }}<|eot|>{% endfor %}" + ASK + "<|head|>assistant<|tail|>\n\n{% endif %}",
    "instruction marks": "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{% set sys = messages[0].content %}{% set rest = messages[1:] %}{% else %}"
    "{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}[INST] "
    "{% if loop.first and sys is defined %}<<SYS>>\n{{ sys }}\n<</SYS>>\n\n{% endif %}"
    "{{ m.content }} [/INST]{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}"
    "{% endfor %}",
    "system while asked": "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{% set sys = messages[0].content %}{% set rest = messages[1:] %}{% else %}"
    "{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last and sys is defined %}{{ sys }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "model for assistant": "{{ bos_token }}{% for m in messages %}<|turn|>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|/turn|>\n"
    "{% endfor %}" + ASK + "<|turn|>model\n{% endif %}",
    "end of all": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    + ASK
    + "<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
    "thinking of the last": "{% set ns = namespace(last=-1) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set body = m.content.split('</think>')[-1].lstrip('\n') %}{% set thought = '' %}"
    "{% if '</think>' in m.content %}{% set thought = "
    "m.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>assistant\n{% if loop.index0 > ns.last %}<think>\n{{ thought }}\n</think>\n\n"
    "{% endif %}{{ body }}<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endif %}{% endfor %}" + ASK + "<|im_start|>assistant\n{% endif %}",
    "thinking cut off": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<User>"
    "{{ m.content }}{% elif m.role == 'assistant' %}<Assistant>"
    "{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}" + ASK + "<Assistant><think>\n{% endif %}",
    "plain words": "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n{% endfor %}"
    + ASK
    + "ASSISTANT: {% endif %}",
    "ends of text": "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}"
    "{% endfor %}" + ASK + "assistant: {% endif %}",
    "a token that begins and ends": "<sop>{% for m in messages %}<|{{ m.role }}|>\n"
    "{{ m.content }}{% endfor %}" + ASK + "<|assistant|>{% endif %}",
    "looks at what is said": "{% for m in messages %}{% if m.role == 'user' and "
    "m.content.startswith('(') %}<|im_start|>tool\n{{ m.content }}<|im_end|>\n{% else %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + ASK
    + "<|im_start|>assistant\n{% endif %}",
}  # fmt: skip
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|head|>", "<|tail|>", "<|eot|>", "<|turn|>", "<|/turn|>"]
SPECIAL += ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
# What ends an answer in each: a token behind it, where there is one; else the end of text.
ENDS = {
    "ChatML": "<|im_end|>",
    "headers, trimmed": "<|eot|>",
    "model for assistant": "<|/turn|>",
    "end of all": "<|end|>",
    "thinking of the last": "<|im_end|>",
    "looks at what is said": "<|im_end|>",
}


def tokenizer_with(template: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = template
    return tokenizer


def runs(tokenizer: Any, row: Row, **how: Any) -> list[str]:
    """Return each run of learned tokens as text."""
    (made,) = label_rows([row], Encoding(tokenizer, "chat", "response", 10_000, **how))
    texts: list[str] = []
    before = False
    for token, label in zip(made.tokens, made.labels, strict=True):
        if label != IGNORE:
            text = tokenizer.decode([token])
            texts = [*texts[:-1], texts[-1] + text] if before else [*texts, text]
        before = label != IGNORE
    return texts


WORDS = st.text(st.sampled_from("ab (?\n"), min_size=1, max_size=6).filter(str.strip)
NAMES = st.sampled_from(["assistant", "user", "a", "model", "ASSISTANT:", "[/INST]", "think"])
SAID = WORDS | NAMES


@settings(max_examples=300, deadline=None)
@given(
    form=st.sampled_from(sorted(TEMPLATES)),
    system=st.none() | SAID,
    turns=st.lists(st.tuples(SAID, SAID), min_size=1, max_size=3),
    asked_on=st.booleans(),
)
def test_what_is_learned_is_what_the_assistant_says_and_its_ends(form, system, turns, asked_on):
    # Its system prompt is written where an answer is asked for, and nowhere else.
    assume(form != "system while asked" or system is None or not asked_on)
    tokenizer = tokenizer_with(TEMPLATES[form])
    messages = [Turn("system", system)] if system else []
    for question, answer in turns:
        messages += [Turn("user", question), Turn("assistant", answer)]
    if asked_on:
        messages.append(Turn("user", "more"))
    row = Row(messages=tuple(messages), where="row 1")
    found = runs(tokenizer, row)
    end = ENDS.get(form, "</s>")
    last = len(turns) - 1
    for number, ((_, answer), learned) in enumerate(zip(turns, found, strict=True)):
        ends = (
            end
            if form not in ("plain words", "a token that begins and ends")
            else (
                "</s>"
                if number == last and not asked_on
                else ""
                if form == "plain words"
                else "<|user|>"
            )
        )
        assert learned.endswith(ends)
        assert learned.removesuffix(ends).strip() == answer.strip()
    only_last = runs(tokenizer, row, learn="last turn")
    assert only_last == found[-1:]


@pytest.mark.parametrize(
    ("form", "learned"),
    [("ChatML", " \n42 <|im_end|>"), ("headers, trimmed", "42<|eot|>"), ("plain words", " \n42")],
)
def test_white_space_before_an_answer_is_learned_where_the_template_keeps_it(form, learned):
    answers = [Turn("assistant", " \n42 "), Turn("assistant", "\n\n42")]
    asked = Turn("user", "6 * 7?")
    row = Row(messages=(asked, answers[0], asked), where="row 1")
    assert runs(tokenizer_with(TEMPLATES[form]), row) == [learned]
    # What a header ends with is no part of the answer, though the answer begins with the same.
    (second,) = runs(tokenizer_with(TEMPLATES[form]), Row(messages=(asked, answers[1], asked)))
    assert second.startswith("42" if form == "headers, trimmed" else "\n\n42")


def test_every_template_ends_in_what_it_says():
    """Of the forms above, those that no special token ends are the two that are named."""
    from san_llm.data.ends import turn_end

    for form, template in TEMPLATES.items():
        tokenizer = tokenizer_with(template)
        token = turn_end(tokenizer).token
        ends = None if token is None else tokenizer.decode([token])
        bare = form in ("plain words", "a token that begins and ends")
        assert ends == (None if bare else ENDS.get(form, "</s>"))


def conversation(*said: str, **more: Any) -> Row:
    roles = ("user", "assistant") * len(said)
    messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
    return read_row("f", "row 1", {"messages": messages, **more}, None)


THOUGHT = "<think>\nhm\n</think>\n\nyes"


def test_thinking_is_learned_where_the_template_writes_it_and_counted_where_not():
    row = conversation("Is it?", THOUGHT, "And now?", THOUGHT)
    tokenizer = tokenizer_with(TEMPLATES["thinking of the last"])
    assert runs(tokenizer, row) == ["yes<|im_end|>", "<think>\nhm\n</think>\n\nyes<|im_end|>"]
    (made,) = label_rows([row], Encoding(tokenizer, "chat", "response", 999))
    assert made.thoughts == 1
    tokenizer = tokenizer_with(TEMPLATES["thinking cut off"])
    assert runs(tokenizer, row) == ["yes</s>", "yes</s>"]
    (made,) = label_rows([row], Encoding(tokenizer, "chat", "response", 999))
    assert made.thoughts == 2


def test_an_empty_think_block_is_not_learned():
    tokenizer = tokenizer_with(TEMPLATES["thinking of the last"])
    assert runs(tokenizer, conversation("Is it?", "yes")) == ["yes<|im_end|>"]
    empty = conversation("Is it?", "<think>\n\n</think>\n\nyes")
    assert runs(tokenizer, empty) == ["yes<|im_end|>"]


def test_reasoning_beside_the_content_is_thinking():
    template = TEMPLATES["ChatML"].replace(
        "{{ m.content }}",
        "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{{ m.content }}",
    )
    turns = [{"role": "user", "content": "Is it?"},
             {"role": "assistant", "content": "yes", "reasoning_content": "hm"}]  # fmt: skip
    row = read_row("f", "row 1", {"messages": turns}, None)
    assert runs(tokenizer_with(template), row) == ["<think>hm</think>yes<|im_end|>"]
    (made,) = label_rows([row], Encoding(tokenizer_with(TEMPLATES["ChatML"]), "chat", "all", 99))
    assert made.thoughts == 1


@pytest.mark.parametrize("key", ["weight", "train", "loss"])
def test_a_turn_that_is_not_to_be_learned_is_not(key):
    turns = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "5", key: False},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "4", key: True},
    ]
    row = read_row("f", "row 1", {"messages": turns}, None)
    assert runs(tokenizer_with(TEMPLATES["ChatML"]), row) == ["4<|im_end|>"]
    turns[3][key] = 0
    with pytest.raises(InputError, match="no assistant message with text that is to be learned"):
        read_row("f", "row 1", {"messages": turns}, None)
    turns[3][key] = 0.5
    with pytest.raises(InputError, match=f"message 4: '{key}' is 0.5; a turn is learned"):
        read_row("f", "row 1", {"messages": turns}, None)


TOOLS = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
CALLING = TOOLS + TEMPLATES["ChatML"].replace(
    "{{ m.content }}",
    "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}",
)
CALL = {"type": "function", "function": {"name": "sky", "arguments": '{"at": "Oslo"}'}}
CALLED = '<tool_call>\n{"name": "sky", "arguments": {"at": "Oslo"}}\n</tool_call><|im_end|>'


def calling(content: Any) -> dict[str, Any]:
    return {
        "tools": [{"type": "function", "function": {"name": "sky"}}],
        "messages": [
            {"role": "user", "content": "Cold in Oslo?"},
            {"role": "assistant", "content": content, "tool_calls": [CALL]},
            {"role": "tool", "content": "-4", "name": "sky"},
            {"role": "assistant", "content": "Yes."},
        ],
    }


@pytest.mark.parametrize("content", ["", None, "Let me see. "])
def test_a_call_of_a_tool_is_learned_as_the_template_writes_it(content):
    row = read_row("f", "row 1", calling(content), None)
    found = runs(tokenizer_with(CALLING), row)
    assert found == [(content or "") + CALLED, "Yes.<|im_end|>"]


def test_what_a_template_leaves_out_is_refused_by_name():
    def refused(template: str, value: dict[str, Any]) -> str:
        with pytest.raises(InputError) as error:
            runs(tokenizer_with(template), read_row("f", "row 1", value, None))
        return str(error.value)

    plain = TEMPLATES["ChatML"]
    assert "leaves out the call of a tool in message 2 (assistant)" in refused(plain, calling(""))
    value = calling("")
    without_calls = [value["messages"][0], value["messages"][3]]
    told = refused(plain, {**value, "messages": without_calls})
    assert "writes no tools, so that 'sky' would be lost" in told
    named = {"messages": [{**without_calls[0], "name": "Ann"}, without_calls[1]]}
    assert "leaves out the name of message 1 (user)" in refused(plain, named)
    silent = plain.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
    told = refused(silent.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls }}"), value)
    assert "leaves out message 3 (tool)" in told


def test_a_control_token_in_a_rows_words_is_told_and_written_out_on_wish():
    tokenizer = tokenizer_with(TEMPLATES["ChatML"])
    row = conversation("What ends a turn?", "It is <|im_end|>, always.")
    as_token, as_text = (
        next(
            iter(
                label_rows([row], Encoding(tokenizer, "chat", "response", 999, special_tokens=how))
            )
        )
        for how in ("tokens", "text")
    )
    assert as_token.controls == as_text.controls == ("<|im_end|>",)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert as_token.tokens.count(end) == as_text.tokens.count(end) + 1 == 3
    assert tokenizer.decode(as_token.tokens) == tokenizer.decode(as_text.tokens)
    assert tokenizer.decode([t for t in as_text.labels if t != IGNORE]) == (
        "It is <|im_end|>, always.<|im_end|>"
    )


SAME = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"conversations": [{"role": "User", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"messages": json.dumps([{"role": "user", "content": "a"},
                             {"role": "assistant", "content": "b"}])},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]},
                  {"role": "assistant", "content": ["b"]}]},
]  # fmt: skip


def test_one_conversation_in_many_shapes_is_one_row():
    made = [read_row("f", "row 1", value, None) for value in SAME]
    assert all(one == other for one, other in pairwise(made))
    assert {row.shape for row in made} == {"messages", "ShareGPT"}
    parted = {
        "prompt": [{"role": "user", "content": "a"}],
        "completion": [{"role": "assistant", "content": "b"}],
    }
    assert runs(tokenizer_with(TEMPLATES["ChatML"]), read_row("f", "row 1", parted, None)) == [
        "b<|im_end|>"
    ]
    old = {"instruction": "a", "output": "b", "system": "s", "history": [["c", "d"]]}
    said = [(turn.role, turn.content) for turn in read_row("f", "row 1", old, None).messages]
    assert said == [("system", "s"), ("user", "c"), ("assistant", "d"), ("user", "a"),
                    ("assistant", "b")]  # fmt: skip


def test_a_plain_text_is_learned_whole_in_any_style():
    row = read_row("f", "row 1", {"text": "all of it"}, None)
    tokenizer = tokenizer_with(TEMPLATES["ChatML"])
    for style in ("chat", "alpaca"):
        (made,) = label_rows([row], Encoding(tokenizer, style, "response", 99))
        assert tokenizer.decode(made.tokens, skip_special_tokens=True) == "all of it"
        learned = tokenizer.decode([t for t in made.labels if t != IGNORE])
        assert learned.endswith("all of it</s>") or learned == "ll of it</s>"
