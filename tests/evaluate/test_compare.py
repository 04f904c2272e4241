"""Comparisons of evaluations: the statistics against their definitions, and what is refused."""

from __future__ import annotations

import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from san_llm.errors import InputError
from san_llm.evaluate.compare import compare
from san_llm.evaluate.compare_tables import grids, latex, legend, markdown, remarks
from san_llm.evaluate.questions import Settings
from san_llm.evaluate.score import Choice, Judged, judge_choices, judge_text, score
from san_llm.evaluate.store import write_evaluation
from san_llm.evaluate.table import EvalResult
from san_llm.files import sha256_of
from san_llm.protocol.tasks import TASKS
from san_llm.recipe.read import load_recipe, to_yaml
from san_llm.recipe.shipped import shipped_recipes


def row(task, number, right):
    """Return a judged row of a generated text; None: without an answer."""
    first, second = TASKS[task].answers[:2]
    text = {True: first, False: second, None: "well"}[right]
    return judge_text(TASKS[task], number, f"prompt {number}", f"it is {text}", first)


def save(folder, rights, settings=None, rows=None, adapter=None, **identity):
    """Write an evaluation with these rows right, wrong or unparseable, by task."""
    settings = settings or Settings()
    judged = rows or [
        row(t, n, right) for t, found in rights.items() for n, right in enumerate(found)
    ]
    tasks = dict.fromkeys(one.task for one in judged)
    scores = tuple(score(TASKS[t], [one for one in judged if one.task == t]) for t in tasks)
    result = EvalResult(
        scores, settings, str(folder), {"title": f"model of {folder.name}", "adapter": adapter}
    )
    facts = {
        "data": {
            t: {"sha256": f"hash of {t}", "rows": sum(one.task == t for one in judged)}
            for t in tasks
        },
        "protocol": {"name": settings.protocol, "prompt": settings.prompt},
        "load": {"dtype": "float32"},
        "versions": {"torch": "2.13.0"},
        "device": "cpu",
        "code": "abc",
    } | identity
    folder.mkdir(parents=True)
    write_evaluation(folder, judged, result.results, {"identity": facts, "key": "k"})
    return folder


FIRST = {"boolq": [True, True, False, False, None, True], "piqa": [True, False, False, True]}
OTHER = {"boolq": [True, False, True, True, True, True], "piqa": [True, False, True, True]}


def test_accuracies_differences_and_changed_rows(tmp_path):
    result = compare([save(tmp_path / "a", FIRST), save(tmp_path / "b", OTHER)])
    first, other = result.runs
    assert result.rows == {"boolq": 6, "piqa": 4}
    assert first.accuracies["boolq"] == (0.5, pytest.approx(math.sqrt(0.25 / 5)))
    assert first.accuracies["average"][0] == 0.5
    assert other.accuracies["average"][0] == pytest.approx((5 / 6 + 3 / 4) / 2)
    assert (first.unparseable, other.unparseable) == (1, 0)
    assert (first.differences, first.changes) == ((), ())
    boolq, piqa, average = other.differences
    assert (boolq.gained, boolq.lost, piqa.gained, piqa.lost) == (3, 1, 1, 0)
    assert (average.gained, average.lost) == (4, 1)
    assert boolq.difference == pytest.approx(2 / 6)
    assert average.difference == pytest.approx((2 / 6 + 1 / 4) / 2)
    # Of 4 rows that one alone has right, 3 or more fall to one side in 10 of 16 cases.
    assert boolq.p == pytest.approx(10 / 16)
    assert piqa.p == 1
    assert average.p == pytest.approx(2 * (1 + 5) / 32)
    for found in other.differences:
        assert found.low <= found.difference <= found.high
    assert [(c.task, c.row, c.first, c.other) for c in other.changes] == [
        ("boolq", 1, "true", "false"),
        ("boolq", 2, "false", "true"),
        ("boolq", 3, "false", "true"),
        ("boolq", 4, None, "true"),
        ("piqa", 2, "solution2", "solution1"),
    ]


rights = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=25)


