"""The table of runs, and removing one: asked for, whole, and nothing beside it."""

import io
import json
import os
import sys

import pytest
from tiny import rows, save_tiny, write_recipe, write_rows

from san_llm.recipe.read import load_recipe
from san_llm.runs.folder import new_run, point_latest
from san_llm.runs.lock import sole_writer


@pytest.fixture
def recipe(here):
    write_rows(here / "rows.json", rows(12))
    return write_recipe(here / "mine.yaml", here / "model", here / "rows.json")


@pytest.fixture
def make(recipe, here):
    """Make a run's folder as training does, with a name of its own."""

    def run(name, age=0, **log):
        folder = new_run(load_recipe(recipe), here / "runs" / name, False)
        (folder / "log.jsonl").write_text('{"step": 1}\n' + json.dumps(log) + '\n{"ste')
        point_latest(folder)
        os.utime(folder / "recipe.yaml", (1000 - age, 1000 - age))
        return folder

    return run


@pytest.fixture
def answer(command, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def run(said, *arguments):
        monkeypatch.setattr(sys, "stdin", Terminal(said))
        return command("runs", "rm", *arguments)

    return run


def test_a_real_run_is_listed_with_what_it_came_to(command, here, recipe):
    save_tiny(here / "model")
    assert command("runs").stderr == (
        "no run yet in this directory: `san-llm train RECIPE` makes one\n"
    )
    trained = json.loads(command("train", recipe, "--json").stdout)
    data = write_rows(here / "data" / "boolq" / "test.json", rows(2)).parents[1]
    scored = json.loads(command("eval", "--tasks", "boolq", "--data", data, "--json").stdout)
    done = command("runs", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    (run,) = json.loads(done.stdout)
    assert (run["run"], run["latest"], run["status"]) == (trained["run"], True, "finished")
    assert (run["method"], run["base"]) == ("san", str(here / "model"))
    assert (run["steps"], run["loss"]) == (trained["steps"], trained["held_out_loss"])
    (score,) = run["scores"]
    assert score["accuracy"] == scored["average"]["accuracy"]
    assert (score["of"], score["folder"]) == ("adapter", scored["output"])
    files = [path for path in (here / run["run"]).rglob("*") if path.is_file()]
    assert run["bytes"] == sum(path.stat().st_size for path in files)
    header, line, *_ = command("runs").stdout.splitlines()
    assert header.split()[:3] == ["run", "status", "method"]
    for part in (run["run"], "finished", "san", f"{run['loss']:.4f}"):
        assert part in line
    for name, model in (("x-of-base", run["base"]), ("y-of-merged", "merged")):
        results = {**scored, "adapter": None, "model": model}
        (here / run["run"] / "eval" / name).mkdir()
        (here / run["run"] / "eval" / name / "results.json").write_text(json.dumps(results))
    (again,) = json.loads(command("runs", "--json").stdout)
    assert [score["of"] for score in again["scores"]] == ["adapter", "base", "another model"]


def test_each_state_is_told_the_oldest_run_first(command, here, make, monkeypatch):
    make("broken", age=3)
    (here / "runs" / "broken" / "recipe.yaml").write_text("{")
    os.utime(here / "runs" / "broken" / "recipe.yaml", (1, 1))
    make("stopped", age=2, step=7, eval_loss=1.5)
    busy = make("busy", age=1, step=9)
    (here / "runs" / "eval").mkdir()
    with sole_writer(busy):
        found = json.loads(command("runs", "--json").stdout)
    assert [(run["run"], run["status"], run["steps"], run["loss"]) for run in found] == [
        ("runs/broken", "damaged", 0, None),
        ("runs/stopped", "stopped", 7, 1.5),
        ("runs/busy", "running", 9, None),
    ]
    assert [run["latest"] for run in found] == [False, False, True]
    monkeypatch.setenv("COLUMNS", "60")
    piped = command("runs").stdout.splitlines()
    assert piped[2].split()[:7] == ["runs/stopped", "stopped", "san", "7", "1.5000", "-", "-"]
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("LINES", "25")  # rich takes a dumb terminal's width only with its height
    narrow = command("runs").stdout.splitlines()
    assert narrow[2] == "runs/stopped"
    assert narrow[3].startswith("  stopped, san, steps 7, best loss 1.5000, size ")
    assert json.loads(command("runs", "--json").stdout)[2]["status"] == "stopped"


def test_the_last_run_is_listed_where_it_is(command, here, make):
    elsewhere = make("../elsewhere")
    (run,) = json.loads(command("runs", "--json").stdout)
    assert (run["run"], run["latest"]) == (str(elsewhere.resolve()), True)


def test_rm_asks_first_and_no_is_no(answer, here, make):
    run = make("one", step=3)
    done = answer("n\n", "one")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("runs/one: stopped, 3 steps, ")
    assert "Remove it? [y/N]" in done.stderr
    assert done.stderr.endswith("nothing was removed\n")
    assert (run / "log.jsonl").is_file()
    done = answer("y\n", "one", run)
    assert (done.returncode, done.stdout) == (0, "")
    assert "removed runs/one" in done.stderr
    assert os.listdir(here / "runs") == [], "nor is it the last run any more"


def test_rm_without_anybody_to_ask_needs_yes(command, here, make, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    make("one")
    make("two")
    done = command("runs", "rm", "one")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: rm: nobody can be asked here; add --yes to remove without asking\n"
    )
    assert command("runs", "rm", "one", "--yes").returncode == 0
    assert sorted(os.listdir(here / "runs")) == ["latest", "two"]
    assert os.readlink(here / "runs" / "latest") == "two"


def test_rm_leaves_alone_what_is_not_a_run_in_runs(command, here, make):
    run = make("mine")
    (make("noted") / "notes.txt").write_text("mine")
    busy = make("busy")
    make("../elsewhere")
    (here / "runs" / "eval").mkdir()
    (here / "runs" / "link").symlink_to(here / "elsewhere")
    before = sorted(here.rglob("*"))
    with sole_writer(busy):
        for name, told in {
            "gone": "error: gone: no such run",
            "min": "error: min: no such run (did you mean 'mine'?)\n",
            "noted": "error: noted: not a run of ours (notes.txt is in it): not removed\n",
            "eval": "error: eval: not a run of ours (no recipe.yaml): not removed\n",
            "busy": f"error: runs/busy: process {os.getpid()} has been training into it since",
            "elsewhere": "error: elsewhere: no such run",
            "../elsewhere": "error: ../elsewhere: no such run",
            "latest": "error: latest: is not in runs/, so it is not removed\n",
            "runs/link": "error: runs/link: is not in runs/, so it is not removed\n",
            "runs/mine/..": "error: runs/mine/..: is not in runs/, so it is not removed\n",
            ".": "error: .: ",
        }.items():
            done = command("runs", "rm", "mine", name, "--yes")
            assert (done.returncode, done.stdout) == (2, ""), name
            assert done.stderr.startswith(told)
    assert sorted(here.rglob("*")) == [path for path in before if path.name != "lock"]
    assert run.is_dir()


def test_rm_takes_links_away_and_leaves_what_they_lead_to(command, here, make):
    run = make("mine")
    (here / "precious").mkdir()
    (here / "precious" / "file").write_text("here")
    (run / "merged").symlink_to(here / "precious")
    (run / "eval").mkdir()
    (run / "eval" / "out").symlink_to(here / "precious")
    (run / "adapter").symlink_to("nowhere")
    (found,) = json.loads(command("runs", "--json").stdout)
    assert found["status"] == "damaged"
    assert command("runs", "rm", "mine", "--yes").returncode == 0
    assert not run.exists()
    assert (here / "precious" / "file").read_text() == "here"
