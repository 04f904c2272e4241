"""The protocol's data from raw files: every byte of a row, every public format, all or nothing."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from unrender import REAL, raw_of, write_jsonl

from san_llm.data.build import HUB, PARQUET, build_commonsense
from san_llm.data.raw import find_raw, read_raw
from san_llm.data.sources import POCKET
from san_llm.errors import InputError, SanError
from san_llm.protocol.row_text import LEADS, render
from san_llm.protocol.tasks import TASKS

ROWS = {
    name: json.loads((POCKET / name / "test.json").read_text(encoding="utf-8"))[:6]
    for name in TASKS
}
RAW = {name: [raw_of(name, row) for row in rows] for name, rows in ROWS.items()}
UNLABELLED = [{key: row[key] for key in row if key != "label"} for row in RAW["piqa"]]
SCIENCE = ("ARC-Easy", "ARC-Challenge", "openbookqa")


def read(path: Path) -> list[dict[str, str]]:
    return json.loads(path.read_text(encoding="utf-8"))


# --- the text of a row ---


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("task", TASKS)
def test_raw_fields_of_every_real_row_render_to_the_same_row(task, split):
    path = REAL / task / f"{split}.json"
    if not path.is_file():
        pytest.skip("no real rows at hand")
    rows = read(path)
    assert rows
    for row in rows:
        made = render(task, raw_of(task, row), "a row")
        assert list(made.items()) == list(row.items())  # the order of the keys, too


@pytest.mark.parametrize("task", TASKS)
def test_raw_fields_of_pocket_rows_render_to_the_same_row(task):
    assert [render(task, raw, "a row") for raw in RAW[task]] == ROWS[task]


def test_the_first_published_row_of_hellaswag():
    raw = {
        "activity_label": "Roof shingle removal",
        "ctx_a": "A man is sitting on a roof.",
        "ctx_b": "he",
        "ctx": "A man is sitting on a roof. he",
        "endings": [
            "is using wrap to wrap a pair of skis.",
            "is ripping level tiles off.",
            "is holding a rubik's cube.",
            "starts pulling up roofing on a roof.",
        ],
        "label": 3,
    }
    assert render("hellaswag", raw, "a row") == {
        "instruction": "Please choose the correct ending to complete the given sentence: Roof "
        "shingle removal: A man is sitting on a roof. he\n\nEnding1: is using wrap to wrap a pair "
        "of skis. Ending2: is ripping level tiles off. Ending3: is holding a rubik's cube. "
        "Ending4: starts pulling up roofing on a roof.\n\nAnswer format: "
        "ending1/ending2/ending3/ending4",
        "input": "",
        "output": "the correct answer is ending4",
        "answer": "ending4",
    }


def test_nothing_is_stripped_of_a_piqa_row():
    raw = {"goal": "dresser", "sol1": "replace drawer \n", "sol2": " finish", "label": "0"}
    text = render("piqa", raw, "a row")["instruction"]
    assert "dresser\n\nSolution1: replace drawer \n\n\nSolution2:  finish\n\nAnswer" in text


@pytest.mark.parametrize("labels", ["ABC", "ABCD", "ABCDE", "123", "12345"])
def test_science_rows_have_as_many_answers_as_choices(labels):
    choices = {"text": [f"t{label}" for label in labels], "label": list(labels)}
    raw = {"question": "Which?", "choices": choices, "answerKey": labels[2]}
    row = render("ARC-Easy", raw, "a row")
    assert row["answer"] == "answer3"
    names = [f"answer{number}" for number in range(1, len(labels) + 1)]
    assert row["instruction"].endswith(f"\n\nAnswer format: {'/'.join(names)}")
    assert f" Answer3: t{labels[2]}" in row["instruction"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(True, "true"), (False, "false"), (1, "true"), (0, "false"), ("True", "true")],
)
def test_boolq_answers_are_written_in_several_ways(answer, expected):
    for key in ("answer", "label"):  # BoolQ's own files, SuperGLUE's
        raw = {"question": "is it", key: answer}
        row = render("boolq", raw, "a row")
        assert row["answer"] == expected
        assert row["instruction"].startswith(f"{LEADS['boolq']}is it?\n\n")


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("boolq", {"question": None}, "'question' is not a text"),
        ("boolq", {"answer": "maybe"}, "found 'maybe' for an answer, expected true or false"),
        ("piqa", {"label": 2}, "found the label 2, expected one of 0, 1"),
        ("piqa", {"label": True}, "found the label True, expected one of 0, 1"),
        ("piqa", {"label": -1}, "no label under 'label', as in test splits"),
        ("piqa", {"sol1": ...}, "key 'sol1' is missing; found 'goal', 'sol2', 'label' (did you"),
        ("social_i_qa", {"label": "0"}, "found the label '0', expected one of 1, 2, 3"),
        ("hellaswag", {"endings": ["a"]}, "'endings' is not a list of 4 texts"),
        ("hellaswag", {"label": ""}, "no label under 'label'"),
        ("winogrande", {"answer": ""}, "no label under 'answer' or 'label'"),
        ("ARC-Easy", {"answerKey": "F"}, "found the label 'F', expected one of"),
        ("ARC-Easy", {"question": "Which?"}, "key 'choices' is missing"),
        ("openbookqa", {"question": {"stem": "a", "choices": ["b"]}}, "'choices' are not 3 to 5"),
    ],
)
def test_a_raw_row_that_cannot_be_is_refused_with_its_place(task, change, message):
    raw = {key: value for key, value in (RAW[task][0] | change).items() if value is not ...}
    with pytest.raises(InputError, match=re.escape(message)) as error:
        render(task, raw, "raw/x.jsonl: line 7")
    assert str(error.value).startswith("raw/x.jsonl: line 7: ")


# --- public files ---


def test_the_published_training_rows_add_up_to_the_mix():
    assert sum(task.train_rows for task in TASKS.values()) == 170_420


def write_public(folder: Path) -> Path:
    """Write every task as its public archive holds it."""
    write_jsonl(folder / "BoolQ" / "train.jsonl", RAW["boolq"])
    write_jsonl(folder / "BoolQ" / "val.jsonl", RAW["boolq"][:2])
    for task, name, dev in (
        ("piqa", "physicaliqa-train-dev", "dev"),
        ("social_i_qa", "socialiqa-train-dev/socialiqa-train-dev", "dev"),
    ):
        for split, rows in (("train", RAW[task]), (dev, RAW[task][:2])):
            bare = [{k: v for k, v in row.items() if k != "label"} for row in rows]
            path = write_jsonl(folder / name / f"{split}.jsonl", bare)
            labels = "".join(f"{row['label']}\n" for row in rows)
            path.with_name(f"{split}-labels.lst").write_text(labels)
    write_jsonl(folder / "piqa-junk" / "__MACOSX" / "._train.jsonl", [])
    write_jsonl(folder / "hellaswag_train.jsonl", RAW["hellaswag"])
    write_jsonl(folder / "hellaswag_val.jsonl", RAW["hellaswag"][:2])
    for size, rows in (("xs", 1), ("s", 2), ("m", 3), ("l", 4), ("xl", 6), ("debiased", 5)):
        path = folder / "winogrande_1.1" / f"train_{size}.jsonl"
        write_jsonl(path, RAW["winogrande"][:rows])
        answers = "".join(f"{row['answer']}\n" for row in RAW["winogrande"][:rows])
        path.with_name(f"train_{size}-labels.lst").write_text(answers)
    write_jsonl(folder / "winogrande_1.1" / "dev.jsonl", RAW["winogrande"][:2])
    for task in ("ARC-Easy", "ARC-Challenge"):
        for split, count in (("Train", 6), ("Dev", 3), ("Test", 2)):
            path = folder / "ARC-V1-Feb2018-2" / task / f"{task}-{split}.jsonl"
            write_jsonl(path, RAW[task][:count])
            path.with_suffix(".csv").write_text("questionID,question\n1,Which? (A) a (B) b\n")
    for part in ("Main", "Additional"):
        for name, count in (("train", 6), ("dev", 3), ("test", 2)):
            path = folder / "OpenBookQA-V1-Sep2018" / "Data" / part / f"{name}.jsonl"
            write_jsonl(path, RAW["openbookqa"][:count])
    return folder


def expected(task: str) -> list[dict[str, str]]:
    sizes = (1, 2, 3, 4, 6, 5)  # the published mix has all of WinoGrande's training sets
    rows = ROWS[task]
    return [row for size in sizes for row in rows[:size]] if task == "winogrande" else rows


def test_unpacked_archives_become_the_published_layout(tmp_path):
    built = build_commonsense(str(write_public(tmp_path / "raw")), tmp_path / "out", False)
    for task in TASKS:
        folder = tmp_path / "out" / task
        assert read(folder / "train.json") == expected(task)
        assert read(folder / "test.json") == ROWS[task][:2]
        assert sorted(path.name for path in folder.iterdir()) == ["test.json", "train.json"]
    mix = read(tmp_path / "out" / "commonsense_170k.json")
    assert mix == [row for task in TASKS for row in expected(task)]
    assert built.mix == len(mix)
    assert built.train["winogrande"] == 21
    assert "winogrande: 21 train rows, 63,238 are published" in built.differs
    assert "boolq: 2 test rows, 3,270 are published" in built.differs


def test_a_file_is_the_text_that_json_dump_writes_with_an_indent_of_four(tmp_path):
    raw = {"question": 'is "é" — x\\y\u2028', "answer": True}
    write_jsonl(tmp_path / "raw" / "boolq" / "train.jsonl", [raw, raw])
    build_commonsense(str(tmp_path / "raw"), tmp_path / "out", False)
    row = render("boolq", raw, "a row")
    for name in ("boolq/train.json", "commonsense_170k.json"):
        text = (tmp_path / "out" / name).read_bytes().decode()
        assert text == json.dumps([row, row], indent=4)


def parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def hub_row(task: str, raw: dict) -> dict:
    """Return a raw row as the hub's parquet files have it."""
    if task in SCIENCE:
        choices = raw["question"]["choices"]
        texts = {key: [choice[key] for choice in choices] for key in ("text", "label")}
        stem = "question_stem" if task == "openbookqa" else "question"
        return {stem: raw["question"]["stem"], "choices": texts, "answerKey": raw["answerKey"]}
    changes = {"hellaswag": {"label": str(raw.get("label"))}}
    changes["social_i_qa"] = {"label": f"{raw.get('label')}\n"}  # so it is there
    return raw | changes.get(task, {})


