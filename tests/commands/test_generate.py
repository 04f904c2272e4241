"""Asking one prompt and talking: the greedy answer, in the right prompt, shown as it comes."""

import io
import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from san.adapted import adapt
from tiny import save_tiny, tiny_model, tiny_tokenizer, write_recipe
from transformers.utils import logging

from san_llm.data.split import split_held_out
from san_llm.protocol.prompts import evaluation_prompt
from san_llm.recipe.read import load_recipe
from san_llm.runs.folder import new_run, point_latest
from san_llm.runs.record import Hashes, RunManifest, write_run_manifest

NEW = 12
CUT = f"model: cut after {NEW} tokens (--max-new-tokens)\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny base and an adapter over it. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("talk")
    save_tiny(folder / "base")
    adapt(tiny_model()).save_pretrained(folder / "adapter")
    return folder


def greedy(model, text: str, special: bool = True) -> str:
    """Return the likeliest next tokens, one after another, without a cache or the library."""
    tokenizer = tiny_tokenizer()
    tokens = tokenizer(text, add_special_tokens=special)["input_ids"]
    start = len(tokens)
    with torch.no_grad():
        while len(tokens) < start + NEW:
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == tokenizer.eos_token_id:
                break
    return tokenizer.decode(tokens[start:], skip_special_tokens=True)


def chat_text(*said: str) -> str:
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
    return tiny_tokenizer().apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


@pytest.fixture
def ask(command, folder, monkeypatch):
    def run(*arguments, said=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(said))
        logging.disable_progress_bar()  # a process of its own is told by its environment
        return command(*arguments, "--max-new-tokens", NEW)

    return run


def test_a_base_answers_greedily_in_its_chat_template(ask, folder):
    done = ask("generate", "Why?", "--model", folder / "base")
    assert done.returncode == 0
    assert done.stderr == f"asking {folder / 'base'} in prompt style chat\n{CUT}"
    assert done.stdout.strip() == greedy(tiny_model(), chat_text("Why?")).strip()


@pytest.mark.parametrize("style", ["llm-adapters", "alpaca", "none"])
def test_a_prompt_from_stdin_is_asked_in_the_style_named(ask, folder, style):
    done = ask(
        *("generate", "--model", folder / "base", "--prompt-style", style, "--json"),
        said="Two\nlines\n",
    )
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    text = "Two\nlines" if style == "none" else evaluation_prompt(style, "Two\nlines")
    assert (said["style"], said["prompt"]) == (style, text)
    (answer,) = said["answers"]
    assert answer["text"] == greedy(tiny_model(), text)
    assert (answer["by"], answer["tokens"]) == ("model", NEW)
    assert not answer["ended"]


def test_an_adapter_answers_beside_its_base(ask, folder):
    which = ("--adapter", folder / "adapter", "--model", folder / "base")
    done = ask("generate", "a\nb", *which, "--compare", "--json")
    said = {answer["by"]: answer["text"] for answer in json.loads(done.stdout)["answers"]}
    model, text = tiny_model(), chat_text("a\nb")
    assert said == {"base": greedy(model, text), "adapted": greedy(adapt(model).eval(), text)}
    assert said["base"] != said["adapted"]
    shown = ask("generate", "a\nb", *which, "--compare").stdout
    header, *_ = (line for line in shown.splitlines() if line.strip())
    assert header.split() == ["base", "adapted"]
    alone = ask("generate", "a\nb", *which)
    assert alone.stdout.strip() == said["adapted"].strip()


def test_a_run_is_asked_in_the_style_that_it_was_trained_in(ask, folder, here):
    recipe = load_recipe(write_recipe(here / "mine.yaml", folder / "base", here / "rows.json"))
    run = new_run(recipe, None, False)
    adapt(tiny_model()).save_pretrained(run / "adapter")
    point_latest(run)
    for which in ((), ("--base-only",)):
        done = ask("generate", "Why?", *which, "--json")
        assert (done.stderr, json.loads(done.stdout)["style"]) == (f"run: {run}\n", "alpaca")
        assert json.loads(done.stdout)["prompt"] == evaluation_prompt("alpaca", "Why?")
    done = ask("generate", "Why?", "--input", "Snow", "--json")
    assert json.loads(done.stdout)["prompt"] == evaluation_prompt("alpaca", "Why?", "Snow")
    done = ask("generate", "Why?", "--input", "Snow", "--prompt-style", "none")
    assert done.returncode == 2
    assert "prompt style none has no place for one" in done.stderr
    save_tiny(run / "merged")
    (run / "merged" / "merge_manifest.json").write_text('{"prompt": "alpaca"}')
    done = ask("generate", "Why?", "--model", run / "merged", "--json")
    assert json.loads(done.stdout)["style"] == "alpaca"
    told = ask("chat").stderr
    assert told == (
        f"run: {run}\ntrained in prompt style alpaca, as `san-llm generate` asks; this is chat\n"
    )


