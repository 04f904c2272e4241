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

from san_llm.protocol.prompts import evaluation_prompt
from san_llm.recipe.read import load_recipe
from san_llm.runs.folder import new_run, point_latest

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


def test_chat_keeps_the_conversation_until_it_is_cleared(ask, folder):
    said = "Hello\n\nAnd then?\n/clear\nHello\n/exit\nnever\n"
    done = ask("chat", "--model", folder / "base", said=said)
    assert (done.returncode, done.stderr) == (0, CUT * 3)
    model = tiny_model()
    first = greedy(model, chat_text("Hello"))
    second = greedy(model, chat_text("Hello", first.strip(), "And then?"))
    assert done.stdout == "".join(f"{text.lstrip()}\n" for text in (first, second, first))
    assert first != second


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