@pytest.mark.parametrize("task", TASKS)
def test_the_hubs_parquet_files_give_the_same_rows(tmp_path, task):
    # A snapshot names the configuration and the split, and the task nowhere.
    for split in ("train", "validation", "test"):
        rows = [hub_row(task, raw) for raw in RAW[task]]
        name = task if task.startswith("ARC") else "default"
        parquet(tmp_path / name / split / "0000.parquet", rows[:3])
        parquet(tmp_path / name / split / "0001.parquet", rows[3:])
    found = find_raw(tmp_path, task)
    assert [(part.task.name, part.split) for part in found] == [(task, "train"), (task, "test")]
    tested = "test" if task in SCIENCE else "validation"
    assert {path.parent.name for path in found[1].files} == {tested}
    for part in found:
        made = [render(task, raw, where) for path in part.files for where, raw in read_raw(path)]
        assert made == ROWS[task]


def test_winogrande_of_the_hub_is_every_size_and_one_validation_split(tmp_path):
    for size in ("xs", "s", "m", "l", "xl", "debiased"):
        for split in ("train", "validation", "test"):
            parquet(tmp_path / f"winogrande_{size}" / split / "0000.parquet", RAW["winogrande"])
    train, test = find_raw(tmp_path, "winogrande")
    order = ["xs", "s", "m", "l", "xl", "debiased"]
    assert [path.parts[-3].removeprefix("winogrande_") for path in train.files] == order
    assert [path.parts[-3] for path in test.files] == ["winogrande_xl"]