@given(rights)
@settings(deadline=None, max_examples=25)
def test_mcnemar_is_the_two_sided_binomial_tail(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("runs")
    one = save(folder / "a", {"boolq": [a for a, _ in pairs]})
    two = save(folder / "b", {"boolq": [b for _, b in pairs]})
    found = compare([one, two]).runs[1].differences[0]
    gained, lost = sum(b > a for a, b in pairs), sum(a > b for a, b in pairs)
    n, k = gained + lost, min(gained, lost)
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    assert found.p == pytest.approx(min(1.0, 2 * tail))
    assert (found.gained, found.lost) == (gained, lost)
    back = compare([two, one]).runs[1].differences[0]
    assert back.p == pytest.approx(found.p)
    assert back.difference == pytest.approx(-found.difference)


def test_the_interval_is_that_of_a_normal_approximation_where_there_are_many_rows(tmp_path):
    pattern = [True] * 6 + [False] * 4
    one = save(tmp_path / "a", {"boolq": pattern * 60, "piqa": pattern * 30})
    two = save(tmp_path / "b", {"boolq": (pattern[3:] + pattern[:3]) * 60, "piqa": pattern * 30})
    average = compare([one, two]).runs[1].differences[-1]
    # 6 of 10 pairs differ, half of them up: variance 0.6; piqa does not vary.
    spread = 1.96 * math.sqrt(0.6 / 600) / 2
    assert average.difference == 0
    assert average.high == pytest.approx(spread, rel=0.1)
    assert average.low == pytest.approx(-spread, rel=0.1)
    assert compare([one, two]).runs[1].differences == compare([one, two]).runs[1].differences


def test_equal_runs_and_single_rows_have_an_interval_of_no_width(tmp_path):
    one = save(tmp_path / "a", {"boolq": [True], "piqa": [False, True]})
    two = save(tmp_path / "b", {"boolq": [False], "piqa": [False, True]})
    boolq, piqa, average = compare([one, two]).runs[1].differences
    assert (boolq.low, boolq.high) == (-1, -1)
    assert (piqa.low, piqa.high, piqa.p) == (0, 0, 1)
    assert average.difference == -0.5
    assert compare([one, two]).runs[0].accuracies["average"][1] is None


def by_likelihood(task, number, best, best_norm):
    """Return a row whose most likely choice and most likely choice a character are these."""
    answers = TASKS[task].answers
    likely = {best: (-1.0, 4), best_norm: (-1.1, 10)}
    choices = []
    for place, answer in enumerate(answers):
        logprob, length = likely.get(place, (-9.0, 4))
        choices.append(Choice(answer, f"it is {answer}", logprob, False, length))
    return judge_choices(TASKS[task], number, "p", choices, answers[0])


def test_acc_norm_is_compared_where_it_was_measured(tmp_path):
    how = Settings(protocol="loglik")
    one = [by_likelihood("boolq", n, best=1, best_norm=0) for n in range(4)]
    two = [by_likelihood("boolq", n, best=0, best_norm=1) for n in range(4)]
    paths = [save(tmp_path / "a", {}, how, one), save(tmp_path / "b", {}, how, two)]
    assert compare(paths).runs[1].differences[0].difference == 1
    norm = compare(paths, "acc_norm").runs[1]
    assert norm.differences[0].difference == -1
    assert {(c.first, c.other) for c in norm.changes} == {("true", "false")}
    plain = save(tmp_path / "c", FIRST)
    with pytest.raises(InputError, match="c: its rows have no acc_norm"):
        compare([plain, plain], "acc_norm")


def test_what_is_not_the_same_question_is_refused(tmp_path):
    first = save(tmp_path / "a", FIRST)
    choices = [by_likelihood(t, n, 0, 1) for t, found in FIRST.items() for n in range(len(found))]
    others = {
        "protocol": save(tmp_path / "b", {}, Settings(protocol="loglik"), choices),
        "prompt": save(tmp_path / "c", FIRST, Settings(prompt="alpaca")),
    }
    for what, path in others.items():
        with pytest.raises(InputError, match=f"not the same {what}: .* --across"):
            compare([first, path])
        assert compare([first, path], across=True).runs[1].differences
    tasks = save(tmp_path / "d", {"boolq": FIRST["boolq"]})
    with pytest.raises(InputError, match="not the same tasks: boolq, piqa; boolq"):
        compare([first, tasks], across=True)
    short = save(tmp_path / "e", FIRST | {"piqa": FIRST["piqa"][:2]})
    with pytest.raises(InputError, match=r"piqa has another number of rows \(4 and 2\)"):
        compare([first, short], across=True)
    data = {t: {"sha256": "other", "rows": len(found)} for t, found in FIRST.items()}
    changed = save(tmp_path / "f", FIRST, data=data)
    with pytest.raises(InputError, match="boolq has another test file"):
        compare([first, changed], across=True)
    with pytest.raises(InputError, match="two evaluations at least"):
        compare([first])


def test_other_versions_and_dtypes_are_noted(tmp_path):
    first = save(tmp_path / "a", FIRST)
    half = save(tmp_path / "b", FIRST, load={"dtype": "bfloat16"}, versions={"torch": "3"})
    notes = compare([first, half, first]).notes
    assert notes == (
        f"{half}: dtype bfloat16, not float32",
        f"{half}: torch 3, not 2.13.0",
    )
    one = save(tmp_path / "c", FIRST, batch_size=None, processes=1)
    two = save(tmp_path / "d", FIRST, batch_size=8, processes=2)
    assert compare([one, two]).notes == (
        f"{two}: batch size 8, not chosen by memory",
        f"{two}: processes 2, not 1",
    )
    assert compare([first, two]).notes == ()  # the first's answers do not depend on either


def test_a_run_with_one_evaluation_stands_for_it(tmp_path):
    one = save(tmp_path / "run" / "eval" / "first", FIRST)
    (tmp_path / "run" / "recipe.yaml").write_text("")
    other = save(tmp_path / "b", OTHER)
    assert compare([tmp_path / "run", other]).runs[0].name == str(one)
    save(tmp_path / "run" / "eval" / "second", FIRST)
    with pytest.raises(InputError, match=r"has 2 evaluations: name one, such as .*second"):
        compare([tmp_path / "run", other])
    tuned = save(tmp_path / "run" / "eval" / "third-adapter", FIRST)
    assert compare([tmp_path / "run", other]).runs[0].name == str(tuned)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "recipe.yaml").write_text("")
    with pytest.raises(InputError, match=r"`san-llm eval --adapter .*new` makes one"):
        compare([tmp_path / "new", other])


