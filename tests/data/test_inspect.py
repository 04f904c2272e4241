"""What is said of training rows: each number beside a plain count of the same."""

import gc
import io
import json
import re
import weakref
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tiny import rows as boolq_rows
from tiny import tiny_tokenizer, write_recipe, write_rows

from san_llm.data.encode import IGNORE, Encoding, label_rows
from san_llm.data.inspect import GRAM, Inspection, Overlap, inspect, report
from san_llm.data.rows import Row, Turn
from san_llm.data.sources import POCKET, read_rows
from san_llm.errors import InputError
from san_llm.protocol.row_text import LEADS

SETTINGS = ("alpaca", "response")


def look(rows, tests=None, cutoff=1000) -> Inspection:
    encoding = Encoding(tiny_tokenizer(), *SETTINGS, cutoff)
    return inspect(iter(rows), tests or {}, encoding, about={"files": "a.json"})


def text_of(found: Inspection) -> str:
    """Return what is printed of an inspection."""
    with (console := Console(width=300)).capture() as capture:
        for part in report(found, colour=False):
            console.print(part)
    return capture.get()


def plain_lengths(rows) -> list[int]:
    return [seen.length for seen in label_rows(rows, Encoding(tiny_tokenizer(), *SETTINGS, 10**6))]


ROWS = [
    Row(f"Is {number} {'x' * number}?", "", "yes" if number % 2 else "no", where=f"row {number}")
    for number in range(1, 41)
]


def test_lengths_and_their_histogram_count_every_row():
    lengths = sorted(plain_lengths(ROWS))
    found = look(ROWS)
    assert found.rows == 40
    assert (found.lengths["min"], found.lengths["max"]) == (lengths[0], lengths[-1])
    assert found.lengths["median"] == lengths[19]
    assert found.lengths["mean"] == pytest.approx(sum(lengths) / 40, abs=0.01)
    assert sum(bar["rows"] for bar in found.histogram) == 40
    for bar in found.histogram:
        assert bar["rows"] == sum(bar["from"] <= length <= bar["to"] for length in lengths)
    assert found.histogram[-1]["to"] == lengths[-1]


def test_one_very_long_row_leaves_the_histogram_readable():
    found = look([*ROWS * 5, Row("x" * 100_000, "", "yes")])
    assert found.lengths["max"] > 100_000
    assert len(found.histogram) > 5
    assert found.histogram[-1]["rows"] <= 6  # the long one, and what stands at the 99th hundredth


def test_rows_beyond_the_context_are_counted_after_the_cutoff():
    lengths = plain_lengths(ROWS)
    context = sorted(lengths)[20]
    encoding = Encoding(tiny_tokenizer(), *SETTINGS, 1000)
    found = inspect(iter(ROWS), {}, encoding, {"files": "a.json"}, context)
    assert found.longer == sum(length > context for length in lengths) > 0
    assert found.longer_at[0] == f"row {next(n for n, k in enumerate(lengths, 1) if k > context)}"
    assert f"more tokens than the model's context of {context}" in text_of(found)
    encoding = Encoding(tiny_tokenizer(), *SETTINGS, context)
    found = inspect(iter(ROWS), {}, encoding, {"files": "a.json"}, context)
    assert (found.longer, found.cut + found.dropped > 0) == (0, True)
    assert "context" not in text_of(found)


def test_the_cutoff_is_counted_as_training_counts_it():
    cutoff = sorted(plain_lengths(ROWS))[20]
    found = look(ROWS, cutoff=cutoff)
    seen = list(label_rows(ROWS, Encoding(tiny_tokenizer(), *SETTINGS, cutoff)))
    fates = Counter(one.fate for one in seen)
    kept = [one for one in seen if one.fate != "dropped"]
    assert fates["cut"] > 0
    assert fates["dropped"] > 0
    assert (found.cut, found.dropped) == (fates["cut"], fates["dropped"])
    assert found.tokens == sum(len(one.tokens) for one in kept)
    assert found.supervised == sum(sum(label != IGNORE for label in one.labels) for one in kept)
    dropped = [row.where for row, one in zip(ROWS, seen, strict=True) if one.fate == "dropped"]
    assert found.dropped_at == dropped[:5]


