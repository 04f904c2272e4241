"""Whole evaluations: what reaches the model, what is written, what is refused."""

import json
import os
import re
import shutil
import sys
from hashlib import sha256
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from san.adapted import adapt
from tiny import rows, save_tiny, tiny_config, tiny_model, write_recipe, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from san_llm.data.sources import POCKET
from san_llm.errors import InputError
from san_llm.evaluate.harness import check_installed
from san_llm.evaluate.pose import SCORED_AT_ONCE, WAYS, _strictly, judged_answers, pose, units
from san_llm.evaluate.questions import Settings, read_questions
from san_llm.evaluate.request import EvalRequest, check_request
from san_llm.evaluate.start import start
from san_llm.protocol.tasks import TASKS, find_tasks
from san_llm.recipe.read import load_recipe
from san_llm.runs.folder import new_run, point_latest
from san_llm.runs.record import MergeManifest, write_merge_manifest

TASK = "the correct answer is"


def load(folder, **how):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval()


@pytest.fixture
def data(here):
    """Three tasks of a few short rows in the LLM-Adapters layout."""
    boolq = rows(5)
    piqa = [
        {
            "instruction": f"{'How? ' * (n + 1)}",
            "input": "Some context." if n == 1 else "",
            "output": f"{TASK} solution{n % 2 + 1}",
            "answer": f"solution{n % 2 + 1}",
        }
        for n in range(4)
    ]
    social = [
        {
            "instruction": f"Who {n}?",
            "output": f"{TASK} answer{n}",
            "answer": f"answer{n}",
            "input": "",
        }
        for n in (1, 2, 3)
    ]
    write_rows(here / "data" / "boolq" / "test.json", boolq)
    write_rows(here / "data" / "piqa" / "test.json", piqa)
    write_rows(here / "data" / "social_iqa" / "test.json", social)
    return here / "data"


@pytest.fixture
def adapter(here, tiny_base):
    """A saved SAN adapter that has moved, over the tiny base."""
    adapt(load(tiny_base)).save_pretrained(here / "adapter")
    return here / "adapter"


def answers(model, tokenizer, questions, style="alpaca", **settings):
    """Answer questions with a model in memory; return the judged rows in order."""
    settings = Settings(prompt=style, **settings)
    items = pose(questions, settings, tokenizer, model.config)
    found = {}
    for some in judged_answers(model, tokenizer, items, settings, units(items, settings)):
        found.update(some)
    assert sorted(found) == list(range(len(items)))
    return [found[number] for number in range(len(items))]


def texts(*arguments, **settings):
    return [row.output for row in answers(*arguments, **settings)]


def lines_of(folder):
    text = (folder / "rows.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def by_row(folder):
    return sorted(lines_of(folder), key=lambda line: (line["task"], line["row"]))


@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_answers_and_scores_are_those_of_single_rows(
    command, here, data, tiny_base, adapter, batch_size
):
    asked = ("eval", "--adapter", adapter, "--data", data, "--prompt", "alpaca", "--fresh")
    done = command(
        *asked, "--tasks", "boolq,piqa,siqa", "--output", "out", "--batch-size", batch_size
    )
    assert done.returncode == 0, done.stderr
    found = lines_of(here / "out")
    assert [set(line) for line in found] == [
        {"task", "row", "prompt", "output", "parsed", "answer", "correct"}
    ] * 12
    assert [(line["task"], line["row"]) for line in found] == [
        *(("boolq", n) for n in range(5)),
        *(("piqa", n) for n in range(4)),
        *(("social_i_qa", n) for n in range(3)),
    ]
    model = PeftModel.from_pretrained(load(tiny_base), adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    for line in found:
        tokens = torch.tensor([tokenizer(line["prompt"])["input_ids"]])
        out = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            num_beams=4,
            max_new_tokens=32,
        )
        text = tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True)
        assert line["output"] == text
    results = json.loads((here / "out" / "results.json").read_text())
    assert [score["n"] for score in results["tasks"]] == [5, 4, 3]
    assert sorted(results["sha256"]) == sorted(
        str(data / name / "test.json") for name in ("boolq", "piqa", "social_iqa")
    )