# --- the command ---


@pytest.fixture
def pair(here):
    return save(here / "a", FIRST).name, save(here / "b_1", OTHER).name


def test_the_command_shows_tables_changes_and_quoted_numbers(command, pair):
    done = command("compare", *pair, "--published")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == "A  a: model of a (generate, llm-adapters)"
    assert "B answers 5 of 10 rows otherwise than A" in lines
    assert "  boolq row 4: A no answer, B true; right is true" in lines
    cells = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in lines]
    assert ["model (quoted)", "average", "trained", "loss on", "epochs", "source"] in cells
    assert ["ChatGPT", "77.0", "-", "-", "-", "DoRA"] in cells
    assert ["LLaMA3-8B LoReFT", "86.6", "0.026 %", "response", "6", "ReFT"] in cells
    assert ["LLaMA3-8B SAN", "85.5", "?", "not found out", "?", "SAN"] in cells
    assert "LLaMA3-8B SAN (quoted): carrier not known, likely DoRA" in lines
    title = lines.index(next(line for line in lines if line.startswith("published")))
    assert all(len(line) <= 80 for line in lines[title : title + 32])
    assert not any("learned the" in line for line in lines)  # of these no run is known
    assert "quoted, not measured here: DoRA, Liu et al. 2024, arXiv:2402.09353" in lines
    assert "quoted" not in command("compare", *pair).stdout


def test_json_has_everything(command, pair):
    value = json.loads(command("compare", *pair, "--json").stdout)
    assert [run["name"] for run in value["runs"]] == list(pair)
    assert len(value["runs"][1]["changes"]) == 5
    assert value["quoted"] == []
    quoted = json.loads(command("compare", *pair, "--published", "--json").stdout)["quoted"]
    (san,) = (one for one in quoted if one["name"] == "LLaMA3-8B SAN")
    assert san["share"] is san["epochs"] is None
    assert (san["learned"], san["note"]) == ("not found out", "carrier not known, likely DoRA")


def test_a_run_that_learned_otherwise_than_the_quoted_is_told_beside_them(command, here):
    def evaluated(name, *overrides, change=str):
        recipe = load_recipe(shipped_recipes()["llama7b_commonsense"], overrides)
        (here / name / "adapter").mkdir(parents=True)
        (here / name / "recipe.yaml").write_text(change(to_yaml(recipe)))
        save(here / name / "eval" / "x-adapter", FIRST, adapter=f"{name}/adapter")
        return name

    runs = [
        evaluated("whole", "data.loss=all", "training.epochs=3"),
        evaluated("part", "data.loss=response", "training.epochs=6"),
        evaluated("stopped", "data.loss=response", "training.max_steps=6", "training.epochs=6"),
        evaluated("later", change=lambda text: text.replace("loss:", "losses:")),
    ]
    told = "quoted; of the others one of these differs or was not found out"
    notes = [
        f"A learned the whole text for 3 epochs, as did 11 of the 26 {told}",
        f"B learned the response for 6 epochs, as did 10 of the 26 {told}",
        f"C learned the response for some steps, as did 0 of the 26 {told}",
    ]
    lines = command("compare", *runs, "--published").stdout.splitlines()
    assert [line for line in lines if "learned the" in line] == [f"note: {note}" for note in notes]
    tabular = command("compare", *runs, "--published", "--latex").stdout
    assert all(rf"\noindent {note}\par" in tabular for note in notes)
    assert "learned the" not in command("compare", *runs).stdout


