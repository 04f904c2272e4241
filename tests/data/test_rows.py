"""Reading rows: the shapes that are read, and a message with file and row for all others."""

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from san_llm.data.rows import Row, Turn
from san_llm.data.sources import read_rows
from san_llm.data.task_rows import read_task
from san_llm.data.task_rows import test_file as file_of_task
from san_llm.errors import InputError
from san_llm.protocol.tasks import TASKS

GOOD = {"instruction": "Is it?", "input": "", "output": "the correct answer is true"}
GOOD["answer"] = "true"
# Real rows, where they are at hand: data/commonsense/<task>/test.json here or beside the checkout.
ROOT = Path(__file__).resolve().parents[2]
REAL = next(iter(sorted(ROOT.parent.glob("*/data/commonsense"))), ROOT / "data" / "commonsense")


def write(path: Path, content: object) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def refused(path: Path, content: object) -> str:
    """Return the message, less the file's name that it must begin with."""
    with pytest.raises(InputError) as error:
        read_rows(write(path, content))
    message = str(error.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message.removeprefix(str(path))


def test_rows_are_read_with_their_places(tmp_path):
    path = write(
        tmp_path / "a.json",
        [
            {**GOOD, "input": "Look."},
            {"instruction": "Do.", "output": "Done."},
            {
                "messages": [
                    {"role": "system", "content": "Be kind."},
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Hello"},
                ]
            },
        ],
    )
    assert read_rows(path) == [
        Row("Is it?", "Look.", "the correct answer is true", "true"),
        Row("Do.", "", "Done."),
        Row(messages=(Turn("system", "Be kind."), Turn("user", "Hi"), Turn("assistant", "Hello"))),
    ]
    assert [row.where for row in read_rows(path)] == [f"{path}: row {n}" for n in (1, 2, 3)]


def test_a_null_input_or_answer_is_an_empty_one(tmp_path):
    path = write(tmp_path / "a.json", [{**GOOD, "input": None, "answer": None}])
    assert read_rows(path) == [Row("Is it?", "", "the correct answer is true", "")]


def test_an_empty_system_and_history_of_other_tools_are_passed_over(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{**GOOD, "system": "", "history": []}]))
    (row,) = read_rows(tmp_path / "rows.json")
    assert row.instruction == "Is it?"


@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_jsonl_is_read_line_by_line_and_empty_lines_are_skipped(tmp_path, end):
    one, two = json.dumps(GOOD), json.dumps({**GOOD, "instruction": "a\u2028b"}, ensure_ascii=False)
    path = write(tmp_path / "a.jsonl", f"{one}\n\n{two}{end}".encode())
    assert [row.instruction for row in read_rows(path)] == ["Is it?", "a\u2028b"]
    assert [row.where for row in read_rows(path)] == [f"{path}: line 1", f"{path}: line 3"]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.JSON", "a.JSONL"])
def test_a_byte_order_mark_is_no_part_of_the_rows(tmp_path, name):
    text = json.dumps(GOOD if "l" in name.lower()[-1] else [GOOD])
    path = write(tmp_path / name, b"\xef\xbb\xbf" + text.encode())
    assert len(read_rows(path)) == 1