def test_tables_with_tabs_are_read(tmp_path):
    lines = ["ID\tQuestion Stem\tChoices\tAnswer Key"]
    for raw in RAW["openbookqa"]:
        choices = raw["question"]["choices"]
        listed = " ".join(f"({'ABCD'[n]}) {choice['text']}" for n, choice in enumerate(choices))
        labels = [choice["label"] for choice in choices]
        key = "ABCD"[labels.index(raw["answerKey"])]
        lines.append(f"x\t{raw['question']['stem']}\t{listed}\t{key}")
    (tmp_path / "obqa").mkdir()
    (tmp_path / "obqa" / "test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    keys = ("sentence", "option1", "option2", "answer")
    rows = ["\t".join(keys), *("\t".join(raw[key] for key in keys) for raw in RAW["winogrande"])]
    (tmp_path / "winogrande_dev.tsv").write_text("\n".join(rows), encoding="utf-8")
    build_commonsense(str(tmp_path), tmp_path / "out", False)
    assert read(tmp_path / "out" / "openbookqa" / "test.json") == ROWS["openbookqa"]
    assert read(tmp_path / "out" / "winogrande" / "test.json") == ROWS["winogrande"]
    assert not (tmp_path / "out" / "commonsense_170k.json").exists()  # no training rows at all


@pytest.mark.parametrize(
    ("word", "split"),
    [(word, "train") for word in ("train", "trn", "TRAIN")]
    + [(word, "test") for word in ("dev", "val", "valid", "validation", "x-dev_2")],
)
@pytest.mark.parametrize("name", ["piqa/{}.jsonl", "{}/physicaliqa.jsonl", "xl/PIQA-{}.jsonl"])
def test_a_split_is_told_by_any_of_its_words(tmp_path, name, word, split):
    path = tmp_path / name.format(word)
    write_jsonl(path, RAW["piqa"])
    (found,) = find_raw(tmp_path)
    assert (found.task.name, found.split, found.files) == ("piqa", split, (path,))


@pytest.mark.parametrize("word", ["test", "tests", "tst"])
def test_only_where_test_answers_are_public_tests_are_taken_from_there(tmp_path, word):
    for task in ("ARC-Easy", "boolq"):
        write_jsonl(tmp_path / task / f"{word}.jsonl", RAW[task])
        write_jsonl(tmp_path / task / "dev.jsonl", RAW[task])
    found = {part.task.name: part.files[0].name for part in find_raw(tmp_path)}
    assert found == {"ARC-Easy": f"{word}.jsonl", "boolq": "dev.jsonl"}


def test_a_jsonl_is_taken_before_other_formats_of_the_same_rows(tmp_path):
    write_jsonl(tmp_path / "piqa" / "train.jsonl", RAW["piqa"])
    parquet(tmp_path / "piqa" / "train-00000-of-00001.parquet", RAW["piqa"][:1])
    assert [path.name for part in find_raw(tmp_path) for path in part.files] == ["train.jsonl"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "raw: no raw data set found; expected files such as boolq/train.jsonl"),
        ({"boolq/notes.jsonl": [{}]}, "raw: no raw data set found"),
        ({"boolq/a_train.jsonl": [], "boolq/b/train.jsonl": []}, "both seem to hold the same rows"),
        # Only WinoGrande comes in sizes.
        ({"boolq/train.jsonl": [], "boolq/xl/train.jsonl": []}, "both seem to hold the same rows"),
        ({"boolq/train.jsonl": []}, "train.jsonl: the file is empty"),
        ({"boolq/train.jsonl": [3]}, "train.jsonl: line 1: expected an object, found int"),
        ({"piqa/dev.jsonl": RAW["piqa"], "piqa/dev-labels.lst": "0\n1\n"}, "2 labels for the 6"),
        ({"piqa/dev.jsonl": UNLABELLED, "piqa/dev-labels.lst": "0\n1\n"}, "2 labels for the 6"),
        ({"boolq/train.jsonl": ROWS["boolq"]}, "line 1: key 'question' is missing; found 'instru"),
        ({"boolq/train.parquet": "PAR0"}, "train.parquet: not a readable parquet file"),
        ({"piqa/dev.tsv": "goal\tsol1\nx\n"}, "dev.tsv: line 2: not 2 columns, as the first line"),
        ({"boolq/train.json": '{"a": 1}'}, "train.json: expected a list of rows, found an object"),
    ],
)
def test_files_that_cannot_be_are_refused_and_nothing_is_written(tmp_path, files, message):
    write_jsonl(tmp_path / "raw" / "hellaswag" / "README.md", [])
    for name, content in files.items():
        path = tmp_path / "raw" / name
        if isinstance(content, str):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        else:
            write_jsonl(path, content)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        build_commonsense(str(tmp_path / "raw"), tmp_path / "out", False)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


