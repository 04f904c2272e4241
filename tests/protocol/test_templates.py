"""Chat templates of our own: the text of the styles, and a system prompt of a template's own."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from san_llm.protocol.prompts import evaluation_prompt, training_prompt
from san_llm.protocol.template_date import with_date
from san_llm.protocol.templates import NAMES, system_of, template, with_system

STYLES = [name for name in NAMES if name not in ("chatml", "llama-3")]
ASKED = {"role": "user", "content": "Why is\n  it {{ so }}?"}
TURNS = [ASKED, {"role": "assistant", "content": " Because. "}]
TOKENIZER = tiny_tokenizer()


def written(chat, turns, ask=False):
    tokenizer = TOKENIZER
    tokenizer.chat_template = chat
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask)


@pytest.mark.parametrize("style", STYLES)
def test_a_style_as_a_template_writes_what_is_learned_and_what_is_asked(style):
    question, answer = (turn["content"] for turn in TURNS)
    learned = f"{training_prompt(style, question)}{answer}{TOKENIZER.eos_token}"
    assert written(template(style, begins=False), TURNS) == learned
    asked = evaluation_prompt(style, question)
    if style.endswith("aligned"):  # training's tokens: the last space begins the answer's first
        asked = asked[:-1]
    assert written(template(style, begins=False), [ASKED], ask=True) == asked
    begun = f"{TOKENIZER.bos_token}{asked}"
    assert written(template(style, begins=True), [ASKED], ask=True) == begun


SYSTEM = {"role": "system", "content": "Other."}


@settings(deadline=None, max_examples=30)
@given(prompt=st.text(min_size=1).filter(str.strip), dated=st.booleans())
def test_a_system_prompt_is_written_where_a_conversation_has_none(prompt, dated):
    bare = template("chatml", begins=False)
    bare = with_date("{{ strftime_now('%d') }}" + bare, "2024-07-26") if dated else bare
    own = with_system(bare, prompt)
    assert system_of(own) == prompt
    assert system_of(bare) is None
    said = {"role": "system", "content": prompt}
    assert written(own, TURNS, ask=True) == written(bare, [said, *TURNS], ask=True)
    assert written(own, [SYSTEM, *TURNS]) == written(bare, [SYSTEM, *TURNS])
    if dated:  # and the date is still one that may be said anew
        assert written(with_date(own, "2024-07-27"), TURNS).startswith("27")
