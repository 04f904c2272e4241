"""The page about runs: what it says is what the files say, and nothing in them becomes markup."""

import html
import json
import os
import re
import shlex
import shutil
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import open_page
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import rows, write_recipe, write_rows

from san_llm.evaluate.questions import Settings, read_questions
from san_llm.evaluate.request import EvalTask
from san_llm.evaluate.run import evaluate
from san_llm.evaluate.score import judge_text, score
from san_llm.evaluate.store import read_evaluation, write_evaluation
from san_llm.evaluate.table import EvalResult
from san_llm.files import sha256_of
from san_llm.look.evaluations import evenly
from san_llm.look.held_out import next_steps
from san_llm.look.page import environment, write_page
from san_llm.models.subject import Subject
from san_llm.protocol.tasks import TASKS, find_tasks
from san_llm.recipe.read import load_recipe
from san_llm.runs.folder import new_run, point_latest
from san_llm.train.run import train

HOSTILE = (
    "<script>document.title = 'owned'</script></style></pre><img src=http://example.com/x.png> "
    "{{ 7 * 7 }} \x1b[31mred\u202e hf_abcdefghijklmnopqrstuvwxyz"
)


class Reader(HTMLParser):
    """Keeps the texts of the elements of each kind, and which kinds there are."""

    def __init__(self, page):
        super().__init__()
        self.found, self._open = {}, []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.handle_data(" ")
        self.found.setdefault(tag, []).append("")
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        for tag in set(self._open):
            self.found[tag][-1] += data


def page_of(*runs, output=None):
    output = output or runs[0] / "report.html"
    write_page(runs, output, overwrite=True)
    return output.read_text(encoding="utf-8")


def words(page):
    """Return the text of a page as a reader sees it, in one line."""
    return " ".join(Reader(page).found["body"][0].split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_base):
    """A directory with a real run in it, and its evaluation and its base's, by likelihood."""
    here = tmp_path_factory.mktemp("page")
    piqa = [
        {
            "instruction": f"{'How? ' * (n + 1)}",
            "output": f"the correct answer is solution{n % 2 + 1}",
            "answer": f"solution{n % 2 + 1}",
            "input": "",
        }
        for n in range(12)
    ]
    write_rows(here / "rows.json", rows(24))
    write_rows(here / "data" / "boolq" / "test.json", rows(12))
    write_rows(here / "data" / "piqa" / "test.json", piqa)
    asked = {"tasks": ["boolq", "piqa"], "data": "data"}
    write_recipe(here / "mine.yaml", tiny_base, Path("rows.json"), evaluation=asked)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        run = new_run(load_recipe(here / "mine.yaml"), Path("runs/mine"), False)
        point_latest(run)
        recipe = load_recipe(run / "recipe.yaml")
        assert train(recipe, run).finished
        questions = read_questions(find_tasks(["boolq", "piqa"]), "data", None)
        for of in ("base", "adapter"):
            adapter = run / "adapter" if of == "adapter" else None
            subject = Subject(recipe.base, adapter, run, recipe)
            about = {
                "title": str(subject),
                "model": recipe.base.model,
                "adapter": str(adapter) if adapter else None,
                "data": "data",
                "limit": None,
            }
            settings = Settings("loglik", "alpaca")
            evaluate(EvalTask(subject, questions, settings, about, run / "eval" / of))
    return here


@pytest.fixture
def run(folder, here):
    """A copy of that directory to work in; the run's folder."""
    shutil.copytree(folder, here, symlinks=True, dirs_exist_ok=True)
    return Path("runs/mine")