# --- the command ---


def test_the_command_prints_rows_beside_the_published_ones(command, here):
    write_public(here / "raw")
    done = command("data", "build", "commonsense", "--from", "raw")
    assert done.returncode == 0
    assert re.search(r"winogrande +21 +63,238 +2 +1,267\n", done.stdout)
    assert re.search(r"commonsense_170k\.json +63 +170,420", done.stdout)
    assert done.stdout.rstrip().endswith("data/commonsense")
    assert "not the full published set:\n  boolq: 6 train rows, 9,427 are published" in done.stderr
    again = command("data", "build", "commonsense", "--from", "raw")
    assert again.returncode == 2
    assert "data/commonsense: has files in it; add --overwrite to replace them" in again.stderr
    more = command("data", "build", "commonsense", "--from", "raw", "--overwrite", "--json")
    found = json.loads(more.stdout)
    assert found["mix"] == 63
    assert found["test"] == dict.fromkeys(TASKS, 2)
    (here / "data" / "commonsense" / "mine.txt").write_text("keep")
    refused = command("data", "build", "commonsense", "--from", "raw", "--overwrite")
    assert refused.returncode == 2
    assert "not a folder that was built before (mine.txt is in it)" in refused.stderr
    assert (here / "data" / "commonsense" / "mine.txt").is_file()