def test_a_limit_gives_the_first_rows_and_still_checks_the_others(tmp_path):
    path = write(tmp_path / "a.json", [{**GOOD, "instruction": str(n)} for n in range(5)])
    assert [row.instruction for row in read_rows(path, limit=2)] == ["0", "1"]
    write(path, [GOOD, GOOD, {}])
    with pytest.raises(InputError, match="row 3"):
        read_rows(path, limit=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", ": the file is empty"),
        (" \n\t\n", ": the file is empty"),
        ("[]", ": no rows in it"),
        (b"\xef\xbb\xbf", ": the file is empty"),
        (b'[\n{"instruction": "caf\xe9"}]', ":2: not UTF-8: byte 0xe9 at offset 22; convert"),
        (json.dumps([GOOD]).encode("utf-16"), ":1: not UTF-8: byte 0xff at offset 0; convert"),
        ('[\n{"instruction": 1,}\n]', ":2: not valid JSON: "),
        ("[{},\n{}", ":2: not valid JSON: "),
        (f"{json.dumps(GOOD)}\n{json.dumps(GOOD)}\n", ":2: not valid JSON: Extra data at column 1"),
        (GOOD, ": expected a list of rows, found an object; one object a line?"),
        ("3", ": expected a list of rows, found a number"),
        ("null", ": expected a list of rows, found null"),
        ([GOOD, 3], ": row 2: expected an object, found a number"),
        ([GOOD, None], ": row 2: expected an object, found null"),
        ([GOOD, []], ": row 2: expected an object, found a list"),
        ([GOOD, {}], ": row 2: none of the shapes that are read (messages; conver"),
        ([{"conversations": []}], ": row 1: 'conversations' is not a list of turns"),
        (
            [{"question": "a", "answer": "b"}],
            "; found 'question', 'answer'; data.columns says which",
        ),
        (
            [{"text": "a", "messages": []}],
            ": row 1: can be read as messages and as text; say which by data.columns: "
            "{messages: messages} or {text: text}",
        ),
        (
            [GOOD, {"instrution": "a", "output": "b"}],
            ": row 2: key 'instruction' is missing; found 'instrution', 'output' "
            "(did you mean 'instrution'?)",
        ),
        ([{"instruction": "a", "outptu": "b"}], "(did you mean 'outptu'?)"),
        ([{**GOOD, "output": None}], ": row 1: 'output' is null, expected a text"),
        ([{**GOOD, "instruction": None}], ": row 1: 'instruction' is null, expected a text"),
        ([{**GOOD, "output": ["a"]}], ": row 1: 'output' is a list, expected a text"),
        ([{**GOOD, "input": 5}], ": row 1: 'input' is a number, expected a text"),
        ([{**GOOD, "input": {}}], ": row 1: 'input' is an object, expected a text"),
        ([GOOD, {**GOOD, "output": " \n"}], ": row 2: 'output' is empty, so there is nothing"),
        ([{**GOOD, "instruction": ""}], ": row 1: 'instruction' is empty"),
        (
            [{**GOOD, "output": "ab\ud83d"}],
            ": row 1: 'output' has half a surrogate pair (\\ud83d) at character 2",
        ),
        ([GOOD, {**GOOD, "system": 5}], ": row 2: 'system' is a number, expected a text"),
        ([{**GOOD, "history": ["a", "b"]}], ": row 1: 'history': expected a list of [question, an"),
        ("[" * 100_000, ": not valid rows: nested too deeply"),
        ("[" + "9" * 5000 + "]", ": not valid rows: a number of too many digits"),
    ],
)
def test_a_malformed_file_is_refused_with_its_row(tmp_path, content, message):
    assert message in refused(tmp_path / "rows.json", content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", ": the file is empty"),
        (f"{json.dumps(GOOD)}\n{{", ":2: not valid JSON: "),
        (f"\n\n{json.dumps(GOOD)}\n[]", ": line 4: expected an object, found a list"),
        (f"{json.dumps(GOOD)}\n\n{{}}", ": line 3: none of the shapes that are read"),
        ([GOOD], ": line 1: expected an object, found a list; one list of all rows? then name"),
        (json.dumps([GOOD], indent=1), ":1: not valid JSON: "),
        (json.dumps([GOOD], indent=1), "; one list of all rows? then name it .json"),
        (f"{json.dumps(GOOD)}\n" + "[" * 100_000, ":2: not valid rows: nested too deeply"),
        (f"{json.dumps(GOOD)}\n" + "9" * 5000, ":2: not valid rows: a number of too many digits"),
        (b"  \n\n\xff", ":3: not UTF-8: byte 0xff at offset 4; convert the file first"),
        (f"{json.dumps(GOOD)}\n\ufeff{json.dumps(GOOD)}", ":2: not valid JSON: "),
    ],
)
def test_a_malformed_jsonl_file_is_refused_with_its_line(tmp_path, content, message):
    assert message in refused(tmp_path / "rows.jsonl", content)


USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "'messages' is not a list of turns"),
        ([], "'messages' is not a list of turns"),
        ({"role": "user"}, "'messages' is not a list of turns"),
        ("hello", "'messages' is a text, and no JSON list of turns"),
        (["hello"], "message 1: expected an object, found a text"),
        ([USER, {"role": "assistant"}], "message 2: 'content' is missing or not a text"),
        ([USER, {"content": "x"}], "message 2: 'role' is missing or not a text"),
        (
            [USER, {"role": "assistant", "content": None}],
            "message 2: 'content' is null, expected a",
        ),
        ([{"role": 1, "content": "x"}], "message 1: 'role' is missing or not a text"),
        (
            [USER, {"role": "asistant", "content": "x"}],
            "message 2: role 'asistant' is not one of system, user, assistant, tool "
            "(did you mean 'assistant'?)",
        ),
        ([USER], "no assistant message with text that is to be learned, so there is nothing"),
        ([USER, {"role": "assistant", "content": " "}], "no assistant message with text"),
        ([{"role": "user", "content": "\udc00"}], "message 1: 'content' has half a surrogate"),
    ],
)
def test_messages_of_a_wrong_shape_are_refused_with_row_and_message(tmp_path, messages, message):
    good = {"messages": [USER, {"role": "assistant", "content": "Hello"}]}
    found = refused(tmp_path / "chat.json", [good, {"messages": messages}])
    assert found.startswith(": row 2: ")
    assert message in found


def test_a_directory_instead_of_a_file_is_refused(tmp_path):
    (tmp_path / "rows.json").mkdir()
    with pytest.raises(InputError, match=r"rows.json: cannot be read: Is a directory"):
        read_rows(tmp_path / "rows.json")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"nowhere.json: cannot be read: No such file"):
        read_rows(tmp_path / "nowhere.json")
    write(tmp_path / "tickets.json", [GOOD])
    with pytest.raises(InputError, match=r"\(did you mean '.*/tickets\.json'\?\)"):
        read_rows(tmp_path / "ticket.jsonl")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_read_permission_is_refused(tmp_path):
    path = write(tmp_path / "a.json", [GOOD])
    path.chmod(0)
    with pytest.raises(InputError, match="Permission denied"):
        read_rows(path)


@pytest.mark.parametrize("name", ["rows.txt", "rows.xlsx", "rows"])
def test_another_kind_of_file_is_refused(tmp_path, name):
    message = refused(tmp_path / name, "instruction,output\n")
    assert message == ": expected a file of rows: .json, .jsonl, .csv, .tsv, .parquet, .arrow"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
KEYS = st.sampled_from(["instruction", "input", "output", "answer", "messages", "role", "content"])
ALMOST = st.lists(st.dictionaries(KEYS, JSON | st.text(min_size=1), max_size=5), max_size=4)


@settings(deadline=None, max_examples=100)
@given(content=JSON | ALMOST)
def test_any_json_is_read_or_refused_in_one_line(tmp_path_factory, content):
    path = write(tmp_path_factory.getbasetemp() / "any.json", content)
    message = ""
    try:
        found = read_rows(path)
    except InputError as error:
        message = str(error)
    if message:
        assert message.startswith(str(path))
        assert "\n" not in message
    else:
        assert len(found) == len(content)


def test_a_task_file_is_found_under_every_spelling_of_its_task(tmp_path):
    (tmp_path / "social_iqa").mkdir()
    path = write(tmp_path / "social_iqa" / "test.json", [GOOD])
    assert file_of_task(str(tmp_path), TASKS["social_i_qa"]) == path