def test_doubles_and_other_responses_to_one_question_are_counted():
    one, other = ROWS[0], ROWS[1]
    again = Row(one.instruction, "", "something else")
    chat = Row(messages=(Turn("user", "Hi"), Turn("assistant", "Hello")))
    reply = Row(messages=(Turn("user", "Hi"), Turn("assistant", "Good day")))
    found = look([one, other, one, one, again, Row(one.instruction, "Look.", one.output)])
    assert (found.duplicates, found.disputed) == (2, 1)
    encoding = Encoding(tiny_tokenizer(), "chat", "response", 1000)
    found = inspect([chat, reply, chat], {}, encoding, about={})
    assert (found.duplicates, found.disputed) == (1, 1)


def test_answers_are_balanced_task_by_task():
    rows = read_rows(POCKET / "train.json")
    found = look(rows)
    assert set(found.answers) == {
        *("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande"),
        "ARC-Easy, ARC-Challenge, openbookqa",
    }
    for task in ("boolq", "hellaswag", "winogrande"):
        mine = [row for row in rows if row.instruction.startswith(LEADS[task])]
        assert found.answers[task] == Counter(row.answer for row in mine)
    assert sum(sum(counts.values()) for counts in found.answers.values()) == len(rows)


def test_a_folder_that_names_a_task_says_whose_answers_they_are():
    asked = "Please choose the correct answer to the question: Which?\n\nAnswer1: a Answer2: b "
    asked += "Answer3: c\n\nAnswer format: answer1/answer2/answer3"
    asked = asked.replace("Which?", "Which Answer format: a/b?")  # as a question may say
    where = ("data/ARC-Easy/train.json: row 1", "mix.json: row 2")
    rows = [Row(asked, "", "the correct answer is answer1", "answer1", where=at) for at in where]
    assert look(rows).answers == {"ARC-Easy": {"answer1": 1}, "social_i_qa": {"answer1": 1}}


def test_free_answers_have_no_balance():
    rows = [Row(f"Sum {number}", "", "x", str(number)) for number in range(100)]
    assert look(rows).answers == {}
    assert look(rows[:5]).answers == {"other": {str(number): 1 for number in range(5)}}


def shares_words(one: str, other: str) -> bool:
    first, second = (re.findall(r"\w+", text.lower()) for text in (one, other))
    runs = {tuple(second[n : n + GRAM]) for n in range(len(second) - GRAM + 1)}
    return any(tuple(first[n : n + GRAM]) in runs for n in range(len(first) - GRAM + 1))


WORDS = st.lists(st.sampled_from(["a", "b"]), min_size=8, max_size=24).map(" ".join)


@settings(deadline=None, max_examples=50)
@given(training=st.lists(WORDS, min_size=1, max_size=4), tests=st.lists(WORDS, min_size=1))
def test_overlap_is_that_of_every_pair_compared(training, tests):
    found = look(
        [
            Row(f"{LEADS['boolq']}{text}?\n\nAnswer format: true/false", "", "x")
            for text in training
        ],
        {"boolq": [Row(text, "", "x") for text in tests]},
    ).overlap["boolq"]
    assert found.test_rows == len(tests)
    assert found.exact == 0  # the instructions around the words differ
    assert found.grams == sum(
        any(shares_words(text, other) for other in training) for text in tests
    )


def test_the_same_question_is_an_exact_overlap_and_the_tasks_own_words_are_none():
    pocket = read_rows(POCKET / "winogrande" / "test.json")
    found = look(pocket[:5], {"winogrande": pocket}).overlap["winogrande"]
    assert (found.test_rows, found.exact) == (60, 5)
    lead = LEADS["winogrande"]  # 14 words
    tail = "\n\nOption1: {0} Option2: {1} Answer format: option1/option2"
    rows = [Row(f"{lead}{a} _ {b}.{tail.format(a, b)}", "", "x") for a, b in ("cd", "ef")]
    found = look(rows[:1], {"winogrande": rows[1:]}).overlap["winogrande"]
    assert (found.exact, found.grams) == (0, 0)


