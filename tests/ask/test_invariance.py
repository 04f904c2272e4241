"""An answer depends on the model and its row alone, and lm-evaluation-harness finds the same."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from san.adapted import adapt
from tiny import rows, tiny_config, tiny_model, tiny_phi3, tiny_tokenizer, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from san_llm.data.sources import POCKET
from san_llm.data.task_rows import read_task
from san_llm.evaluate.pose import judged_answers, pose, units
from san_llm.evaluate.questions import Questions, Settings, read_questions
from san_llm.evaluate.store import read_evaluation
from san_llm.models.rotary import rotate_by_row
from san_llm.protocol.tasks import TASKS, find_tasks

PROTOCOLS = ["generate", "loglik", "lm-eval"]
TOKENIZER = tiny_tokenizer()


def judged(model, tokenizer, questions, **settings):
    """Return the judged rows by task and row."""
    chosen = Settings(**{"prompt": "alpaca", **settings})
    items = pose(questions, chosen, tokenizer, model.config)
    found = {}
    for some in judged_answers(model, tokenizer, items, chosen, units(items, chosen)):
        found.update(some)
    return {(row.task, row.row): row for row in found.values()}


def said(found):
    return {key: (row.output, row.parsed, row.parsed_norm) for key, row in found.items()}


def in_another_order(questions, seed=3):
    """Return the questions in another order, and what says where each row was before."""
    dice = random.Random(seed)
    places = {task: list(range(len(rows))) for task, rows in questions.rows.items()}
    for order in places.values():
        dice.shuffle(order)
    moved = Questions(
        {task: [questions.rows[task][n] for n in places[task]] for task in reversed(places)}, {}
    )
    at = {task.name: order for task, order in places.items()}

    def back(found):
        return {(task, at[task][row]): value for (task, row), value in found.items()}

    return moved, back


@pytest.fixture
def questions(tmp_path):
    """Rows of very different lengths, in two tasks with other answers."""
    boolq = [
        row | {"instruction": row["instruction"] + " x" * (number * 7 % 60)}
        for number, row in enumerate(rows(12))
    ]
    arc = [
        {
            "instruction": f"Which {'is it ' * (n % 5)}? Answer format: answer1/answer2/answer3",
            "input": "" if n % 3 else "Context.",
            "output": f"the correct answer is answer{n % 3 + 1}",
            "answer": f"answer{n % 3 + 1}",
        }
        for n in range(9)
    ]
    write_rows(tmp_path / "d" / "boolq" / "test.json", boolq)
    write_rows(tmp_path / "d" / "ARC-Easy" / "test.json", arc)
    return read_questions(find_tasks(["boolq", "arc-e"]), str(tmp_path / "d"), None)


@pytest.fixture(scope="module")
def model():
    """A SAN-adapted model that parts with what it finds likely."""
    sharp = tiny_model(5)
    sharp.lm_head.weight.data.mul_(4)
    return adapt(sharp)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_answers_depend_on_neither_batch_nor_order(model, questions, protocol):
    whole = said(judged(model, TOKENIZER, questions, protocol=protocol))
    assert len({output for output, _, _ in whole.values()}) > 2
    for batch_size in (1, 7, 32):
        found = judged(model, TOKENIZER, questions, protocol=protocol, batch_size=batch_size)
        assert said(found) == whole, batch_size
    moved, back = in_another_order(questions)
    assert back(said(judged(model, TOKENIZER, moved, protocol=protocol, batch_size=7))) == whole


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_row_is_rotated_by_its_own_length(questions, protocol):
    # Prompts on both sides of the length from which on a row is rotated otherwise.
    questions = Questions({task: found[:6] for task, found in questions.rows.items()}, {})
    items = pose(questions, Settings(prompt="alpaca"), TOKENIZER, tiny_config())
    lengths = sorted(len(item.tokens) for item in items)
    scaled = tiny_phi3(lengths[len(lengths) // 2] + 10, seed=5)
    scaled.lm_head.weight.data.mul_(4)
    rotate_by_row(scaled)
    alone = said(judged(scaled, TOKENIZER, questions, protocol=protocol, batch_size=1))
    assert said(judged(scaled, TOKENIZER, questions, protocol=protocol, batch_size=16)) == alone


@pytest.mark.parametrize("style", ["alpaca", "llm-adapters", "llm-adapters-aligned", "chat"])
def test_lm_eval_predicts_what_loglik_predicts(model, questions, style):
    ours = judged(model, TOKENIZER, questions, protocol="loglik", prompt=style)
    theirs = judged(model, TOKENIZER, questions, protocol="lm-eval", prompt=style, batch_size=3)
    assert said(ours) == said(theirs)
    assert len({row.parsed for row in ours.values()}) > 1
    for key, row in ours.items():
        for one, two in zip(row.choices, theirs[key].choices, strict=True):
            assert one.logprob == pytest.approx(two.logprob, abs=1e-3)
            assert (one.text, one.length, one.greedy) == (two.text, two.length, two.greedy)


def test_strict_bfloat16_gives_the_same_numbers_in_any_company(model, questions):
    # The logprobs themselves, to the last bit.
    half = adapt(tiny_model(5, dtype=torch.bfloat16))  # which takes its time on a CPU
    questions = Questions({task: found[:5] for task, found in questions.rows.items()}, {})
    for protocol in ("loglik", "generate"):
        how = {"protocol": protocol, "strict": True}
        whole = judged(half, TOKENIZER, questions, **how)
        assert judged(half, TOKENIZER, questions, batch_size=4, **how) == whole
        for task, found in questions.rows.items():
            alone = Questions({task: found[3:4]}, {})
            (row,) = judged(half, TOKENIZER, alone, **how).values()
            kept = whole[task.name, 3]
            assert (row.output, row.parsed, row.choices) == (
                kept.output,
                kept.parsed,
                kept.choices,
            )


def test_strict_leaves_the_threads_as_they_were(model, questions):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        judged(model, TOKENIZER, Questions({TASKS["boolq"]: []}, {}), strict=True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# --- processes ---


def launched(here: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Evaluate as a user of Accelerate starts it by hand."""
    launcher = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
    launcher += ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
    launcher += ("--num_cpu_threads_per_process", "1", "--main_process_port", "0")
    return subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "san_llm", *map(str, arguments)],
        cwd=here,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.slow
