"""The frame that a model learns travels: its chat template, and what ends its turns."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from merge.stock import verify_in_this_process
from tiny import save_tiny, tiny_tokenizer, write_recipe
from transformers import AutoTokenizer

from san_llm.ask.respond import Sampling, in_frame, posed, question, respond, way_of
from san_llm.errors import InputError, SanError
from san_llm.merge.request import MergeRequest
from san_llm.merge.run import merge
from san_llm.models.load import load_model
from san_llm.models.locate import find_base
from san_llm.models.subject import find_subject
from san_llm.models.tokenizer import load_tokenizer
from san_llm.protocol.templates import system_of, template
from san_llm.recipe.read import load_recipe
from san_llm.runs.folder import new_run
from san_llm.train.run import train

# <pad> ends a turn, and is no end of text: as <|im_end|> of many a base that was not yet tuned.
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<pad>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TURN, TEXT = 2, 1
COLOURS = {"grass": "green", "snow": "white", "coal": "black", "blood": "red"}


def conversations(path: Path) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Colour of {thing}?"},
                {"role": "assistant", "content": colour},
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": "yes"},
            ]
        }
        for thing, colour in COLOURS.items()
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def base(here: Path) -> Path:
    folder = save_tiny(here / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return folder


def trained(recipe: Any) -> Path:
    """Train and return the run's adapter."""
    run = new_run(recipe, Path("run"), overwrite=False)
    train(recipe, run)
    return run / "adapter"


def recipe(here: Path, base: Path, **data: Any) -> Any:
    given = {"held_out": 0, "prompt": "chat", "chat_template": "mine.jinja"} | data
    rows = conversations(here / "rows.jsonl")
    path = write_recipe(here / "r.yaml", base, rows, data=given)
    return load_recipe(path, [])


def test_the_template_and_what_ends_a_turn_go_with_adapter_and_model(here, base):
    (here / "mine.jinja").write_text(TEMPLATE)
    adapter = trained(recipe(here, base))
    assert (adapter / "chat_template.jinja").read_text() == TEMPLATE
    settings = json.loads((base / "generation_config.json").read_text())
    kept = json.loads((adapter / "generation_config.json").read_text())
    assert kept == settings | {"eos_token_id": [TEXT, TURN]}
    merge(MergeRequest(find_subject(str(base), adapter), here / "out"))
    for name in ("chat_template.jinja", "generation_config.json"):
        assert (here / "out" / name).read_text() == (adapter / name).read_text()
    stock = AutoTokenizer.from_pretrained(here / "out")
    turns = [{"role": "user", "content": "Colour of snow?"}]
    asked = stock.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    tokenizer = load_tokenizer(find_base(recipe(here, base).base), adapter)
    assert question("Colour of snow?", "chat", tokenizer)[1] == asked


def merged(here: Path, **how: Any) -> Any:
    return merge(MergeRequest(find_subject(run=here / "run"), here / "out", verified=True, **how))


def test_a_style_of_instructions_goes_with_the_model_as_a_template(here, base, monkeypatch):
    verify_in_this_process(monkeypatch)
    rows = [{"instruction": "Why?", "input": "", "output": f"So {n}."} for n in range(4)]
    rows[0]["input"] = "which no chat template has a place for"
    (here / "rows.json").write_text(json.dumps(rows))
    data = {"prompt": "alpaca", "held_out": 0}
    path = write_recipe(here / "r.yaml", base, here / "rows.json", data=data)
    adapter = trained(load_recipe(path, []))
    result = merged(here)
    second = "rows.json: row 2"
    assert re.fullmatch(
        rf"chat_template.jinja: the [\d,]+ tokens of .*{second}, as they were learned",
        result.verified.frame,
    )
    stock = AutoTokenizer.from_pretrained(here / "out")
    turns = [{"role": "user", "content": "Why?"}]
    written = stock.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    found = find_base(load_recipe(path, []).base)
    assert question("Why?", "alpaca", load_tokenizer(found))[1] == written
    assert in_frame("alpaca", load_tokenizer(found, adapter))
    assert not in_frame("alpaca", load_tokenizer(found))
    # Asked for chats, it and its base are given the same text.
    subject, plain = find_subject(run=here / "run"), find_subject(run=here / "run", base_only=True)
    (base / "chat_template.jinja").write_text(TEMPLATE)
    assert posed(way_of(subject, "chat"), "Why?") == posed(way_of(plain, "chat"), "Why?")
    (base / "chat_template.jinja").unlink()
    # One that was made before it was kept gets it all the same, and another frame is found out.
    (adapter / "chat_template.jinja").unlink()
    shutil.rmtree(here / "out")
    assert merged(here).verified.frame == result.verified.frame
    (adapter / "chat_template.jinja").write_text(template("llm-adapters", begins=True))
    shutil.rmtree(here / "out")
    with pytest.raises(SanError, match=rf"chat_template.jinja: its chat .*{second} otherwise than"):
        merged(here)
    assert not (here / "out").exists()
    (here / "rows.json").unlink()
    assert merged(here).verified.frame == f"not compared: {here / 'rows.json'} is not here"


