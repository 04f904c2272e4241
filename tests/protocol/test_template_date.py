"""A chat template that writes today's date: learned and asked with one date, on any day."""

from __future__ import annotations

import io
import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli
from jinja2.exceptions import TemplateError
from tiny import CHAT_TEMPLATE, rows, tiny_tokenizer, write_recipe, write_rows
from transformers.utils import chat_template_utils

from san_llm.protocol.template_date import with_date

DATED = "Today: {{ strftime_now('%d %b %Y, %H:%M:%S') }}\n" + CHAT_TEMPLATE
TEMPLATES = {
    "as Llama 3.2": "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}'
    '{%- set date_string = "26 Jul 2024" %}{%- endif %}{%- endif %}'
    '{{- "Today Date: " + date_string + "\\n\\n" }}{{ messages[0].content }}',
    "as Mistral": '{%- set today = strftime_now("%Y-%m-%d") %}\n{{- today }}{{ messages }}',
    "as Granite": "{{ strftime_now('%B %d, %Y') }}.",
    "in a macro": "{% macro head() %}{{ strftime_now('%-d. %B %y, %A, %I %p') }}{% endmacro %}"
    "{{ head() }}",
    "of two texts": "{{ strftime_now('%' ~ 'd' ~ '.%m') }} {{ strftime_now('%d') }}",
    "begins with a line break": "\n\n  {{ strftime_now('%d') }}",
    "begins with a space": "  {% if true %} {{ strftime_now('%j') }}{% endif %}\n",
    "begins with a trimmed tag": "{%- if true -%}\n {{ strftime_now('%d') }}{% endif %}",
}


class Midnight(datetime):
    """A clock that stands."""

    @classmethod
    def now(cls, tz: Any = None) -> Midnight:
        return cls(2025, 3, 9)


def written(template: str) -> str:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    turns = [{"role": "user", "content": "Hello"}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_date_is_written_as_the_template_would_on_that_day(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = TEMPLATES[name]
    ours = written(with_date(template, "2025-03-09"))
    assert ours != written(with_date(template, "2026-11-30"))
    monkeypatch.setattr(chat_template_utils, "datetime", Midnight)
    assert ours == written(template)


def test_only_a_template_that_asks_for_the_date_is_changed() -> None:
    for date in (None, "2025-03-09"):
        assert with_date(CHAT_TEMPLATE, date) == CHAT_TEMPLATE
    with pytest.raises(TemplateError, match=r"data\.date=2024-07-26 in a recipe"):
        written(with_date(DATED, None))


@pytest.fixture
def dated(here: Path, tiny_base: Path) -> Path:
    """A recipe over a base whose template writes the second, and tasks to ask."""
    shutil.copytree(tiny_base, here / "base")
    (here / "base" / "chat_template.jinja").write_text(DATED)
    write_rows(here / "tasks" / "boolq" / "test.json", rows(2))
    train = write_rows(here / "rows.json", rows(12))
    chat = {"prompt": "chat", "cutoff": 512}
    training = {"max_steps": 2, "sample_prompts": ["Is 3 even?"]}
    asked = {"tasks": ["boolq"], "data": "tasks"}
    return write_recipe(
        here / "r.yaml", Path("base"), train, data=chat, training=training, evaluation=asked
    )


def test_a_run_learns_and_is_asked_one_date_on_every_day(
    here: Path, dated: Path, command: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def done(*words: object) -> Any:
        ended = command(*words)
        assert ended.returncode == 0, ended.stderr
        return ended

    def key(folder: str) -> str:
        return str(json.loads(Path(folder, "manifest.json").read_text())["key"])

    monkeypatch.setenv("SAN_LLM_CACHE", str(here / "cache"))
    done("train", dated, "data.date=2025-03-09", "--output", "one")
    caches = len(list(here.glob("cache/tokenized/*/")))
    monkeypatch.setattr(chat_template_utils, "datetime", Midnight)
    done("train", "one/recipe.yaml", "--output", "two")
    one, two = (Path(run, "adapter", "adapter_model.safetensors") for run in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert Path("one/log.jsonl").read_text() == Path("two/log.jsonl").read_text()
    assert len(list(here.glob("cache/tokenized/*/"))) == caches

    done("merge", "two", "--output", "merged")
    asked = {
        "run": ["two"],
        "merged": ["--model", "merged", "--tasks", "boolq", "--data", "tasks"],
        "other": ["two", "--date", "2024-07-26"],
    }
    for name, words in asked.items():
        done("eval", *words, "--output", f"eval-{name}")
        asked_rows = Path(f"eval-{name}", "rows.jsonl").read_text().splitlines()
        day = "26 Jul 2024" if name == "other" else "09 Mar 2025"
        for row in asked_rows:
            assert json.loads(row)["prompt"].startswith(f"Today: {day}, 00:00:00\n")
    monkeypatch.undo()
    monkeypatch.chdir(here)
    monkeypatch.setenv("SAN_LLM_CACHE", str(here / "cache"))
    done("eval", "two", "--output", "again")
    assert key("again") == key("eval-run") != key("eval-other")
    compared = done("compare", "eval-run", "eval-other")
    assert "date 2024-07-26, not 2025-03-09" in compared.stdout + compared.stderr

    one_token = ("--max-new-tokens", "1")
    generated = json.loads(done("generate", "Hi", "--run", "two", "--json", *one_token).stdout)
    assert generated["date"] == "2025-03-09"
    assert generated["prompt"].startswith("Today: 09 Mar 2025, 00:00:00\n")


def test_without_a_date_all_that_is_kept_is_refused_and_a_talk_is_told_todays(
    here: Path, dated: Path, command: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in (
        ("train", dated, "--output", "run"),
        ("plan", dated, "--data"),
        ("data", "inspect", dated),
        ("eval", "--model", "base", "--prompt", "chat", "--tasks", "boolq", "--data", "tasks"),
    ):
        refused = command(*words)
        assert refused.returncode == 2, (words, refused.stdout)
        assert "data.date=2024-07-26 in a recipe, --date" in refused.stderr.splitlines()[-1]
    assert not (here / "run").exists()
    today = f"{datetime.now():%Y-%m-%d}"
    done = command("generate", "Hi", "--model", "base", "--max-new-tokens", "1")
    assert f"told that today is {today}" in done.stderr
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    done = command("chat", "--model", "base", "--max-new-tokens", "1", "--date", "2025-03-09")
    assert "told that today is 2025-03-09" in done.stderr
    done = command("chat", "--model", "base", "--date", "9.3.2025")
    assert done.stderr == "error: --date: expected a date such as 2024-07-26, found '9.3.2025'\n"