def test_sampling_repeats_with_a_seed_and_differs_from_greedy(ask, folder):
    def text(*how):
        return ask("generate", "Why?", "--model", folder / "base", *how).stdout

    hot = ("--temperature", 5, "--seed")
    assert text(*hot, 1) == text(*hot, 1)
    assert len({text(*hot, 1), text(*hot, 2), text()}) == 3


# --- many rows ---

SYSTEM = {"role": "system", "content": "Be brief."}
ASKS = [{"role": "user", "content": "Why?"}]
ANSWERED = [*ASKS, {"role": "assistant", "content": "So."}, {"role": "user", "content": "Oh?"}]
FROM = {"user": "human", "assistant": "gpt"}
# Rows as files have them, and the turns that the model is to see.
ROWS = [
    ({"instruction": "Why?", "output": "So.", "answer": "so", "id": 7}, ASKS),
    ({"instruction": "Is it?", "input": "Snow"}, [{"role": "user", "content": "Is it?\n\nSnow"}]),
    ({"prompt": "Why?", "completion": "So."}, ASKS),
    ({"prompt": "Why?"}, ASKS),
    ({"prompt": ASKS, "completion": [{"role": "assistant", "content": "So."}]}, ASKS),
    ({"messages": [*ANSWERED, {"role": "assistant", "content": "Yes."}]}, ANSWERED),
    ({"messages": ANSWERED, "text": "the same"}, ANSWERED),
    ({"messages": ANSWERED, "prompt": "Why?"}, ANSWERED),
    (
        {
            "conversations": [{"from": FROM[t["role"]], "value": t["content"]} for t in ANSWERED],
            "system": SYSTEM["content"],
        },
        [SYSTEM, *ANSWERED],
    ),
    (
        {"instruction": "Oh?", "output": "Yes.", "history": [["Why?", "So."]]},
        ANSWERED,
    ),
]