# --- what reaches the model ---

INSTRUCTION = "Is ice cold?\n\nAnswer format: true/false"
S = " " * 16
LEAD = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request."
)
EVALUATION = f"{LEAD} \n\n{S}### Instruction:\n{S}{INSTRUCTION}\n\n{S}### Response:\n{S}"
TRAINING = f"{LEAD}  \n\n{S}### Instruction:\n{S}{INSTRUCTION}\n{S}\n{S}### Response:\n{S}"


def tokens_seen(style, tokenizer, here):
    """Pose one row and return the tokens that the model is given."""
    row = {"instruction": INSTRUCTION, "input": "", "output": f"{TASK} true", "answer": "true"}
    write_rows(here / "d" / "boolq" / "test.json", [row])
    questions = read_questions([TASKS["boolq"]], str(here / "d"), None)
    (item,) = pose(
        questions, Settings(prompt=style), tokenizer, tiny_config(vocab_size=len(tokenizer))
    )
    assert item.prompt == (EVALUATION if style == "llm-adapters" else TRAINING)
    return item.tokens


def test_llm_adapters_prompts_reach_the_model_as_published(here, smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    seen = tokens_seen("llm-adapters", tokenizer, here)
    assert tokenizer.decode(seen) == EVALUATION
    assert seen == tokenizer(EVALUATION)["input_ids"]


def test_aligned_prompts_reach_the_model_as_the_tokens_of_training(here, smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    seen = tokens_seen("llm-adapters-aligned", tokenizer, here)
    trained = tokenizer(f"{TRAINING}{TASK} true")["input_ids"]
    assert seen == trained[: len(seen)]
    # The last of the spaces stands in the response's first token, which is the next.
    assert tokenizer.decode(seen) == TRAINING[:-1]
    assert tokenizer.decode(trained[len(seen)]) == " the"
    assert seen != tokenizer(TRAINING)["input_ids"]


# --- the command ---


def test_the_command_prints_a_table_and_leaves_rows_and_results(
    command, here, data, tiny_base, adapter
):
    done = command(
        *("eval", "--adapter", adapter, "--data", data, "--tasks", "boolq,siqa"),
        *("--prompt", "alpaca", "--output", "scores", "--limit", 2),
    )
    assert done.returncode == 0, done.stderr
    shown = done.stdout.splitlines()
    assert shown[0].split() == f"{tiny_base} + {adapter} on {data}".split()
    assert re.search(r"boolq +│ +0.0 +│ +0.0 +│ +2 +│ +2", done.stdout)
    assert re.search(r"social_i_qa +│", done.stdout)
    assert re.search(r"average +│ +0.0 +│ +0.0 +│ +4 +│ +4", done.stdout)
    assert shown[-1] == "rows: scores/rows.jsonl"
    assert [(line["task"], line["row"]) for line in by_row(here / "scores")] == [
        ("boolq", 0),
        ("boolq", 1),
        ("social_i_qa", 0),
        ("social_i_qa", 1),
    ]
    assert sorted(os.listdir(here)) == ["adapter", "data", "scores"]


def test_json_alone_is_on_stdout_and_says_what_was_evaluated(
    command, here, data, tiny_base, adapter
):
    done = command(
        *("eval", "--adapter", adapter, "--data", data, "--tasks", "piqa", "--json"),
        *("--output", here / "scores"),
    )
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert (value["model"], value["adapter"]) == (str(tiny_base), str(adapter))
    assert (value["data"], value["limit"], value["prompt"]) == (str(data), None, "llm-adapters")
    assert [task["n"] for task in value["tasks"]] == [4]
    stored = json.loads((here / "scores" / "results.json").read_text())
    assert stored | value == stored
    piqa = data / "piqa" / "test.json"
    assert stored["sha256"] == {str(piqa): sha256(piqa.read_bytes()).hexdigest()}


def test_each_word_of_a_request_reaches_the_way_it_is_asked(here, data, tiny_base):
    words = {
        "prompt": "alpaca",
        "batch_size": 3,
        "strict": True,
        "answers_only": True,
        "protocol": "generate",
    }
    more = {"tasks": ["boolq"], "model": str(tiny_base), "data": str(data), "limit": 2}
    task = check_request(EvalRequest(**words, **more, output=here / "out", fresh=True))
    assert task.settings == Settings(**words)
    assert [len(rows) for rows in task.questions.rows.values()] == [2]
    assert (task.output, task.overwrite, task.fresh) == (here / "out", False, True)
    assert task.about["title"] == f"{tiny_base} on {data}"
    assert (task.about["limit"], task.about["adapter"]) == (2, None)
    plain = check_request(EvalRequest(**more, protocol="loglik", overwrite=True))
    assert plain.settings == Settings(protocol="loglik")
    assert (plain.overwrite, plain.fresh) == (True, False)
    for protocol in ("loglik", "lm-eval"):
        with pytest.raises(InputError, match=f"--answers-only: protocol {protocol} generates"):
            check_request(EvalRequest(**more, protocol=protocol, answers_only=True))


@pytest.mark.parametrize("style", ["chat", "alpaca"])
@pytest.mark.parametrize("trained", [None, "2025-01-02"])
@pytest.mark.parametrize("told", [None, "2026-03-04"])
def test_a_chat_is_dated_as_told_or_as_in_training_and_nothing_else_is(
    here, data, tiny_base, style, trained, told
):
    shutil.copytree(tiny_base, here / "base")
    write_merge_manifest(here / "base", MergeManifest(date=trained))
    asked = {"tasks": ["boolq"], "model": str(here / "base"), "data": str(data)}
    task = check_request(EvalRequest(**asked, prompt=style, date=told, output=here / "out"))
    assert task.settings.date == ((told or trained) if style == "chat" else None)


@pytest.mark.parametrize("launched", [False, True])
def test_several_processes_are_launched_with_the_output_that_was_chosen(
    here, data, tiny_base, monkeypatch, launched
):
    seen = []
    monkeypatch.setattr("san_llm.evaluate.start.run_launched", lambda words: seen.append(words))
    monkeypatch.setattr("san_llm.evaluate.run.evaluate", lambda task: seen.append(task))
    monkeypatch.setattr(sys, "argv", ["san-llm", "eval", "--fresh"])
    if launched:
        monkeypatch.setenv("WORLD_SIZE", "2")
    asked = {"tasks": ["boolq"], "model": str(tiny_base), "data": str(data), "processes": 2}
    ended = start(EvalRequest(**asked, output=here / "out"))
    assert (ended.code, ended.result) == (0, None)
    if launched:
        assert seen[0].output == here / "out"
    else:
        assert seen[0][-4:] == ["eval", "--fresh", "--output", str(here / "out")]


@pytest.mark.parametrize("strict", [False, True])
def test_a_strict_evaluation_shortens_no_sums_and_leaves_the_settings_as_they_were(strict):
    matmul = torch.backends.cuda.matmul
    names = ["allow_tf32"]
    names += [f"allow_{kind}_reduced_precision_reduction" for kind in ("bf16", "fp16")]
    before, threads = [getattr(matmul, name) for name in names], torch.get_num_threads()
    try:
        for name in names:
            setattr(matmul, name, True)
        torch.set_num_threads(2)
        with _strictly(strict):
            assert [bool(getattr(matmul, name)) for name in names] == [not strict] * 3
            assert torch.get_num_threads() == (1 if strict else 2)
        assert all(getattr(matmul, name) for name in names)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
        for name, value in zip(names, before, strict=True):
            setattr(matmul, name, value)


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        (Settings("generate", batch_size=4), [1] * 70),
        (Settings("loglik", strict=True, batch_size=4), [1] * 70),
        (Settings("lm-eval", strict=True), [1] * 70),
        (Settings("loglik", batch_size=4), [4] * 17 + [2]),
        (Settings("loglik"), [SCORED_AT_ONCE] * 4 + [6]),
        (Settings("lm-eval", batch_size=4), [35, 35]),
    ],
)
def test_rows_are_answered_together_by_protocol_the_longest_first(settings, sizes, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    lengths = [(number * 37) % 50 for number in range(70)]
    way = WAYS[settings.protocol]
    items = [SimpleNamespace(tokens=[0] * length, way=way) for length in lengths]
    found = units(items, settings)
    assert [len(unit) for unit in found] == sizes
    order = [number for unit in found for number in unit]
    assert order == sorted(range(70), key=lambda number: (-lengths[number], number))


def test_base_model_and_adapter_answer_as_themselves(command, here, data, tiny_base, adapter):
    recipe = load_recipe(
        write_recipe(here / "mine.yaml", tiny_base, data / "boolq" / "test.json"), []
    )
    run = new_run(recipe, None, False)
    adapt(load(tiny_base), seed=5).save_pretrained(run / "adapter")
    point_latest(run)
    other = save_tiny(here / "other", seed=9)

    def outputs(*options):
        folder = here / f"out{len(os.listdir(here))}"
        done = command(
            *("eval", "--tasks", "boolq", "--data", data, "--limit", 3, "--prompt", "alpaca"),
            *("--output", folder, *options),
        )
        assert done.returncode == 0, done.stderr
        return [line["output"] for line in by_row(folder)]

    def expected(model):
        questions = read_questions([TASKS["boolq"]], str(data), 3)
        return texts(model, AutoTokenizer.from_pretrained(tiny_base), questions)

    ways = {
        "last run": outputs(),
        "base": outputs("--base-only"),
        "adapter": outputs("--adapter", adapter),
        "model": outputs("--model", other),
    }
    assert len({tuple(texts) for texts in ways.values()}) == 4
    assert ways["last run"] == expected(PeftModel.from_pretrained(load(tiny_base), run / "adapter"))
    assert ways["base"] == outputs("--model", tiny_base) == expected(load(tiny_base))
    assert ways["adapter"] == expected(PeftModel.from_pretrained(load(tiny_base), adapter))
    assert ways["model"] == expected(load(other))
    assert ways["adapter"] == outputs("--adapter", adapter, "--model", tiny_base)


def test_the_last_runs_evaluation_lands_in_its_folder_with_its_settings(
    command, here, data, tiny_base
):
    recipe = load_recipe(
        write_recipe(
            here / "mine.yaml",
            tiny_base,
            data / "boolq" / "test.json",
            evaluation={"tasks": ["piqa"], "data": str(data), "limit": 2},
        ),
        [],
    )
    run = new_run(recipe, None, False)
    adapt(load(tiny_base)).save_pretrained(run / "adapter")
    point_latest(run)
    for options, kind in (((), "adapter"), (("--base-only",), "base"), ((), "adapter")):
        done = command("eval", "--json", *options)
        assert done.returncode == 0, done.stderr
        value = json.loads(done.stdout)
        assert re.fullmatch(rf"{run}/eval/[0-9]{{8}}-[0-9]{{6}}-{kind}(-2)?", value["output"])
        assert (value["prompt"], value["limit"], value["data"]) == ("alpaca", 2, str(data))
        assert [task["task"] for task in value["tasks"]] == ["piqa"]
        assert (here / value["output"] / "rows.jsonl").is_file()
    assert len(os.listdir(run / "eval")) == 3


def test_an_output_folder_with_files_is_refused_before_a_model_is_loaded(command, here, data):
    (here / "scores").mkdir()
    (here / "scores" / "mine.txt").write_text("keep")
    asked = ("eval", "--model", "./nowhere", "--data", data, "--output", "scores")
    done = command(*asked)
    assert done.returncode == 2
    assert done.stderr == "error: scores: has files in it; add --overwrite to replace them\n"
    assert os.listdir(here / "scores") == ["mine.txt"]
    # With leave to replace it the next thing is looked at: the old folder is still there.
    done = command(*asked, "--overwrite", "--tasks", "piqa")
    assert done.stderr == "error: ./nowhere: no such folder\n"
    assert (here / "scores" / "mine.txt").read_text() == "keep"


def test_overwrite_replaces_an_evaluation_whole(command, here, data, tiny_base):
    asked = ("eval", "--model", tiny_base, "--data", data, "--output", "scores")
    assert command(*asked, "--tasks", "piqa").returncode == 0
    (here / "scores" / "left.txt").write_text("old")
    assert command(*asked, "--tasks", "boolq", "--overwrite").returncode == 0
    assert sorted(os.listdir(here / "scores")) == ["manifest.json", "results.json", "rows.jsonl"]
    assert {line["task"] for line in lines_of(here / "scores")} == {"boolq"}


def test_a_task_without_data_and_a_wrong_row_are_told_before_a_model_is_loaded(command, here, data):
    asked = ("eval", "--model", "./nowhere", "--data", data)
    done = command(*asked, "--tasks", "winogrande")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {data}/winogrande/test.json: no such file; {data} has boolq, piqa, social_iqa\n"
    )
    wrong = [*rows(2), {"instruction": "a", "input": "", "output": "b", "answer": "maybe"}]
    file = write_rows(data / "boolq" / "test.json", wrong)
    done = command(*asked, "--tasks", "boolq")
    assert done.returncode == 2
    assert done.stderr == f"error: {file}: row 3: found 'maybe', expected one of true, false\n"


