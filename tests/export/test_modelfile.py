"""The Modelfile: Ollama's template writes what the chat template does, or none is written."""

import json
import re

import pytest
from tiny import tiny_tokenizer

from san_llm.errors import InputError
from san_llm.export.modelfile import Frame, frame_of, write_modelfile
from san_llm.protocol.templates import NAMES, template, with_system

CHATML = template("chatml", begins=False)
# Mistral's way: a system prompt is a part of the first question.
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
    "[INST] {% if loop.first and system %}{{ system }}\n\n{% endif %}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
REFUSING = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORMS = {
    **{name: template(name, begins=True) for name in NAMES},
    "with a system prompt": with_system(CHATML, 'Say "arr".\n{{ é }}'),
    "Mistral's": MISTRAL,
    "without a system prompt": REFUSING,
    "with quotes": REFUSING.replace("\n", '"""'),
}
TALK = [
    {"role": "user", "content": 'One "{{ x }}"\n"""'},
    {"role": "assistant", "content": "Two\n\n- é"},
    {"role": "user", "content": "three"},
]
PROMPTED = [{"role": "system", "content": "S"}, *TALK]


def words(chat):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat
    return tokenizer


def asked(tokenizer, turns):
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return text.removeprefix(tokenizer.bos_token) if begins(tokenizer) else text


def talks(name):
    refuses = "raise_exception" in FORMS[name]
    return [TALK] if refuses else [TALK, PROMPTED]


def begins(tokenizer):
    return tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


@pytest.mark.parametrize("name", FORMS)
def test_the_frame_is_that_of_the_chat_template(name):
    tokenizer = words(FORMS[name])
    frame = frame_of(tokenizer)
    for turns in (TALK[:1], *talks(name)):
        assert frame.write(turns) == asked(tokenizer, turns)
    assert (frame.before_system is not None) == (PROMPTED in talks(name))


def test_it_is_said_in_go(tmp_path):
    frame = Frame("<u>", '<s "1">\n', "<u>", "<a>", "", "\n<u>")
    assert frame.in_go() == (
        '{{- range $i, $m := .Messages }}{{- if eq $m.Role "system" }}{{ "<s \\"1\\">\\n" }}'
        '{{ $m.Content }}{{ "<u>" }}{{ end }}{{- if eq $m.Role "user" }}{{ if eq $i 0 }}{{ "<u>" }}'
        '{{ end }}{{ $m.Content }}{{ "<a>" }}{{ end }}{{- if eq $m.Role "assistant" }}'
        '{{ $m.Content }}{{ "\\n<u>" }}{{ end }}{{- end }}'
    )
    assert write_modelfile(tmp_path, "model.gguf", words(TOKENS)) is None
    first, second, third = (tmp_path / "Modelfile").read_text().splitlines()
    assert (first, third) == ("FROM ./model.gguf", 'PARAMETER stop "<pad>"')
    assert second == f'TEMPLATE """{frame_of(words(TOKENS)).in_go()}"""'


TOKENS = REFUSING.replace("{{ m.content }}", "{{ m.content }}<pad>")


@pytest.mark.parametrize("name", FORMS)
def test_go_itself_writes_the_same(name, tmp_path):
    go = pytest.importorskip("go_template")
    tokenizer = words(FORMS[name])
    write_modelfile(tmp_path, "model.gguf", tokenizer)
    text = (tmp_path / "Modelfile").read_text()
    (tmp_path / "go").write_text(re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)[1])
    for turns in talks(name):
        told = [{"Role": turn["role"], "Content": turn["content"]} for turn in turns]
        (tmp_path / "told.yaml").write_text(json.dumps({"Messages": told}))
        go.render_template(*(str(tmp_path / part) for part in ("go", "told.yaml", "out")))
        assert (tmp_path / "out").read_text() == asked(tokenizer, turns)


@pytest.mark.parametrize(
    ("chat", "why"),
    [
        (None, "the model has no chat template"),
        ("{{ messages[-1].content }}", "leaves messages out, or writes one twice"),
        (CHATML.replace("message.role }}", "message.role }}{{ loop.index }}"), "by more than"),
    ],
)
def test_what_it_cannot_say_is_left_out_and_told(chat, why, tmp_path):
    tokenizer = words(chat)
    assert why in write_modelfile(tmp_path, "model.gguf", tokenizer)
    assert "TEMPLATE" not in (tmp_path / "Modelfile").read_text()
    if chat is None:
        with pytest.raises(InputError, match="no chat template"):
            frame_of(tokenizer)