def save(folder, texts, adapter, **changes):
    """Write an evaluation of boolq rows with these outputs, each asked something hostile."""
    judged = [
        replace(judge_text(TASKS["boolq"], n, f"p{n}", text, "true"), prompt=f"{HOSTILE} {n}")
        for n, text in enumerate(texts)
    ]
    result = EvalResult(
        (score(TASKS["boolq"], judged),),
        Settings("generate", "chat"),
        str(folder),
        {"title": HOSTILE, "model": "no base", "adapter": adapter, "data": HOSTILE, "limit": None},
    )
    identity = {
        "data": {"boolq": {"sha256": "h", "rows": len(judged)}},
        "protocol": {"name": "generate", "prompt": "chat", "strict": True, "answers_only": False},
        "load": {"dtype": "float32"},
        "adapter": {"adapter_model.safetensors": "a"} if adapter else None,
        "versions": {"torch": HOSTILE},
        "device": HOSTILE if adapter else "cpu",
        "code": "abc",
    }
    facts = {"made": "2026", "identity": identity, "batch_size": 3, "processes": 2}
    folder.mkdir(parents=True)
    write_evaluation(folder, judged, result.results, facts | changes)
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """No matplotlib, which takes most of a page's time."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


@pytest.fixture
def hostile(here):
    """A run whose every text was written by an enemy."""
    allowed = "".join(c for c in HOSTILE if c.isprintable()).partition("hf_")[0]
    texts = {"data": {"train": allowed}, "evaluation": {"data": allowed}}
    write_recipe(here / "mine.yaml", Path("no base"), Path("rows.json"), **texts)
    run = new_run(load_recipe(here / "mine.yaml"), here / "runs" / '"><b>&amp;', False)
    manifest = {"device": HOSTILE, HOSTILE: [HOSTILE], "versions": {"torch": HOSTILE}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "log.jsonl").write_text('{"step": 1, "loss": 1.5}\n{"step": 2, "loss": "<b>"}\n{"st')
    save(run / "eval" / "base", ["true", "", HOSTILE], None)
    save(run / "eval" / "<i>", ["false", HOSTILE, "true"], "runs/x/adapter")
    return run


def test_it_says_what_the_files_say(run):
    page = page_of(run)
    text = words(page)
    metrics = json.loads((run / "metrics.json").read_text())
    manifest = json.loads((run / "manifest.json").read_text())
    assert f"{metrics['trained_numbers']:,} numbers trained in 4 steps of 4 rows, on 20" in text
    assert f"{metrics['held_out_loss']:.4f} a token, at step {metrics['best_step']}" in text
    assert (run / "recipe.yaml").read_text() in Reader(page).found["code"]
    for value in (*manifest["versions"].values(), *manifest["sha256"]["data"].values()):
        assert value in text
    for of in ("base", "adapter"):
        average = read_evaluation(run / "eval" / of).results.average
        for value, error in (
            (average.accuracy, average.standard_error),
            (average.accuracy_norm, average.standard_error_norm),
        ):
            assert f"{100 * value:.1f} ± {100 * error:.1f}" in text
    assert "95% interval" in text
    assert "task rows guessing base adapted" in text
    assert "boolq 12 50.0" in text
    assert "Accuracy (acc), percent" in text
    assert "(acc_norm), percent" in text
    assert len(re.findall("potentiated, %", text)) == 1
    assert "left out" not in text
    assert page.count("data:image/svg+xml") == 5


def test_changed_answers_are_rows_of_both_evaluations(run):
    text = words(page_of(run))
    base, adapted = (read_evaluation(run / "eval" / of).rows for of in ("base", "adapter"))
    changed = [
        (one, two) for one, two in zip(base, adapted, strict=True) if one.parsed != two.parsed
    ]
    assert len(changed) > 1  # or this test says nothing
    assert f"{len(changed)} of 24 rows are answered otherwise" in text
    assert text.count(": now ") + text.count(": still wrong") == min(10, len(changed))
    shown = re.findall(r"(boolq|piqa), row (\d+): (now right|now wrong|still wrong)", text)
    places = {(one.task, str(one.row)): (one, two) for one, two in changed}
    for task, row, verdict in shown:
        one, two = places[task, row]
        told = {(True, False): "now wrong", (False, True): "now right"}
        assert verdict == told.get((one.correct, two.correct), "still wrong")
        assert f"base: {one.parsed} {one.output} adapted: {two.parsed} {two.output}" in text


def test_its_commands_make_the_run_and_its_scores_again(run, command):
    page = page_of(run)
    commands = [
        shlex.split(text) for text in Reader(page).found["code"] if text.startswith("san-llm ")
    ]
    Path("recipe.yaml").write_text(
        next(text for text in Reader(page).found["code"] if text.startswith("name:"))
    )
    assert [words[1] for words in commands] == ["train", "eval", "eval", "report"]
    for one in commands:
        assert command(*one[1:]).returncode == 0
    again = Path("runs/again")
    same = "adapter/adapter_model.safetensors"
    assert sha256_of(again / same) == sha256_of(run / same)
    kinds = {"base": "*-base", "adapter": "*-adapter"}
    for of, name in kinds.items():
        (made,) = (again / "eval").glob(name)
        assert (made / "rows.jsonl").read_bytes() == (run / "eval" / of / "rows.jsonl").read_bytes()
    (told,) = re.findall(
        r"Accuracy over [^.]*\.[^)]*\)", words((again / "report.html").read_text())
    )
    assert told in words(page)


def test_what_a_run_does_not_have_is_said_with_its_command(run, command, undrawn):
    shutil.rmtree(run / "eval" / "base")
    done = command("report", "--json")
    assert done.returncode == 0
    (missing,) = (one for one in json.loads(done.stdout)["missing"] if one["command"])
    assert missing["command"] == "san-llm eval runs/mine --base-only --protocol loglik"
    assert missing["command"] in words((run / "report.html").read_text())
    assert "Accuracy (acc)" not in words((run / "report.html").read_text())
    point_latest(Path("elsewhere"))
    assert missing["command"] in words(page_of(run))  # it names the run, whichever is the last
    shutil.rmtree(run / "eval")
    done = command("report", run, "--overwrite")
    assert done.stdout == "runs/mine/report.html\n"
    asked = "san-llm generate --run runs/mine --rows held-out --limit 10 --compare"
    assert f"runs/mine: It was not asked its held-out rows.\n  {asked}\n" in done.stderr
    assert "san-llm eval" not in done.stderr
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["row_kind"] == "own"  # what an older version has not written
    (run / "metrics.json").write_text(
        json.dumps({key: value for key, value in metrics.items() if key != "row_kind"})
    )
    done = command("report", run, "--overwrite")
    assert "Its adapter was not evaluated.\n  san-llm eval --adapter runs/mine/adapter\n" in (
        done.stderr
    )
    shutil.rmtree(run / "adapter")
    assert "san-llm train runs/mine --resume" in words(page_of(run))
    for name in ("metrics.json", "manifest.json", "log.jsonl"):
        (run / name).unlink()
    text = words(page_of(run))
    assert "Training is not finished: stopped after step 0." in text
    assert "Training has not begun." in text


def test_answers_to_held_out_rows_stand_beside_the_expected_ones(run, command, undrawn):
    shutil.rmtree(run / "eval")
    asked = ("generate", "--run", run, "--rows", "held-out", "--limit", 10, "--compare")
    done = command(*asked, "--max-new-tokens", 8)
    assert done.returncode == 0, done.stderr
    text = words(page_of(run))
    answers = [json.loads(line) for line in (run / "held_out.jsonl").read_text().splitlines()]
    assert f"The first {len(answers)} that were answered" in text
    shown = " ".join(text.split())
    for row in answers:
        asked = " ".join(row["instruction"].split())
        assert f"{asked} expected {row['output']} base " in shown
    assert "It was not asked" not in text
    hostile = {"instruction": HOSTILE, "output": HOSTILE, "generated": HOSTILE}
    (run / "held_out.jsonl").write_text(json.dumps(hostile) + "\n")
    assert "script" not in Reader(page_of(run)).found
    (run / "held_out.jsonl").write_text(json.dumps({"instruction": "Why?"}) + "\n")
    text = words(page_of(run))
    assert "held_out.jsonl: line 1: not an answered row of `san-llm generate --rows`" in text


@pytest.mark.parametrize(
    ("kind", "held_out", "changes", "steps"),
    [
        ("tasks", True, {}, ["ask --compare", "eval"]),
        ("own", True, {}, ["held-out --compare", "ask --compare"]),
        ("own", False, {}, ["ask --compare"]),
        ("texts", True, {}, ["ask --compare"]),
        (
            "own",
            True,
            {"data": {"prompt": "chat"}},
            ["held-out --compare", "ask --compare", "chat"],
        ),
        ("own", True, {"method": {"name": "full"}}, ["held-out", "ask"]),
        ("own", False, {"evaluation": {"tasks": ["mine.yaml"]}}, ["ask --compare", "eval"]),
    ],
)
def test_what_is_next_is_of_the_rows_that_were_learned(here, kind, held_out, changes, steps):
    recipe = load_recipe(write_recipe(here / "r.yaml", here / "base", here / "rows", **changes))
    spelled = {
        "held-out": "san-llm generate --rows held-out --limit 10",
        "ask": 'san-llm generate "..."',
    }
    wanted = []
    for step in steps:
        first, *more = step.split()
        wanted.append(" ".join([spelled.get(first, first), *more]))
    assert next_steps(recipe, kind, held_out) == [*wanted, "merge --verify", "report"]


def test_without_matplotlib_it_has_no_drawings_and_says_so(run, undrawn):
    page = page_of(run)
    assert "img" not in Reader(page).found
    assert "drawings need matplotlib: `pip install 'san-llm[plots]'` gets it" in words(page)
    assert "Losses, a token" in words(page)


def test_a_damaged_evaluation_is_left_out_and_told(run, undrawn):
    (run / "eval" / "base" / "rows.jsonl").write_text("{}\n")
    (run / "eval" / "odd").mkdir()
    save(run / "eval" / "other", ["true", "false"], None, identity={"data": 3})
    text = words(page_of(run))
    assert text.count("An evaluation is left out") == 3
    assert "Accuracy, percent" in text  # the adapter's own still stands


def test_runs_stand_side_by_side_and_share_a_base(run, here, undrawn):
    other = here / "runs" / "other"
    shutil.copytree(run, other)
    shutil.rmtree(other / "eval" / "base")
    recipe = (other / "recipe.yaml").read_text()
    (other / "recipe.yaml").write_text(recipe.replace("mode: both", "mode: neuron"))
    page = page_of(run, Path("runs/other"), output=here / "both.html")
    text = words(page)
    assert "method.mode both neuron" in text
    assert "B - A, points" in text
    assert "was not asked" not in text  # the first run's base answers for the second
    assert text.count("only adapted right") == 4
    assert text.count("B: other SAN (scale carrier, mode neuron)") == 2
    (other / "recipe.yaml").write_text(recipe)
    assert "The recipes say the same." in words(page_of(run, other, output=here / "both.html"))
    shutil.rmtree(other / "eval")
    text = words(page_of(run, other, output=here / "both.html"))
    assert "No two of the runs were evaluated" in text


def test_hostile_texts_are_shown_as_texts(hostile):
    page = page_of(hostile)
    found = Reader(page).found
    assert "script" not in found
    assert re.findall('<img src="[a-z]+:[a-z]+/', page) == ['<img src="data:image/'] * 2
    assert len(found["img"]) == 2
    assert len(found["style"]) == 1
    assert "example.com" not in found["style"][0]
    assert "49" not in words(page).replace(str(hostile), "")
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "hf_abc" not in page
    shown = "<script>document.title = 'owned'</script></style></pre><img src=http://example.com/x"
    assert words(page).count(shown) >= 10
    assert r"\x1b[31mred\u202e ***" in words(page)
    assert "2 now wrong" not in words(page)


PARAGRAPH = environment().from_string("<p>{{ text }}</p>")


@settings(deadline=None)
@given(st.text())
def test_any_text_comes_back_as_it_was(text):
    made = PARAGRAPH.render(text=text)
    inside = made.removeprefix("<p>").removesuffix("</p>")
    assert not set("<>\"'") & set(inside)
    assert all(c.isprintable() or c == "\n" for c in inside)
    if text.isprintable() and "\\" not in text:
        assert html.unescape(inside) == text


@settings(deadline=None)
@given(st.lists(st.integers(), unique=True), st.integers(2, 12))
def test_a_choice_is_in_order_and_has_both_ends(values, count):
    chosen = evenly(values, count)
    assert len(chosen) == min(count, len(values))
    assert [value for value in values if value in chosen] == chosen
    if values:
        assert (chosen[0], chosen[-1]) == (values[0], values[-1])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere"], "nowhere: not a run: no recipe.yaml in it"),
        (["runs/mine", "runs/latest"], "a run is named twice"),
        (["--output", "runs"], "runs: a folder stands there; expected a file to write to"),
        (["--output", "rows.json"], "rows.json: is there already; add --overwrite to replace it"),
        (["--output", "rows.json/x"], "rows.json/x: rows.json is not a folder"),
    ],
)
def test_what_cannot_be_is_one_line_and_writes_nothing(run, command, arguments, told):
    before = sorted(os.walk("."))
    done = command("report", *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {told}\n")
    assert sorted(os.walk(".")) == before


def test_a_manifest_or_metrics_of_another_shape_are_refused(run, command):
    (run / "metrics.json").write_text('{"steps": "many"}')
    done = command("report")
    assert done.returncode == 2
    assert done.stderr.startswith("error: runs/mine/metrics.json: steps: ")
    (run / "metrics.json").unlink()
    (run / "manifest.json").write_text('{"versions": 3}')
    assert command("report").stderr.startswith("error: runs/mine/manifest.json: versions: ")


def test_a_browser_shows_it_on_a_phone_and_by_night(run, hostile, here):
    page_of(run, hostile, output=here / "both.html")
    with open_page(here / "both.html") as browser:
        assert browser.title().endswith(": report")
        seen = {
            (width, scheme): browser.look(width, scheme)
            for width in (390, 1200)
            for scheme in ("light", "dark")
        }
        for (width, _), look in seen.items():
            assert look.scroll_width <= width
            assert look.faint == []  # WCAG AA
            assert look.text_height > 5000
        assert seen[390, "light"].background != seen[390, "dark"].background
        assert browser.broken_links() == []
        assert browser.repeated_ids() == []
        assert browser.broken_pictures() == []
        assert browser.console() == []
        assert browser.requests() == {(here / "both.html").as_uri()}