def test_a_prompt_longer_than_the_models_context_is_named_and_nothing_is_left(command, here, data):
    base = save_tiny(here / "short", max_position_embeddings=280)
    asked = ("eval", "--model", base, "--data", data, "--tasks", "boolq", "--prompt", "alpaca")
    long = [*rows(3), rows(1)[0] | {"instruction": "x" * 200}]
    file = write_rows(data / "boolq" / "test.json", long)
    done = command(*asked, "--output", "scores")
    assert done.returncode == 2
    lead = len(f"{LEAD}\n\n### Instruction:\n") + 200 + len("\n\n### Response:\n")
    assert done.stderr.splitlines()[-1] == (
        f"error: {file}: row 4: its prompt has {lead} tokens; with 32 new ones that is more than "
        "the model's context of 280"
    )
    assert sorted(os.listdir(here)) == ["data", "short"]
    assert command(*asked, "--limit", 3, "--output", "scores").returncode == 0


def test_a_prompt_that_just_fits_the_context_is_answered(tiny_base, tmp_path):
    row = {"instruction": "x", "input": "", "output": f"{TASK} true", "answer": "true"}
    write_rows(tmp_path / "d" / "boolq" / "test.json", [row])
    questions = read_questions([TASKS["boolq"]], str(tmp_path / "d"), None)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    length = len(f"{LEAD}\n\n### Instruction:\nx\n\n### Response:\n")
    texts(tiny_model(max_position_embeddings=length + 32), tokenizer, questions)
    shorter = tiny_config(max_position_embeddings=length + 31)
    with pytest.raises(InputError, match="row 1: its prompt has"):
        pose(questions, Settings(prompt="alpaca"), tokenizer, shorter)