def test_the_example_is_the_first_rows_text_with_its_response_marked():
    found = look(ROWS)
    assert "".join(text for text, _ in found.examples[""]).endswith("### Response:\nyes</s>")
    assert [text for text, learned in found.examples[""] if learned] == ["yes</s>"]
    *_, plain = report(found, colour=False)
    assert plain.plain.endswith("### Response:\n»yes</s>«")
    *_, coloured = report(found, colour=True)
    assert coloured.plain.endswith("### Response:\nyes</s>")
    green = [coloured.plain[s.start : s.end] for s in coloured.spans if "green" in str(s.style)]
    assert green == ["yes</s>"]


REPORT = """\
files         rows.json
loss          response
rows          43
              a.json: 30 of 90 rows
              b.csv: 13 of 13 rows
read as       messages 30, text 13
not read      id in 43 rows
turns         2 in 28, 5 in 2
tokens a row  min 9, 5 % 9, median 10, 95 % 14, 99 % 1,400, max 1,400, mean 42.65
learned       129 of 1,234 tokens (10.5 %)
cut           1: the cutoff takes their response's end: row 3
dropped       7: their prompt fills the cutoff, nothing of the response is left: row 1, row 2, ...
too long      1: more tokens than the model's context of 1,024; train refuses them: row 9
thinking      3 turns lose it: the chat template leaves it out
held out      40 rows of other.json
twins         4 held-out rows are training rows, too
duplicates    1,002
disputed      5 with the question of another, answered otherwise
  tokens   rows
 10 - 19      1  ▏
 20 - 29      0
30 - 140  1,000  ████████████████████████████████████████
answers  rows  most frequent  share of each
boolq       4         75.0 %  false 25.0, true 75.0
piqa        1        100.0 %  solution1 100.0
test rows in training  test rows  exact  13 words alike
boolq                      3,270      1           1,002
ARC-Easy                       9      0               0
The first row of messages; what is learned is between » and «:
Ask: [it]»yes«
The first row of text; what is learned is between » and «:
a»ll«
control tokens: 2: their own words have a control token; data.special_tokens says what becomes of \
it: row 7: </s>, ..."""


def test_every_line_of_the_report_is_as_it_is_meant():
    found = Inspection(
        about={"files": "rows.json", "loss": "response"},
        rows=43,
        lengths={"min": 9, "5 %": 9, "median": 10, "95 %": 14, "99 %": 1400, "max": 1400}
        | {"mean": 42.65},
        histogram=[
            {"from": 10, "to": 19, "rows": 1},
            {"from": 20, "to": 29, "rows": 0},
            {"from": 30, "to": 140, "rows": 1000},
        ],
        cut=1,
        dropped=7,
        cut_at=["rows.json: row 3"],
        dropped_at=["rows.json: row 1", "rows.json: row 2"],
        context=1024,
        longer=1,
        longer_at=["rows.json: row 9"],
        tokens=1234,
        supervised=129,
        duplicates=1002,
        disputed=5,
        answers={"boolq": {"false": 1, "true": 3}, "piqa": {"solution1": 1}},
        overlap={"ARC-Easy": Overlap(9, 0, 0), "boolq": Overlap(3270, 1, 1002)},
        shapes={"messages": 30, "text": 13},
        sources=[
            {"source": "a.json", "there": 90, "taken": 30},
            {"source": "b.csv", "there": 13, "taken": 13},
        ],
        turns={2: 28, 5: 2},
        controls=2,
        controls_at=["rows.json: row 7: </s>"],
        thoughts=3,
        held_out={"other.json": 40},
        twins=4,
        unread={"id": 43},
        examples={
            "messages": [("Ask: [it]", False), ("yes", True)],
            "text": [("a", False), ("ll", True)],
        },
    )
    console = Console(width=200, file=io.StringIO(), color_system=None)
    for part in report(found, colour=False):
        console.print(part)
    shown = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert shown == REPORT.splitlines()