def test_another_set_is_refused_with_the_nearest_name(command):
    done = command("data", "build", "comonsense", "--from", "hub")
    assert done.returncode == 2
    assert "known: commonsense (did you mean 'commonsense'?)" in done.stderr


def test_what_the_hub_gives_is_what_a_folder_would(tmp_path, monkeypatch):
    asked = {}

    def download(repository, **how):
        asked[repository] = how
        for task in (task for task, own in HUB.items() if own == repository):
            split = "test" if task in SCIENCE else "validation"
            name = task if task.startswith("ARC") else "default"
            rows = [hub_row(task, raw) for raw in RAW[task]]
            parquet(tmp_path / repository / name / split / "0000.parquet", rows)
        return str(tmp_path / repository)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    (tmp_path / "data").mkdir()
    build_commonsense("hub", tmp_path / "data" / "out", False)
    how = {"repo_type": "dataset", "revision": PARQUET, "allow_patterns": ["*.parquet"]}
    assert asked == dict.fromkeys(HUB.values(), how)
    for task, rows in ROWS.items():
        assert read(tmp_path / "data" / "out" / task / "test.json") == rows, task


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(SanError, match=r"^google/boolq: could not be fetched: .*; --from DIR"):
        build_commonsense("hub", tmp_path / "out", False)
    assert not (tmp_path / "out").exists()