@pytest.mark.parametrize("protocol", ["loglik", "lm-eval"])
def test_answers_that_just_fit_the_context_are_scored(tiny_base, tmp_path, protocol):
    row = {"instruction": "x", "input": "", "output": f"{TASK} true", "answer": "true"}
    write_rows(tmp_path / "d" / "boolq" / "test.json", [row])
    questions = read_questions([TASKS["boolq"]], str(tmp_path / "d"), None)
    tokenizer, settings = AutoTokenizer.from_pretrained(tiny_base), Settings(protocol, "alpaca")
    length = len(f"{LEAD}\n\n### Instruction:\nx\n\n### Response:\n{TASK} false")
    (item,) = pose(questions, settings, tokenizer, tiny_config(max_position_embeddings=length))
    assert item.answers == ("true", "false")
    said = rf"row 1: with an answer it has {length} tokens, more than .* context of {length - 1}$"
    with pytest.raises(InputError, match=said):
        pose(questions, settings, tokenizer, tiny_config(max_position_embeddings=length - 1))


@pytest.mark.slow
def test_an_adapter_trained_over_4_bits_is_evaluated_over_4_bits(command, here, data):
    base = save_tiny(here / "base", hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    recipe = load_recipe(
        write_recipe(here / "mine.yaml", base, data / "boolq" / "test.json"),
        ["base.quantization=4bit"],
    )
    run = new_run(recipe, None, False)
    adapt(load(base)).save_pretrained(run / "adapter")
    point_latest(run)
    asked = ("eval", "--tasks", "boolq,piqa", "--data", data, "--prompt", "alpaca")
    for batch_size in (1, 9):
        done = command(*asked, "--output", f"out{batch_size}", "--batch-size", batch_size)
        assert done.returncode == 0, done.stderr
    found = [[line["output"] for line in by_row(here / f"out{size}")] for size in (1, 9)]

    quantized = load(
        base,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
        device_map="cpu",
    )
    questions = read_questions(find_tasks(["boolq", "piqa"]), str(data), None)
    tokenizer = AutoTokenizer.from_pretrained(base)
    expected = []
    for model in (PeftModel.from_pretrained(quantized, run / "adapter").eval(), load(base)):
        expected.append(texts(model, tokenizer, questions))
    assert found[0] == found[1] == expected[0] != expected[1]


# --- sizes and edges ---


def test_a_file_with_nearly_all_published_rows_is_refused_and_a_small_one_is_noted(here, command):
    obqa = {"instruction": "a", "output": f"{TASK} answer1", "answer": "answer1"}
    file = write_rows(here / "d" / "openbookqa" / "test.json", [obqa] * 499)
    with pytest.raises(InputError) as caught:
        read_questions([TASKS["openbookqa"]], "d", None)
    assert str(caught.value) == (
        f"{file.relative_to(here)}: 499 rows, but the published test set has 500: a part of it is "
        "missing or too much; --limit 499 takes them as they are"
    )
    assert read_questions([TASKS["openbookqa"]], "d", 499).notes == ()
    write_rows(file, [obqa] * 500)
    assert read_questions([TASKS["openbookqa"]], "d", None).notes == ()
    write_rows(file, [obqa] * 501)
    with pytest.raises(InputError, match="501 rows, but"):
        read_questions([TASKS["openbookqa"]], "d", None)
    write_rows(file, [obqa] * 40)
    assert read_questions([TASKS["openbookqa"]], "d", None).notes == (
        "openbookqa: 40 rows, not the 500 of the published set",
    )


def test_outputs_without_an_answer_are_counted_and_shown(command, here, data, tiny_base):
    asked = ("eval", "--model", tiny_base, "--data", data, "--tasks", "boolq", "--output", "out")
    done = command(*asked)
    first = lines_of(here / "out")[0]["output"]
    assert "no answer in 5 of 5 outputs, which are wrong:\n" in done.stdout
    assert f"  boolq row 0: {first!r}\n" in done.stdout
    assert "note: boolq: 5 rows, not the 3,270 of the published set" in done.stdout
    stored = json.loads((here / "out" / "results.json").read_text())
    assert [example["row"] for example in stored["unparseable_examples"]] == [0, 1, 2]
    assert stored["unparseable_examples"][0]["output"] == first
    assert [task["correct"] for task in stored["tasks"]] == [0]


def test_by_likelihood_every_row_has_an_answer_and_its_scores(command, here, data, tiny_base):
    asked = ("eval", "--model", tiny_base, "--data", data, "--tasks", "piqa", "--output", "out")
    done = command(*asked, "--protocol", "loglik")
    assert done.returncode == 0, done.stderr
    for line in lines_of(here / "out"):
        texts = [f"{TASK} solution1", f"{TASK} solution2"]
        assert [choice["text"] for choice in line["choices"]] == texts
        best = max(line["choices"], key=lambda choice: choice["logprob"])
        assert (line["output"], line["parsed"]) == (best["text"], best["answer"])
        assert line["correct"] == (line["parsed"] == line["answer"])
    (score,) = json.loads((here / "out" / "results.json").read_text())["tasks"]
    assert score["accuracy"] == score["accuracy_norm"]  # both texts have the same length
    assert "acc_norm" in done.stdout


@pytest.mark.parametrize(
    ("files", "model", "message"),
    [
        ({"boolq/test.json": "[]"}, {}, "data/boolq/test.json: no rows in it"),
        ({"boolq/test.json": "[{]"}, {}, "data/boolq/test.json:1: not valid JSON: "),
        ({"boolq/train.json": "[]"}, {}, "data/boolq/test.json: no such file; data has no <task>"),
        (
            {"boolq/test.json": json.dumps([rows(1)[0] | {"instruction": "x" * 100_000}])},
            {},
            "data/boolq/test.json: row 1: its prompt has 100,",
        ),
        (
            {"boolq/test.json": json.dumps(rows(2))},
            {"eos_token": None, "pad_token": None},
            "base: its tokenizer has no token to pad with",
        ),
        (
            {"boolq/test.json": json.dumps(rows(2)), "template": "{{ raise_exception('no') }}"},
            {},
            "data/boolq/test.json: row 1: the chat template of ",
        ),
    ],
    ids=["no rows", "no json", "no test.json", "100k characters", "no pad or eos", "template"],
)
def test_what_cannot_be_evaluated_is_one_line_and_leaves_nothing(
    command, here, tiny_base, files, model, message
):
    shutil.copytree(tiny_base, here / "base")
    if model:
        path = here / "base" / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **model}))
    for name, text in files.items():
        path = here / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    style = "alpaca"
    if "template" in files:
        style = "chat"
        (here / "base" / "chat_template.jinja").write_text(files["template"])
    done = command(
        *("eval", "--model", "base", "--data", "data", "--tasks", "boolq"),
        *("--prompt", style, "--output", "out"),
    )
    assert done.returncode in (1, 2)
    assert done.stdout == ""
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error:"))
    assert message in line
    assert "Traceback" not in done.stderr
    assert sorted(os.listdir(here)) == ["base", "data"]


def test_without_the_package_lm_eval_is_told_how_to_get_it(cli, here, data, tiny_base):
    # An import hook stands for an environment without it.
    site = here / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'lm_eval' else find(name, *a)\n"
    )
    asked = ("eval", "--model", tiny_base, "--data", data, "--tasks", "boolq", "--output", "out")
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    done = cli(*asked, "--protocol", "lm-eval", PYTHONPATH=path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: --protocol lm-eval needs the package lm_eval: pip install 'san-llm[lm-eval]'\n"
    )


def test_lm_eval_is_looked_for_by_its_name(monkeypatch):
    pytest.importorskip("lm_eval")
    check_installed()
    monkeypatch.setattr(
        "san_llm.evaluate.harness.find_spec", lambda name: None if name == "lm_eval" else name
    )
    with pytest.raises(InputError, match=r"pip install 'san-llm\[lm-eval\]'"):
        check_installed()


def test_the_pocket_set_is_found_without_a_folder():
    questions = read_questions(find_tasks(TASKS), "pocket", 2)
    assert [len(found) for found in questions.rows.values()] == [2] * 8
    assert sorted(questions.sha256) == sorted(str(POCKET / name / "test.json") for name in TASKS)