def test_two_processes_answer_as_one(cli, command, here, tiny_base):
    write_rows(here / "data" / "boolq" / "test.json", rows(21))
    asked = ("eval", "--model", tiny_base, "--tasks", "boolq", "--data", "data", "--fresh")
    one = command(*asked, "--output", "one", "--json")
    assert one.returncode == 0, one.stderr
    two = cli(*asked, "--output", "two", "--processes", 2, "--json")
    assert two.returncode == 0, two.stderr
    assert two.stderr.count("Evaluating: 11 of 11 rows") == 1  # the first speaks of its share
    assert {**json.loads(two.stdout), "output": ""} == {**json.loads(one.stdout), "output": ""}
    harness = cli(*asked, "--output", "three", "--processes", 2, "--protocol", "lm-eval")
    assert harness.returncode == 0, harness.stderr
    by_hand = launched(here, *asked, "--output", "four", "--protocol", "loglik")
    assert by_hand.returncode == 0, by_hand.stderr
    alone = command(*asked, "--output", "five", "--protocol", "loglik")
    assert alone.returncode == 0, alone.stderr
    names = ("one", "two", "three", "four", "five")
    stored = [read_evaluation(here / name) for name in names]
    assert stored[0].rows == stored[1].rows
    harness_said, two_said, one_said = ([row.parsed for row in one.rows] for one in stored[2:])
    assert harness_said == two_said == one_said
    assert [evaluation.manifest.processes for evaluation in stored] == [1, 2, 2, 2, 1]


@pytest.mark.slow
def test_what_one_of_two_processes_finds_wrong_is_told_once(cli, here, tiny_base):
    long = [*rows(3), rows(1)[0] | {"instruction": "x" * 2000}]
    file = write_rows(here / "data" / "boolq" / "test.json", long)
    asked = ("eval", "--model", tiny_base, "--tasks", "boolq", "--data", "data", "--output", "out")
    done = cli(*asked, "--processes", 2)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("error:") == 1
    assert f"{file.relative_to(here)}: row 4: its prompt has" in done.stderr
    assert not (here / "out").exists()


# --- the real model ---


@contextmanager
def rows_together(model) -> Iterator[list[int]]:
    """Collect how many rows by likelihood each forward has: each begins at the first position."""
    counts: list[int] = []

    def count(_model, _arguments, named):
        positions = named["position_ids"]
        counts.append(int((positions == positions.min()).sum()))

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield counts
    finally:
        hook.remove()


def companies(questions, settings, tokenizer, back=dict):
    """Return which rows are answered together, in turn; of generated ones the turn alone."""
    items = pose(questions, settings, tokenizer, tiny_config(vocab_size=len(tokenizer)))
    keys = [(item.task.name, item.number) for item in items]
    return [set(back({keys[n]: n for n in unit})) for unit in units(items, settings)]


@pytest.mark.slow
def test_the_real_model_answers_alike_in_any_batch_and_on_two_processes(cli, here, smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    names = ["boolq", "winogrande", "ARC-Easy", "piqa"]
    shortest = {}
    for name in names:
        found = read_task(POCKET / name / "test.json", TASKS[name])
        shortest[name] = sorted(found, key=lambda row: len(row.instruction))[:5]
        values = [
            {"instruction": row.instruction, "output": row.output, "answer": row.answer}
            for row in shortest[name]
        ]
        write_rows(here / "data" / name / "test.json", values)
    questions = Questions({TASKS[name]: shortest[name] for name in names}, {})
    few = Questions({TASKS[name]: shortest[name][:2] for name in names[:2]}, {})
    both = (("loglik", questions, (1, 7, 32), 5), ("generate", few, (1, 32), 32))
    for protocol, asked, sizes, moved_at_once in both:
        found, together = [], []
        for size in sizes:
            with rows_together(model) as counts:
                rows = judged(model, tokenizer, asked, protocol=protocol, batch_size=size)
            found.append(said(rows))
            together.append(max(counts))
        assert all(one == found[0] for one in found)
        outputs, answers = ({row[i] for row in found[0].values()} for i in (0, 1))
        if protocol == "loglik":
            assert together == [1, 7, 20]
            # The untuned model has a favourite in the other two tasks.
            assert {"true", "false", "option1", "option2"} <= answers
        else:
            assert len(outputs) == len(found[0])  # texts: it hardly ever comes to an answer
        moved, back = in_another_order(asked)
        chosen = Settings(protocol=protocol, prompt="alpaca", batch_size=moved_at_once)
        # Rows are sorted by length: only among those of the same one an order can matter.
        assert companies(moved, chosen, tokenizer, back) != companies(asked, chosen, tokenizer)
        rows = judged(model, tokenizer, moved, protocol=protocol, batch_size=moved_at_once)
        assert back(said(rows)) == found[0]
    words = ("eval", "--model", smollm2, "--data", "data", "--tasks", ",".join(names[:2]))
    words = (*words, "--limit", 2, "--prompt", "alpaca", "--protocol", "generate")
    done = cli(*words, "--processes", 2, "--output", "two")
    assert done.returncode == 0, done.stderr
    stored = {(row.task, row.row): row for row in read_evaluation(here / "two").rows}
    assert said(stored) == found[0]
