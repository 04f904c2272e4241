"""Task files: what they may say, and how a mistake in one is told."""

from pathlib import Path

import pytest

from san_llm.errors import InputError
from san_llm.protocol.tasks import TASKS
from san_llm.recipe.read import parse_recipe
from san_llm.recipe.task_file import JUDGES, USED, TaskFile, find_any, load_task

ROOT = Path(__file__).resolve().parents[2]
BASE = "base: {model: m}\nmethod: {name: san}\ndata: {train: pocket, loss: all}\n"
BASE += "training: {learning_rate: 1e-3}\n"


def write(folder, text, name="mine.yaml"):
    (folder / name).write_text(text)
    return folder / name


def test_a_file_names_its_rows_from_its_own_folder_on_and_is_called_by_its_stem(here):
    (here / "sub").mkdir()
    task = load_task(write(here / "sub", "rows: r.jsonl\njudge: exact\n"))
    assert (task.name, task.rows, task.says.new_tokens) == ("mine", here / "sub" / "r.jsonl", None)
    named = load_task(write(here, "name: other\nrows: /r.json\njudge: loss\nprompt: none\n"))
    assert (named.name, named.rows, named.says.prompt) == ("other", Path("/r.json"), "none")


def test_a_template_may_have_lines_and_written_braces(here):
    task = load_task(write(here, 'rows: r\njudge: exact\ntemplate: "{a}\\n{{x}}\\t{b c}"\n'))
    assert task.says.template == "{a}\n{{x}}\t{b c}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("judge: exact\n", "mine.yaml: rows: missing"),
        ("rows: r\n", "mine.yaml: judge: missing"),
        ("rows: r\njudge: exat\n", "mine.yaml:2: judge: 'exat' is not one of"),
        ("rows: r\njudge: rouge\n", "did you mean 'rouge-l'?"),
        ("rows: r\njudge: exact\nanswr: a\n", "mine.yaml:3: answr: unknown key (did you mean"),
        (
            "rows: r\njudge: exact\npattern: x\n",
            "mine.yaml:3: pattern: judge exact has no use for it; it belongs to pattern",
        ),
        (
            "rows: r\njudge: loss\nnew_tokens: 4\n",
            "new_tokens: judge loss has no use for it; it belongs to pattern, exact, contains, ",
        ),
        ("rows: r\njudge: choice\n", "mine.yaml: choices: missing; judge choice needs it"),
        ("rows: r\njudge: pattern\n", "mine.yaml: pattern: missing; judge pattern needs it"),
        (
            "rows: r\njudge: pattern\npattern: '(a'\n",
            "mine.yaml:3: pattern: '(a' is not a regular expression: missing )",
        ),
        ("rows: r\njudge: exact\ntemplate: 'a {b'\n", "mine.yaml:3: template: expected '}'"),
        ("rows: r\njudge: exact\ntemplate: '{a.b}'\n", "template: {a.b} is no place: expected"),
        ("rows: r\njudge: exact\ntemplate: '{}'\n", "template: {} is no place"),
        ("rows: r\njudge: exact\ntemplate: '{a:>9}'\n", "template: {a:>9} is no place"),
        (
            "rows: r\njudge: exact\nquestion: q\ntemplate: '{q}'\n",
            "question and template say the same",
        ),
        ("rows: r\njudge: choice\nchoices: [a]\n", "choices: expected two texts or more"),
        ("rows: r\njudge: choice\nchoices: [a, b, a]\n", "none of them twice"),
        ("rows: r\njudge: choice\nchoices: [a, '']\n", "choices: a choice is empty"),
        (
            "rows: r\njudge: choice\nchoices: 3\n",
            "mine.yaml:3: choices: expected a list of two texts or more, or the name of a column",
        ),
        ("rows: r\njudge: exact\nprompt: alpacca\n", "'alpacca' is not one of llm-adapters"),
        ("rows: r\njudge: exact\nguessing: 2\n", "guessing: input should be less than 1"),
        ("rows: r\njudge: exact\nlr: 2\n", "lr: unknown key: known here are name, rows, judge"),
        ("- a\n", "expected a mapping with the keys rows, judge and others; rows belong in a"),
        ("rows: &a r\n", "mine.yaml:1: not valid YAML: &a: a task file has no anchors"),
    ],
)
def test_a_mistake_is_named_with_its_line_and_what_would_be_right(here, text, said):
    path = write(here, text)
    with pytest.raises(InputError) as told:
        load_task(path)
    assert said in str(told.value)


def test_all_mistakes_are_told_at_once(here):
    path = write(here, "judge: number\nchoices: [a, b]\nlimit: 0\nanswr: a\n")
    with pytest.raises(InputError) as told:
        load_task(path)
    lines = str(told.value).splitlines()
    assert [line.split(": ")[1] for line in lines] == ["choices", "rows", "limit", "answr"]


def test_every_key_is_known_to_be_of_all_judges_or_of_some():
    common = {"name", "rows", "judge", "question", "answer", "template", "prompt", "limit"}
    assert set(USED) == set(JUDGES)
    assert common | frozenset().union(*USED.values()) == set(TaskFile.model_fields)


def test_the_eight_and_own_ones_are_found_together_each_once(here):
    write(here, "rows: r\njudge: exact\n")
    found = find_any(["boolq", "./mine.yaml", " piqa", "boolq", "./mine.yaml"])
    assert [task.name for task in found] == ["boolq", "mine", "piqa"]
    assert found[0] is TASKS["boolq"]


@pytest.mark.parametrize("names", [["mine.yaml", "other.yaml"], ["boolq", "other.yaml"]])
def test_two_tasks_of_one_name_are_refused(here, names):
    write(here, "rows: r\njudge: exact\n")
    called = "mine" if "mine.yaml" in names else "boolq"
    write(here, f"name: {called}\nrows: q\njudge: exact\n", "other.yaml")
    with pytest.raises(InputError, match=f"other.yaml: another task is called {called}, too"):
        find_any(names)


def test_a_file_that_is_not_there_names_the_nearest_and_a_shipped_one_is_found_anywhere(here):
    write(here, "rows: r\njudge: exact\n")
    with pytest.raises(InputError, match=r"min.yaml: no such task file \(did you mean 'mine.yaml'"):
        find_any(["min.yaml"])
    with pytest.raises(InputError, match=r"'mine.json' is not one of .*; a task of your own is a"):
        find_any(["mine.json"])
    assert find_any(["recipes/task_example.yaml"])[0].name == "opposites"


def test_a_recipe_names_task_files_among_its_tasks(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    text = BASE + "evaluation: {tasks: [siqa, ~/mine.yaml, boolq, siqa]}\n"
    assert parse_recipe(text, "r.yaml").evaluation.tasks == (
        *("social_i_qa", "/home/me/mine.yaml", "boolq"),
    )


def test_the_docs_show_the_shipped_example_as_it_is():
    shipped = (ROOT / "recipes" / "task_example.yaml").read_text(encoding="utf-8")
    body = "".join(line for line in shipped.splitlines(keepends=True) if line[:1] not in "#\n")
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert f"```yaml\n{body}```" in page
    for key in TaskFile.model_fields:
        assert f"`{key}`" in page
    for judge in JUDGES:
        assert f"| `{judge}` |" in page