def test_a_question_that_holds_the_words_before_the_answers_counts_whole():
    words = " ".join(f"w{number}" for number in range(GRAM - 1))
    asked = f"{words} Answer format: end of the question. Answer format: true/false"
    # 13 words in a row only with those that follow the first "Answer format".
    test = [Row(f"{words} Answer format: other", "", "x"), Row(f"{words} Answer", "", "x")]
    found = look([Row(asked, "", "x")], {"boolq": test}).overlap["boolq"]
    assert (found.test_rows, found.exact, found.grams) == (2, 0, 1)


def test_texts_have_no_question_to_answer_otherwise():
    found = look([Row(text="One."), Row(text="Two."), Row(text="One.")])
    assert (found.duplicates, found.disputed) == (1, 0)


def test_rows_are_looked_at_one_by_one_and_never_all_held(monkeypatch):
    monkeypatch.setattr("san_llm.data.encode.CHUNK", 50)
    alive: weakref.WeakSet[Row] = weakref.WeakSet()
    most = 0

    def many():
        nonlocal most
        for number in range(1000):
            row = Row(f"Is {number} it?", "", "yes")
            alive.add(row)
            yield row
            if number % 400 == 399:
                gc.collect()
                most = max(most, len(alive))

    assert look(many()).rows == 1000
    assert 0 < most < 200  # some chunks


def test_a_wrong_row_is_refused_with_its_place():
    with pytest.raises(InputError, match="row 41: a conversation cannot be written"):
        look(
            [*ROWS, Row(messages=(Turn("user", "Hi"), Turn("assistant", "Hello")), where="row 41")]
        )


# --- the command ---


def test_a_recipe_is_looked_at_as_it_would_be_trained(command, here, tiny_base):
    train = write_rows(here / "rows.json", boolq_rows(30))
    write_rows(here / "mine" / "boolq" / "test.json", boolq_rows(3))
    recipe = write_recipe(
        here / "mine.yaml", tiny_base, train, evaluation={"data": "mine", "tasks": ["boolq"]}
    )
    done = command("data", "inspect", recipe, "data.limit=20", "data.cutoff=160", "--json")
    assert done.returncode == 0
    found = json.loads(done.stdout)
    assert found["rows"] == 20
    assert found["about"] == {
        "files": str(train),
        "tokenizer": str(tiny_base),
        "prompt": "alpaca",
        "loss": "response",
        "cutoff": 160,
        "test rows": "mine",
    }
    assert "not compared" not in done.stderr
    other = command("data", "inspect", recipe, "evaluation.tasks=[piqa]", "--json")
    assert json.loads(other.stdout)["overlap"] == {}
    assert re.search(r"not compared with test rows: .*mine.*piqa.*test\.json", other.stderr)
    assert found["overlap"]["boolq"] == {"test_rows": 3, "exact": 3, "grams": 0}
    assert found["answers"] == {"other": {"false": 10, "true": 10}}
    shown = command("data", "inspect", recipe)
    assert shown.returncode == 0
    assert re.search(r"rows +30 *\n", shown.stdout)
    assert "»the correct answer is true</s>«" in shown.stdout
    assert re.search(r"boolq +3 +3 +0 *\n", shown.stdout)


def test_a_file_is_looked_at_with_a_tokenizer_of_choice(command, here, tiny_base):
    path = here / "it's: rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in boolq_rows(4)))
    done = command("data", "inspect", path, f"base.model={tiny_base}", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["rows"] == 4
    path.write_text(path.read_text() + "[]\n")
    done = command("data", "inspect", path, f"base.model={tiny_base}")
    assert done.returncode == 2
    assert "rows.jsonl: line 5: expected an object, found a list" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.jsonl", "nowhere.jsonl: cannot be read: No such file or directory"),
        ("nowhere.yaml", "nowhere.yaml: no such recipe"),
        ("empty.json", "empty.json: no rows in it"),
    ],
)
def test_what_is_not_there_is_refused(command, here, name, message):
    (here / "empty.json").write_text("[]")
    done = command("data", "inspect", name)
    assert done.returncode == 2
    assert message in done.stderr