def test_markdown_and_latex_hold_the_same_cells(command, pair, here):
    result = compare([here / name for name in pair], quote=True)
    assert [len(grid.rows) for grid in grids(result)] == [4, 3, 27]
    shown = command("compare", *pair, "--markdown").stdout
    assert "| boolq | 50.0 ± 22.4 | 83.3 ± 16.7 |" in shown
    assert "| no answer | 1 | 0 |" in shown
    assert "| boolq | +33.3 |" in shown
    tabular = command("compare", *pair, "--latex").stdout
    assert r"boolq & 50.0 $\pm$ 22.4 & 83.3 $\pm$ 16.7 \\" in tabular
    assert tabular.count(r"\begin{tabular}") == tabular.count(r"\end{tabular}") == 2
    assert r"\begin{tabular}{lrr}" + "\n" + r"\toprule" in tabular
    assert r"95\% interval" in tabular
    assert "% B  b_1: model of b_1" in tabular
    assert r"LLaMA-7B IA3, all & 77.8 & 0.02 \% & response & 6 & RoAd \\" in latex(result)
    assert "| LLaMA3-8B SAN | 85.5 | ? | not found out | ? | SAN |" in markdown(result)
    for text in (latex(result), markdown(result)):
        assert text.count("quoted, not measured here") == 6
        assert "LLaMA3-8B SAN (quoted): carrier not known, likely DoRA" in text
    assert len(legend(result)) == 2
    assert remarks(result)


def test_what_the_terminal_says_besides_stands_below_the_tables_for_a_text(command, here):
    first = save(here / "a", FIRST | {"piqa": [False] * 8}).name
    half = {"load": {"dtype": "bfloat16"}, "device": "GPU_1 & more", "code": "def"}
    other = save(here / "b_1", OTHER | {"piqa": [True] * 8}, **half).name
    said = command("compare", first, other).stdout
    said = said[said.index("average: difference") :].splitlines()
    assert said == [
        "average: difference and interval weigh tasks alike; counts and p pool all rows",
        "B answers 12 of 14 rows otherwise than A",
        "  boolq row 1: A true, B false; right is true",
        "  boolq row 2: A false, B true; right is true",
        "  boolq row 3: A false, B true; right is true",
        "  boolq row 4: A no answer, B true; right is true",
        "  piqa row 0: A solution2, B solution1; right is solution1",
        "  and 7 more; --json has them all",
        "note: b_1: dtype bfloat16, not float32",
        "note: b_1: on GPU_1 & more, not cpu",
        "note: b_1: measured by another state of san-llm's code",
    ]
    shown = command("compare", first, other, "--markdown").stdout
    below = shown[shown.rindex("\n\n") :].splitlines()
    assert below[4:] == [
        f"  - {line[2:]}" if line.startswith("  ") else f"- {line}" for line in said
    ]
    tabular = command("compare", first, other, "--latex").stdout
    assert tabular.endswith(
        r"""\end{tabular}

{\footnotesize
\noindent average: difference and interval weigh tasks alike; counts and p pool all rows\par
\noindent B: dtype bfloat16, not float32\par
\noindent B: on GPU\_1 \& more, not cpu\par
\noindent B: measured by another state of san-llm's code\par
}
"""
    )


def test_a_latex_table_says_in_print_what_else_its_runs_were_asked_by(tmp_path):
    alike = save(tmp_path / "a", {"boolq": FIRST["boolq"]})
    choices = [by_likelihood("boolq", n, 0, 1) for n in range(6)]
    other = save(tmp_path / "b", {}, Settings(protocol="loglik", prompt="chat"), choices)
    found = latex(compare([alike, alike, other], across=True))
    printed = [line for line in found.splitlines() if line.startswith(r"\noindent")]
    # One task is its own average. B is what A is, and C is not.
    assert printed == [
        r"\noindent C: protocol loglik, not generate\par",
        r"\noindent C: prompts chat, not llm-adapters\par",
    ]
    assert "footnotesize" not in latex(compare([alike, alike]))


def test_options_that_exclude_each_other_and_names_that_are_not_known(command, pair):
    done = command("compare", *pair, "--json", "--latex")
    assert done.returncode == 2
    assert done.stderr == "error: --markdown, --latex and --json exclude each other\n"
    done = command("compare", *pair, "--metric", "accnorm")
    assert done.stderr == (
        "error: --metric: 'accnorm' is not one of acc, acc_norm (did you mean 'acc_norm'?)\n"
    )
    done = command("compare", pair[0], "nowhere")
    assert (done.returncode, done.stderr) == (2, "error: nowhere: no such folder\n")


def test_the_written_rows_have_the_hash_that_the_manifest_names(pair, here):
    manifest = json.loads((here / "a" / "manifest.json").read_text())
    assert manifest["rows_sha256"] == sha256_of(here / "a" / "rows.jsonl")
    first = json.loads((here / "a" / "rows.jsonl").read_text().splitlines()[0])
    assert Judged.from_json(first) == row("boolq", 0, True)