def jsonl(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def in_template(turns):
    return tiny_tokenizer().apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def test_rows_of_every_shape_are_asked_up_to_their_answer(ask, folder, here):
    rows = jsonl(here / "rows.jsonl", [row for row, _ in ROWS])
    done = ask("generate", "--rows", rows, "--output", "out/a.jsonl", "--model", folder / "base")
    assert (done.returncode, done.stdout) == (0, "out/a.jsonl\n"), done.stderr
    assert f"asking {folder / 'base'} 10 rows in prompt style chat\n" in done.stderr
    assert f"10 answers were cut (--max-new-tokens {NEW}, or" in done.stderr
    model = tiny_model()
    assert read_jsonl(here / "out" / "a.jsonl") == [
        row | {"generated": greedy(model, in_template(turns))} for row, turns in ROWS
    ]


@pytest.mark.parametrize("style", ["alpaca", "llm-adapters", "none"])
def test_a_row_among_others_is_answered_as_it_is_alone(ask, folder, here, style):
    which = ("--adapter", folder / "adapter", "--model", folder / "base", "--prompt-style", style)
    values = [{"instruction": f"Is {n} {'x' * n} even?", "input": ""} for n in (3, 40, 1, 17)]
    if style != "none":
        values[1]["input"] = "Snow"
    jsonl(here / "rows.jsonl", values)
    done = ask(
        *("generate", "--rows", "rows.jsonl", "--output", "a.jsonl", "--compare", "--json", *which)
    )
    said = json.loads(done.stdout)
    cut = said.pop("cut")
    assert said == {
        "model": str(folder / "base"),
        "adapter": str(folder / "adapter"),
        "style": style,
        "rows": 4,
        "keys": ["generated_base", "generated"],
        "output": "a.jsonl",
    }
    for value, answered in zip(values, read_jsonl(here / "a.jsonl"), strict=True):
        more = ("--input", value["input"]) if value["input"] else ()
        alone = ask("generate", value["instruction"], *more, "--compare", "--json", *which)
        answers = json.loads(alone.stdout)["answers"]
        base, adapted = (answer["text"] for answer in answers)
        assert answered == value | {"generated_base": base, "generated": adapted}
        cut -= sum(not answer["ended"] for answer in answers)
    assert cut == 0


def test_a_model_that_cannot_be_packed_answers_rows_alike(folder):
    from san_llm.ask.answers import continuations
    from san_llm.ask.beam_search import BeamSearch
    from san_llm.ask.packed import can_pack

    prompts = [tiny_tokenizer()(text)["input_ids"] for text in ("Why is it?", "So", "And then")]
    model, unlike = tiny_model(), tiny_model()
    unlike.config.attn_logit_softcapping = 30.0  # of which no LLaMA knows, but who packs
    assert not can_pack(unlike, 100)
    search = BeamSearch(1, NEW, [1])
    packed, stock = (
        {
            number: tokens[: tokens.index(1) + 1] if 1 in tokens else tokens
            for some in continuations(one, 2, prompts, search, 3)
            for number, tokens in some
        }
        for one in (model, unlike)
    )
    assert packed == stock
    assert sorted(packed) == [0, 1, 2]


def test_a_run_reads_rows_by_its_columns_and_knows_what_it_holds_out(ask, folder, here):
    table = "".join(f"{n} {'x' * n}?,No {n}.\n" for n in range(8))
    (here / "rows.csv").write_text(f"Frage,Antwort\n{table}")
    columns = {"prompt": "Frage", "completion": "Antwort"}
    how = {"columns": columns, "held_out": 3, "limit": 8}
    recipe = load_recipe(
        write_recipe(here / "mine.yaml", folder / "base", here / "rows.csv", data=how)
    )
    run = new_run(recipe, None, False)
    adapt(tiny_model()).save_pretrained(run / "adapter")
    point_latest(run)
    (here / "new.csv").write_text("Frage,number\nWhy?,3\n")
    done = ask("generate", "--rows", "new.csv", "--output", "a.jsonl")
    assert done.returncode == 0, done.stderr
    model = adapt(tiny_model()).eval()
    (answered,) = read_jsonl(here / "a.jsonl")
    text = greedy(model, evaluation_prompt("alpaca", "Why?"))
    assert answered == {"Frage": "Why?", "number": "3", "generated": text}

    done = ask("generate", "--rows", "held-out", "--limit", 2)
    assert (done.returncode, done.stdout) == (0, f"{run}/held_out.jsonl\n"), done.stderr
    held_out = split_held_out(recipe).held_out[:2]
    assert read_jsonl(run / "held_out.jsonl") == [
        {
            "instruction": row.instruction,
            "input": "",
            "output": row.output,
            "generated": greedy(model, evaluation_prompt("alpaca", row.instruction)),
        }
        for row in held_out
    ]
    again = ask("generate", "--rows", "held-out")
    assert again.returncode == 2
    assert "held_out.jsonl: is there already; add --overwrite to replace it\n" in again.stderr
    data = {str(here / "rows.csv"): "0" * 64}
    write_run_manifest(run, RunManifest(sha256=Hashes(data=data)))
    changed = ask("generate", "--rows", "held-out", "--overwrite")
    assert changed.returncode == 2
    assert f"the rows of {run} have changed since" in changed.stderr


def test_a_row_near_the_contexts_end_gets_what_room_there_is(ask, folder, here):
    which = ("--model", folder / "base", "--prompt-style", "none")
    jsonl(here / "rows.jsonl", [{"prompt": "y" * 1018}, {"prompt": "Why?"}])
    done = ask("generate", "--rows", "rows.jsonl", "--output", "a.jsonl", *which)
    assert "2 answers were cut" in done.stderr
    for row in read_jsonl(here / "a.jsonl"):
        alone = json.loads(ask("generate", row["prompt"], *which, "--json").stdout)
        assert row["generated"] == alone["answers"][0]["text"]


def test_ctrl_c_leaves_no_answers_and_what_was_there(ask, folder, here, monkeypatch):
    jsonl(here / "rows.jsonl", [{"prompt": "Why?"}])
    (here / "a.jsonl").write_text("mine\n")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("san_llm.progress.Bar.advance", stop)
    done = ask(
        *("generate", "--rows", "rows.jsonl", "--output", "a.jsonl", "--overwrite"),
        *("--model", folder / "base"),
    )
    assert done.returncode == 130
    assert (here / "a.jsonl").read_text() == "mine\n"
    assert sorted(path.name for path in here.iterdir()) == ["a.jsonl", "rows.jsonl"]


# --- lines ---


def test_lines_are_answered_in_order_by_a_line_each(ask, folder):
    which = ("--model", folder / "base", "--prompt-style", "none")
    said = "Why?\n\nHow\r\nOh"
    done = ask("generate", "--lines", *which, said=said)
    model = tiny_model()
    texts = [greedy(model, text) for text in ("Why?", "How", "Oh")]
    one, three, four = (text.strip().replace("\n", "\\n") for text in texts)
    assert (done.returncode, done.stdout) == (0, f"{one}\n\n{three}\n{four}\n")
    cut = [f"line {number}: cut after {NEW} tokens" for number in (1, 3, 4)]
    assert done.stderr.splitlines()[1:] == cut
    done = ask("generate", "--lines", "--json", *which, said=said)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["line"], line["prompt"]) for line in lines] == [
        *((1, "Why?"), (2, ""), (3, "How"), (4, "Oh"))
    ]
    assert [[a["text"] for a in line["answers"]] for line in lines] == [
        *([texts[0]], [], [texts[1]], [texts[2]])
    ]
    assert done.stderr == ""