def test_a_missing_task_file_says_what_is_there(tmp_path):
    with pytest.raises(InputError, match=r"boolq/test.json: no such file; .* at all"):
        file_of_task(str(tmp_path), TASKS["boolq"])
    (tmp_path / "piqa").mkdir()
    write(tmp_path / "piqa" / "test.json", [GOOD])
    with pytest.raises(InputError, match=r"boolq/test.json: no such file; .* has piqa$"):
        file_of_task(str(tmp_path), TASKS["boolq"])
    with pytest.raises(InputError, match=r"nowhere: no such directory; expected 'pocket' or one"):
        file_of_task(str(tmp_path / "nowhere"), TASKS["boolq"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**GOOD, "answer": "answer1"}, "row 2: found 'answer1', expected one of true, false"),
        ({**GOOD, "answer": ""}, "row 2: found no 'answer', expected one of true, false"),
        ({"instruction": "a", "output": "b"}, "row 2: found no 'answer'"),
        (
            {"messages": [USER, {"role": "assistant", "content": "true"}]},
            "row 2: a conversation; boolq has instructions",
        ),
    ],
)
def test_a_test_row_needs_an_answer_of_its_task(tmp_path, row, message):
    path = write(tmp_path / "test.json", [GOOD, row])
    with pytest.raises(InputError, match=re.escape(f"{path}: {message}")):
        read_task(path, TASKS["boolq"])


BLANK = "\n\n"


def choices(word: str, least: int, most: int, between: str = " ") -> str:
    parts = [rf"{word}1: .+"]
    parts += [rf"{between}{word}{n}: .+" for n in range(2, least + 1)]
    parts += [rf"({between}{word}{n}: .+)?" for n in range(least + 1, most + 1)]
    return "".join(parts)


# The instruction text of each task, as LLM-Adapters writes it.
FORMS = {
    "boolq": r"Please answer the following question with true or false, question: .+\n\n"
    r"Answer format: true/false",
    "piqa": r"Please choose the correct solution to the question: .+\n\n"
    rf"{choices('Solution', 2, 2, between=BLANK)}\n\nAnswer format: solution1/solution2",
    "social_i_qa": r"Please choose the correct answer to the question: .+\n\n"
    rf"{choices('Answer', 3, 3)}\n\nAnswer format: answer1/answer2/answer3",
    "winogrande": r"Please choose the correct answer to fill in the blank to complete the given "
    rf"sentence: .+\n\n{choices('Option', 2, 2)} Answer format: option1/option2",
    "ARC-Easy": r"Please choose the correct answer to the question: .+\n\n"
    rf"{choices('Answer', 3, 5)}\n\nAnswer format: answer1/answer2/answer3(/answer4)?(/answer5)?",
    "ARC-Challenge": r"Please choose the correct answer to the question: .+\n\n"
    rf"{choices('Answer', 3, 5)}\n\nAnswer format: answer1/answer2/answer3(/answer4)?(/answer5)?",
    "openbookqa": r"Please choose the correct answer to the question: .+\n\n"
    rf"{choices('Answer', 4, 4)}\n\nAnswer format: answer1/answer2/answer3/answer4",
    "hellaswag": r"Please choose the correct ending to complete the given sentence: .+: .+\n\n"
    rf"{choices('Ending', 4, 4)}\n\nAnswer format: ending1/ending2/ending3/ending4",
}


def check_form(name: str, read: list[Row]) -> None:
    for row in read:
        assert re.fullmatch(FORMS[name], row.instruction, re.DOTALL), row
        assert row.output == f"the correct answer is {row.answer}"
        assert row.context == ""


@pytest.mark.parametrize("name", TASKS)
def test_the_pocket_rows_have_the_text_of_their_task(name):
    path = file_of_task("pocket", TASKS[name])
    check_form(name, read_task(path, TASKS[name]))


@pytest.mark.parametrize("name", [name for name in TASKS if name != "hellaswag"])
def test_every_real_row_reads_and_has_the_text_of_its_task(name):
    if not (REAL / name / "test.json").is_file():
        pytest.skip("no real rows at hand")
    read = read_task(file_of_task(str(REAL), TASKS[name]), TASKS[name])
    check_form(name, read)
    train = REAL / name / "train.json"
    if train.is_file():
        check_form(name, read_task(train, TASKS[name]))