def test_one_system_prompt_of_all_rows_is_what_the_model_is_asked_with(here, base, monkeypatch):
    verify_in_this_process(monkeypatch)
    (here / "mine.jinja").write_text(TEMPLATE)
    made = recipe(here, base)
    rows = [json.loads(line) for line in (here / "rows.jsonl").read_text().splitlines()]
    system = {"role": "system", "content": 'You "know"\ncolours.'}
    with_it = [{"messages": [system, *row["messages"]]} for row in rows]
    (here / "rows.jsonl").write_text("\n".join(map(json.dumps, with_it)))
    adapter = trained(made)
    tokenizer = load_tokenizer(find_base(made.base), adapter)
    text = "user: Colour of snow?<pad>\nassistant: "
    prompted = f"system: {system['content']}<pad>\n{text}"
    assert question("Colour of snow?", "chat", tokenizer)[0] == prompted
    subject = find_subject(run=here / "run")
    assert posed(way_of(subject, None), "Colour of snow?")[0] == prompted
    assert system_of(tokenizer.chat_template) == system["content"]
    other = posed(way_of(subject, None, system="Other."), "Colour of snow?")
    assert other[0] == f"system: Other.<pad>\n{text}"
    assert "as they were learned" in merged(here).verified.frame
    # Where one row has none, no prompt is everybody's.
    (here / "rows.jsonl").write_text("\n".join(map(json.dumps, [*with_it[1:], rows[0]])))
    shutil.rmtree(here / "run")
    assert question("?", "chat", load_tokenizer(find_base(made.base), trained(made)))[0] == (
        "user: ?<pad>\nassistant: "
    )


def test_a_run_that_goes_on_is_verified_by_its_adapters_template(here, base, monkeypatch):
    verify_in_this_process(monkeypatch)
    (here / "mine.jinja").write_text(TEMPLATE)
    trained(recipe(here, base)).parent.rename(here / "first")
    # The base has no template; the adapter that it goes on from has brought one along.
    on = recipe(here, base, chat_template=None)
    on = on.model_copy(update={"base": on.base.model_copy(update={"adapter": "first"})})
    trained(on)
    assert "as they were learned" in merged(here).verified.frame


def test_a_system_prompt_needs_a_place(here, base):
    rows = [{"instruction": "Why?", "input": "", "output": f"So {n}."} for n in range(4)]
    (here / "rows.json").write_text(json.dumps(rows))
    data = {"prompt": "alpaca", "held_out": 0}
    path = write_recipe(here / "r.yaml", base, here / "rows.json", data=data)
    trained(load_recipe(path, []))
    with pytest.raises(InputError, match="--system: prompt style alpaca has no place for one"):
        way_of(find_subject(run=here / "run"), None, system="Be brief.")


def test_an_answer_ends_with_its_turn(here, base):
    (here / "mine.jinja").write_text(TEMPLATE)
    made = recipe(here, base)
    by_heart = ["training.max_steps=60", "training.epochs=60", "training.learning_rate=3e-2"]
    by_heart += ["method.name=lora", "method.rank=16", "method.dropout=0", "data.held_out=0"]
    adapter = trained(load_recipe(here / "r.yaml", by_heart))
    found = find_base(made.base)
    model, tokenizer = load_model(found, adapter), load_tokenizer(found, adapter)
    for thing in COLOURS:
        _, tokens = question(f"Colour of {thing}?", "chat", tokenizer)
        answer = respond(model, tokenizer, tokens, Sampling(new_tokens=12), lambda text: None)
        assert answer.ended


def test_a_template_that_is_no_template_is_told(here, base):
    with pytest.raises(InputError, match=r"'chatlm' is not one of chatml, llama-3, .* 'chatml'"):
        recipe(here, base, chat_template="chatlm")
    with pytest.raises(InputError, match=r"chatml does nothing in the prompt style alpaca"):
        recipe(here, base, chat_template="chatml", prompt="alpaca")
    with pytest.raises(InputError, match=r"data.chat_template: no.jinja: cannot be read: No such"):
        trained(recipe(here, base, chat_template="no.jinja"))


def test_letters_that_end_a_turn_are_told(here, base, capsys):
    trained(recipe(here, base, chat_template="chatml"))
    told = "'<|im_end|>' ends a turn in the template, and is no token of this base's"
    assert told in " ".join(capsys.readouterr().err.split())