def test_a_line_too_long_ends_the_answers_and_is_named(ask, folder):
    done = ask("generate", "--lines", "--model", folder / "base", said=f"Why?\n{'x' * 1100}\n")
    assert done.returncode == 2
    assert len(done.stdout.splitlines()) == 1
    assert "error: stdin: line 2: the prompt has 1,123 tokens" in done.stderr


def test_a_line_is_answered_before_the_next_one_comes(here, folder):
    child = subprocess.Popen(
        [
            *(sys.executable, "-m", "san_llm", "generate", "--lines", "--json"),
            *("--model", folder / "base", "--max-new-tokens", "2"),
        ],
        cwd=here,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    for number in (1, 2):
        child.stdin.write(f"And {number}?\n")
        child.stdin.flush()
        assert json.loads(child.stdout.readline())["line"] == number
    child.stdin.close()
    assert child.wait(timeout=60) == 0
    child.stdout.close()


# --- conversations ---


def test_chat_keeps_the_conversation_until_it_is_cleared(ask, folder):
    said = "Hello\n\nAnd then?\n/clear\nHello\n/exit\nnever\n"
    done = ask("chat", "--model", folder / "base", said=said)
    assert (done.returncode, done.stderr) == (0, CUT * 3)
    model = tiny_model()
    first = greedy(model, chat_text("Hello"))
    second = greedy(model, chat_text("Hello", first.strip(), "And then?"))
    assert done.stdout == "".join(f"{text.lstrip()}\n" for text in (first, second, first))
    assert first != second


def test_a_conversation_goes_on_where_it_stopped(ask, folder, here, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(here / "state"))
    which = ("--adapter", folder / "adapter", "--model", folder / "base")
    whole = ask("chat", *which, said="Hello\nAnd then?\nSo?\n").stdout
    parts = [ask("chat", *which, said="Hello\n").stdout]
    assert ask("chat", "--model", folder / "base", said="Something else\n").returncode == 0
    (here / "linked").symlink_to(folder)  # the same model by another path
    again = ("--adapter", here / "linked" / "adapter", "--model", here / "linked" / "base")
    for text, count in (("And then?", 1), ("So?", 2)):
        done = ask("chat", *again, "--continue", said=f"{text}\n")
        assert f" (answers so far: {count})\n" in done.stderr
        parts.append(done.stdout)
    assert "".join(parts) == whole
    kept = sorted((here / "state" / "san-llm" / "chat").iterdir())
    assert len(kept) == 2  # a file a model
    assert oct((here / "state" / "san-llm" / "chat").stat().st_mode)[-3:] == "700"
    # Of a compared conversation either side may go on alone, but not the other way round.
    done = ask("chat", *which, "--compare", "--continue", said="So?\n")
    assert done.returncode == 2
    assert "was not compared: base had no part in it\n" in done.stderr
    ask("chat", *which, "--compare", said="Hello\n")
    assert "(answers so far: 1)" in ask("chat", *which, "--continue").stderr
    for file in kept:
        file.write_text('{"turns": {"adapted": [{"role": "user"}]}}')
    done = ask("chat", *which, "--continue")
    assert done.returncode == 2
    assert done.stderr.endswith(".json: not a conversation that `san-llm chat` has kept\n")


def test_a_conversation_that_cannot_be_kept_goes_on(ask, folder, here, monkeypatch):
    (here / "state").write_text("a file")
    monkeypatch.setenv("XDG_STATE_HOME", str(here / "state"))
    done = ask("chat", "--model", folder / "base", said="Hello\n")
    assert done.returncode == 0
    assert done.stderr.endswith("san-llm/chat: the conversation cannot be kept: Not a directory\n")


def test_both_sides_of_a_compared_chat_keep_their_own_answers(ask, folder):
    which = ("--adapter", folder / "adapter", "--model", folder / "base")
    done = ask("chat", *which, "--compare", said="Hello\nAnd then?\n")
    assert done.returncode == 0
    model, shown = tiny_model(), []
    for side in (model, adapt(tiny_model()).eval()):
        first = greedy(side, chat_text("Hello"))
        shown.append(greedy(side, chat_text("Hello", first.strip(), "And then?")).strip())
    *_, last = (line for line in done.stdout.splitlines() if line.strip())
    for text in shown:
        # The tiny model's own line breaks and backslashes would be cut at the table's cells.
        assert text.split("\n")[-1][-4:] in done.stdout
    assert last


def test_a_conversation_that_fills_the_context_is_told_and_taken_back(ask, folder):
    done = ask("chat", "--model", folder / "base", said=f"{'x' * 1100}\nHello\n")
    assert done.returncode == 0
    assert done.stderr == (
        f"the prompt has 1,123 tokens, the model's context is 1,024; /clear begins anew\n{CUT}"
    )
    assert done.stdout.strip() == greedy(tiny_model(), chat_text("Hello")).strip()


def test_an_answer_that_the_context_cuts_says_so(ask, folder):
    done = ask("chat", "--model", folder / "base", said=f"{'y' * 995}\n")  # 1,018 tokens
    assert done.stderr == "model: cut after 6 tokens (the model's context is full)\n"
    done = ask("generate", "y" * 995, "--model", folder / "base", "--json")
    (answer,) = json.loads(done.stdout)["answers"]
    assert (answer["tokens"], answer["ended"], answer["full"]) == (6, False, True)


def test_what_cannot_be_asked_is_one_line(ask, folder, here):
    bare = save_tiny(here / "bare", num_hidden_layers=1)
    (bare / "chat_template.jinja").unlink()
    instead = "has no chat template; `san-llm generate --prompt-style alpaca` asks without one\n"
    which = ("--model", folder / "base")
    for arguments, message in {
        ("chat", "--model", bare): instead,
        ("generate", "x", "--model", bare, "--prompt-style", "chat"): instead,
        ("generate", "", *which): "error: the prompt is empty\n",
        ("generate", *which): "error: the prompt is empty\n",
        ("generate", "x", *which, "--compare"): "error: --compare: there is no adapter to leave",
        ("generate", "x", *which, "--prompt-style", "alpacca"): "(did you mean 'alpaca'?)\n",
        ("generate", "x", *which, "--dtype", "fp16"): "is not one of float32, bfloat16, float16",
        ("generate", "x" * 1100, *which): "error: the prompt has 1,123 tokens, the model's",
        ("chat",): "error: runs/latest: no run yet in this directory",
    }.items():
        done = ask(*arguments)
        assert (done.returncode, done.stdout) == (2, ""), arguments
        assert message in done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: ")
    asked = ask("generate", "x", "--model", bare)
    assert asked.stderr.startswith(f"asking {bare} in prompt style none\n")


def test_what_a_model_says_cannot_steer_a_terminal():
    from san_llm.ask.voices import shown

    assert shown("a\x1b[2Jb\tc\nd\x07é") == "a\\x1b[2Jb\tc\nd\\x07é"


@pytest.mark.slow
def test_a_terminal_is_asked_and_ctrl_d_ends_the_talk(here, folder):
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [
            *(sys.executable, "-m", "san_llm", "chat", "--model", folder / "base"),
            *("--max-new-tokens", str(NEW)),
        ],
        cwd=here,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "dumb"},
    )
    os.close(theirs)
    shown = ""

    def until(text: str) -> None:
        nonlocal shown
        begun = time.monotonic()
        while text not in shown and time.monotonic() - begun < 120:
            shown += os.read(ours, 4096).decode()

    until("> ")
    assert "/clear begins anew, /exit or Ctrl-D ends" in shown
    shown = ""
    os.write(ours, b"Hello\n")
    until("\n> ")
    answer = greedy(tiny_model(), chat_text("Hello")).strip().splitlines()
    assert all(line.strip() in shown for line in answer)
    os.write(ours, b"\x04")
    assert child.wait(timeout=60) == 0
    os.close(ours)
