"""Tasks of one's own: rows of any shape, asked and judged beside the eight, compared, shown."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import (
    rows,
    save_tiny,
    tiny_model,
    tiny_phi3,
    tiny_tokenizer,
    write_recipe,
    write_rows,
)

from san_llm.ask.losses import score_losses
from san_llm.data.sources import POCKET
from san_llm.data.task_rows import read_own_rows
from san_llm.errors import InputError
from san_llm.evaluate.compare import compare
from san_llm.evaluate.pose import judged_answers, pose, units
from san_llm.evaluate.questions import Settings, read_questions
from san_llm.evaluate.score import judge_text, ratio_of_sums
from san_llm.evaluate.store import read_evaluation
from san_llm.ops.head_loss import losses
from san_llm.protocol import tasks
from san_llm.protocol.neutral import CHUNK, NEUTRAL, chunks
from san_llm.protocol.tasks import TASKS, guessing
from san_llm.recipe.task_file import find_any, load_task

TOKENIZER = tiny_tokenizer()
OWN = [
    {"q": "How many legs has a cat?", "a": "4", "among": ["3", "4"], "n": 4},
    {"q": "How many has a hen?", "a": "2", "among": ["2", "8"], "n": 2},
    {"q": "And an ant?", "a": "6", "among": ["6", "5", "4"], "n": 6},
]


@pytest.fixture
def own(here):
    """Write a task's file, and return its name; ``legs.json`` has the rows."""
    write_rows(here / "legs.json", OWN)

    def write(name="legs", **keys):
        keys = {"rows": "legs.json", "question": "q", "answer": "a"} | keys
        text = json.dumps({key: value for key, value in keys.items() if value is not None})
        (here / f"{name}.yaml").write_text(text)
        return f"{name}.yaml"

    return write


def answers(model, tokenizer, questions, **settings):
    """Answer questions with a model in memory; return the judged rows in order."""
    how = Settings(prompt="alpaca", **settings)
    items = pose(questions, how, tokenizer, model.config)
    found = {}
    for some in judged_answers(model, tokenizer, items, how, units(items, how)):
        found.update(some)
    assert sorted(found) == list(range(len(items)))
    return [found[number] for number in range(len(items))]


def asked(*names, limit=None):
    return read_questions(find_any(names), "pocket", limit)


# --- rows ---


def test_held_out_rows_of_training_need_no_key(here):
    write_rows(here / "r.json", rows(2))
    for judge, right in (("exact", "true"), ("loss", "the correct answer is true")):
        (here / "t.yaml").write_text(f"rows: r.json\njudge: {judge}\n")
        first, _ = read_own_rows(load_task(here / "t.yaml"))
        assert (first.instruction, first.answer) == ("Is 0  even?", right)
    write_rows(here / "r.json", [{"instruction": "Who?", "output": "me", "input": "now"}])
    (here / "t.yaml").write_text("rows: r.json\njudge: exact\n")
    (row,) = read_own_rows(load_task(here / "t.yaml"))
    assert (row.context, row.answer) == ("now", "me")


def test_columns_templates_and_numbers(here, own):
    (row, *_) = read_own_rows(load_task(here / own(judge="number", answer="n")))
    assert (row.instruction, row.answer) == (OWN[0]["q"], "4")
    assert row.where.endswith("legs.json: row 1")
    name = own(judge="exact", question=None, template="Q: {q}\n{{n}}={n}. A:", limit=2)
    found = read_own_rows(load_task(here / name))
    assert [len(found), found[0].instruction] == [2, f"Q: {OWN[0]['q']}\n{{n}}=4. A:"]
    (row, *_) = read_own_rows(load_task(here / own(judge="choice", choices="among")))
    assert row.choices == ("3", "4")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"judge": "exact", "question": "qq"},
            r"legs.json: row 1: no column 'qq'; its columns are 'q', 'a', 'among', 'n' \(did you "
            r"mean 'q'\?\)",
        ),
        ({"judge": "exact", "question": None, "template": "{q} {x}"}, "row 1: no column 'x'; its"),
        ({"judge": "exact", "answer": "among"}, "column 'among': expected a text or a number"),
        ({"judge": "choice", "choices": "q"}, "column 'q': expected a list of two texts or more"),
        (
            {"judge": "choice", "choices": ["4", "2", "12"]},
            "row 3: its answer '6' is not among the choices '4', '2', '12'",
        ),
        ({"judge": "exact", "rows": "leg.json"}, r"No such file .*did you mean 'legs.json'"),
        ({"judge": "exact", "rows": "none.json"}, "none.json: no rows in it"),
        ({"judge": "exact", "rows": "chat.json", "question": None, "answer": None}, "conversation"),
    ],
)
def test_a_wrong_row_is_named_with_what_it_has(here, own, keys, said):
    write_rows(here / "none.json", [])
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write_rows(here / "chat.json", [{"messages": turns}])
    with pytest.raises(InputError, match=said):
        asked(own(**keys))


# --- what reaches a model, and what comes of it ---


def test_the_frame_is_the_evaluations_unless_the_task_says_otherwise(here, own):
    model = tiny_model()
    (row, *_) = answers(model, TOKENIZER, asked(own(judge="exact")))
    assert row.prompt.endswith(f"### Instruction:\n{OWN[0]['q']}\n\n### Response:\n")
    (row, *_) = answers(model, TOKENIZER, asked(own(judge="exact", prompt="none")))
    assert row.prompt == OWN[0]["q"]
    (row, *_) = answers(model, TOKENIZER, asked(own(judge="exact", prompt="chat")))
    assert row.prompt == f"<|user|>{OWN[0]['q']}</s>\n<|assistant|>"


def test_choices_are_scored_by_their_own_texts_after_a_space(own):
    model = tiny_model()
    questions = asked(own(judge="choice", choices="among", prompt="none"))
    found = answers(model, TOKENIZER, questions)
    for row, values in zip(found, OWN, strict=True):
        assert row.prompt == values["q"] + " "
        assert [choice.text for choice in row.choices] == values["among"]
        for choice in row.choices:
            before = TOKENIZER(values["q"])["input_ids"]
            tokens = TOKENIZER(row.prompt + choice.text)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
            places = range(len(before), len(tokens))
            expected = sum(logits[place - 1, tokens[place]].item() for place in places)
            assert choice.logprob == pytest.approx(expected, abs=1e-3)
        assert row.correct == (max(row.choices, key=lambda c: c.logprob).text == values["a"])


def test_a_longer_answer_may_be_asked_for_and_must_fit(own):
    model, name = tiny_model(), own(judge="exact", new_tokens=70, prompt="none")
    few = answers(model, TOKENIZER, asked(own("few", judge="exact", prompt="none")))
    many = answers(model, TOKENIZER, asked(name))
    assert max(len(row.output) for row in few) == 32  # a token is a character
    assert max(len(row.output) for row in many) == 70
    short = tiny_model(max_position_embeddings=80)
    with pytest.raises(InputError, match=r"legs.json: row 1: .* with 70 new ones that is more"):
        answers(short, TOKENIZER, asked(name))
    loss = own("loss", judge="loss", prompt="alpaca")
    with pytest.raises(InputError, match=r"row 1: with an answer it has \d+ tokens, more than the"):
        answers(short, TOKENIZER, asked(loss))


def test_the_eight_and_own_ones_are_asked_together_as_they_are_alone(here, own):
    model = tiny_model()
    write_rows(here / "d" / "boolq" / "test.json", rows(3))
    names = [
        *("boolq", own("words", judge="f1"), own("said", judge="loss")),
        *(
            own("likely", judge="choice", choices="among"),
            own("long", judge="exact", new_tokens=40),
        ),
    ]
    apart = [answers(model, TOKENIZER, read_questions(find_any([n]), "d", None)) for n in names]
    for settings in ({}, {"batch_size": 2}, {"strict": True}, {"answers_only": True}):
        together = answers(model, TOKENIZER, read_questions(find_any(names), "d", None), **settings)
        for row, alone in zip(together, (row for of_task in apart for row in of_task), strict=True):
            if row.loss is not None:
                assert (row.loss, row.tokens) == (pytest.approx(alone.loss, rel=1e-5), alone.tokens)
            elif row.choices:
                assert (row.parsed, row.parsed_norm) == (alone.parsed, alone.parsed_norm)
            elif settings == {"answers_only": True} and row.task == "boolq":
                assert row.parsed == alone.parsed
            else:
                assert row == alone


def test_a_file_can_say_what_one_of_the_eight_asks(here):
    model = tiny_model()
    write_rows(here / "d" / "boolq" / "test.json", rows(6))
    (here / "read.yaml").write_text(
        "rows: d/boolq/test.json\njudge: pattern\npattern: true|false\n"
    )
    (here / "likely.yaml").write_text(
        "rows: d/boolq/test.json\nanswer: output\njudge: choice\n"
        "choices: [the correct answer is true, the correct answer is false]\n"
    )
    for name, protocol in (("read", "generate"), ("likely", "loglik")):
        (theirs, own) = (
            answers(
                model, TOKENIZER, read_questions(find_any([task]), "d", None), protocol=protocol
            )
            for task in ("boolq", f"{name}.yaml")
        )
        for one, other in zip(theirs, own, strict=True):
            assert (one.prompt, one.output, one.correct) == (
                *(other.prompt, other.output, other.correct),
            )
            assert [c.logprob for c in one.choices] == [c.logprob for c in other.choices]


# --- loss ---


@pytest.mark.parametrize("prompt", ["alpaca", "llm-adapters", "chat"])
def test_loss_is_the_trainers_held_out_loss_on_the_same_rows(command, here, tiny_base, prompt):
    write_rows(here / "train.json", rows(12))
    held_out = [row | {"output": row["output"] + "!" * n} for n, row in enumerate(rows(7))]
    write_rows(here / "held.json", held_out)
    data = {"held_out": "held.json", "prompt": prompt, "cutoff": 1024}
    write_recipe(here / "r.yaml", tiny_base, here / "train.json", data=data)
    trained = command("train", "r.yaml", "--output", "run", "--json")
    assert trained.returncode == 0, trained.stderr
    result = json.loads(trained.stdout)
    (here / "held.yaml").write_text("rows: held.json\njudge: loss\n")
    done = command("eval", "run", "--tasks", "held.yaml", "--output", "out", "--json")
    assert done.returncode == 0, done.stderr
    (loss,) = json.loads(done.stdout)["losses"]
    assert loss["loss"] == pytest.approx(result["held_out_loss"], rel=1e-5)
    assert loss["n"] == 7
    said = read_evaluation(here / "out").rows
    assert loss["tokens"] == sum(row.tokens for row in said)
    lines = (here / "out" / "rows.jsonl").read_text().splitlines()
    assert set(json.loads(lines[0])) == {"task", "row", "prompt", "answer", "loss", "tokens"}


def test_loss_of_a_conversation_is_of_all_that_the_assistant_says(here):
    turns = [("user", "Hi"), ("assistant", "Ho"), ("user", "Why?"), ("assistant", "So.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    write_rows(here / "r.json", [{"messages": messages}])
    (here / "t.yaml").write_text("rows: r.json\njudge: loss\nprompt: chat\n")
    (row,) = answers(tiny_model(), TOKENIZER, asked("t.yaml"))
    assert row.tokens == len("Ho") + len("So.") + 2  # an end after each


def test_a_text_that_answers_nothing_counts_from_its_start_token_to_its_last_letter(here):
    write_rows(here / "r.json", [{"text": "a long tale"}, {"text": "Yes"}])
    (here / "t.yaml").write_text(
        "rows: r.json\njudge: loss\nprompt: none\ntemplate: ''\nanswer: text\n"
    )
    model = tiny_model()
    found = answers(model, TOKENIZER, asked("t.yaml"))
    assert [row.tokens for row in found] == [11, 3]
    tokens = TOKENIZER("<s>Yes", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    expected = -sum(logits[place - 1, tokens[place]].item() for place in (1, 2, 3))
    assert found[1].loss == pytest.approx(expected, rel=1e-5)


def test_losses_of_packed_rows_are_those_of_each_row_alone():
    model = tiny_model()
    long = [4 + n % 80 for n in range(300)]
    learned = [([0, 9, 8, *long[:n]], [-100, -100, -100, *long[:n]]) for n in (1, 300, 7, 40)]
    holes = [
        (tokens, [t if n % 3 == 1 and n > 1 else -100 for n, t in enumerate(tokens)])
        for tokens, _ in learned[1:]
    ]
    whole = [(tokens, [-100, *tokens[1:]]) for tokens, _ in learned]
    for some in (learned, holes, whole, learned * 8):
        for (tokens, labels), loss in zip(some, list(score_losses(model, some)), strict=True):
            with torch.no_grad():
                out = model(torch.tensor([tokens]), labels=torch.tensor([labels]))
            count = sum(label != -100 for label in labels)
            assert loss == pytest.approx(out.loss.item() * count, rel=1e-5)
    assert list(score_losses(model, [])) == []


def test_a_model_that_cannot_be_packed_is_asked_row_by_row():
    model = tiny_phi3(switch=64)
    rows = [([0, 9, *range(10, 10 + n)], [-100, -100, *range(10, 10 + n)]) for n in (20, 75)]
    for (tokens, labels), loss in zip(rows, list(score_losses(model, rows)), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([tokens[:-1]])).logits[0]  # the last predicts nothing
        expected = torch.nn.functional.cross_entropy(
            logits, torch.tensor(labels[1:]), reduction="sum"
        )
        assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_logits_are_capped_where_the_model_would_and_made_some_at_a_time(monkeypatch):
    monkeypatch.setattr("san_llm.ops.head_loss.LOGITS_AT_ONCE", 30)
    head, hidden = torch.nn.Linear(4, 10), torch.randn(17, 4)
    targets = torch.arange(17) % 10
    for cap in (None, 2.0):
        logits = head(hidden)
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        assert torch.allclose(losses(hidden, head, cap, targets), expected)


def test_a_loss_a_token_has_the_error_of_a_ratio():
    pairs = [(4.0, 2), (9.0, 3), (2.0, 1)]
    tokens, ratio, error = ratio_of_sums(pairs)
    assert (tokens, ratio) == (6, 2.5)
    apart = [loss - 2.5 * count for loss, count in pairs]
    assert error == pytest.approx(math.sqrt(sum(x * x for x in apart) * 3 / 2) / 6)
    assert ratio_of_sums(pairs[:1])[2] is None
    # Where all rows are of one length, it is the standard error of a mean.
    alike = [(1.0, 4), (3.0, 4), (8.0, 4)]
    mean = [loss / 4 for loss, _ in alike]
    spread = torch.tensor(mean).std().item() / math.sqrt(3)
    assert ratio_of_sums(alike)[2] == pytest.approx(spread)


# --- the command, and what is made of its results ---


@pytest.fixture
def evaluated(command, here, own, tiny_base):
    """Evaluate two models on one of the eight and tasks of each kind; return the folders."""
    save_tiny(here / "other", seed=1)
    names = [
        *("boolq", own("words", judge="f1"), own("said", judge="loss")),
        *(own("likely", judge="choice", choices="among"), own("right", judge="contains")),
    ]
    for model, output in ((tiny_base, "a"), ("other", "b")):
        done = command(
            *("eval", "--model", model, "--tasks", ",".join(names), "--prompt", "alpaca"),
            *("--limit", 3, "--output", output),
        )
        assert done.returncode == 0, done.stderr
    return here / "a", here / "b", done.stdout


def test_scores_losses_and_what_the_average_is_over_are_told(evaluated):
    folder, _, said = evaluated
    results = read_evaluation(folder).results
    assert [task.task for task in results.tasks] == ["boolq", "words", "likely", "right"]
    assert [task.judge for task in results.tasks] == [None, "f1", "choice", "contains"]
    assert results.tasks[2].guessing == pytest.approx((1 / 2 + 1 / 2 + 1 / 3) / 3)
    counted = [task.accuracy for task in results.tasks if task.task != "words"]
    assert results.average.accuracy == pytest.approx(sum(counted) / 3)
    assert set(results.task_files) == {"words", "said", "likely", "right"}
    (loss,) = results.losses
    rows = [row for row in read_evaluation(folder).rows if row.task == "said"]
    assert loss.loss == pytest.approx(sum(r.loss for r in rows) / sum(r.tokens for r in rows))
    assert "words, f1" in said
    assert "loss, nats a token" in said
    assert "average: over boolq, likely, right, whose answers are right or wrong" in said


def test_every_kind_is_compared_in_pairs(command, evaluated):
    first, other, _ = evaluated
    (base, run) = compare([first, other]).runs
    by_task = {change.task: change for change in run.differences}
    assert set(by_task) == {"boolq", "words", "likely", "right", "average"}
    assert (by_task["words"].gained, by_task["words"].lost) == (None, None)
    assert by_task["boolq"].gained is not None
    (loss,) = run.loss_differences
    assert loss.difference == pytest.approx(run.losses["said"][0] - base.losses["said"][0])
    assert loss.low <= loss.difference <= loss.high
    assert "likely" in compare([first, other], "acc_norm").rows
    assert compare([first, other], "acc_norm").averaged == ("likely",)
    done = command("compare", "a", "b")
    assert "loss, nats a token; less is better" in done.stdout
    assert "nats a token; below 0 is better" in done.stdout
    assert json.loads(command("compare", "a", "b", "--json").stdout)["runs"][1]["losses"]


def test_what_was_judged_otherwise_is_not_compared(command, here, own, evaluated):
    first, _, _ = evaluated
    own("words", judge="rouge-l")
    again = ("eval", "--model", "other", "--tasks")
    names = "boolq,words.yaml,said.yaml,likely.yaml,right.yaml"
    command(*again, names, "--prompt", "alpaca", "--limit", 3, "--output", "c")
    with pytest.raises(InputError, match="words is not asked the same: judge 'f1' and 'rouge-l'"):
        compare([first, here / "c"])


def test_losses_of_other_tokens_are_left_out_with_a_word(tmp_path, evaluated):
    from san_llm.evaluate.differences import alike_losses

    alike, unlike = alike_losses(
        {"x": [(1.0, 2)], "y": [(1.0, 2)]}, {"x": [(1.0, 2)], "y": [(1.0, 3)]}
    )
    assert [task for task, *_ in alike] == ["x"]
    assert unlike == [
        "y: its tokens are others, so that losses a token do not compare (another tokenizer or "
        "prompt)"
    ]


def test_a_permutation_test_exchanges_the_two_of_each_row():
    import numpy as np

    from san_llm.evaluate.differences import exchanged

    apart = [0.5, -0.25, 0.75, 0.125]
    signs = np.array(np.meshgrid(*[[1, -1]] * 4)).reshape(4, -1)
    sums = np.abs(np.array(apart) @ signs)
    expected = (sums >= abs(sum(apart)) - 1e-12).mean()
    assert exchanged(np.array(apart)) == pytest.approx(expected)
    assert exchanged(np.array([0.5])) == 1


def test_the_same_again_takes_what_is_stored_and_goes_on_where_it_stopped(command, here, own):
    save_tiny(here / "m")
    asked = ("eval", "--model", "m", "--tasks", f"{own(judge='loss')},boolq", "--limit", 2)
    first = command(*asked, "--output", "a")
    assert first.returncode == 0, first.stderr
    assert "all 4 rows were answered before" in command(*asked, "--output", "b").stderr
    assert (here / "a/rows.jsonl").read_bytes() == (here / "b/rows.jsonl").read_bytes()
    own(judge="loss", prompt="none")
    assert "answered before" not in command(*asked, "--output", "c").stderr


def test_the_shipped_example_runs(command, here, tiny_base):
    done = command("eval", "--model", tiny_base, "--tasks", "recipes/task_example.yaml", "--json")
    assert done.returncode == 0, done.stderr
    (task,) = json.loads(done.stdout)["tasks"]
    assert (task["task"], task["n"], task["guessing"]) == ("opposites", 24, pytest.approx(1 / 3))


def test_lm_eval_is_not_asked_for_them(command, here, own, tiny_base):
    done = command(
        "eval", "--model", tiny_base, "--tasks", own(judge="exact"), "--protocol", "lm-eval"
    )
    assert done.returncode == 2
    assert "--protocol lm-eval: it asks the eight and its own tasks, not legs.yaml" in done.stderr


def test_a_runs_page_drawings_and_card_tell_them(command, here, own, tiny_base):
    names = [own("words", judge="f1"), own("said", judge="loss"), "boolq"]
    train = write_rows(here / "train.json", rows(12))
    evaluation = {"tasks": names, "limit": 3}
    write_recipe(here / "r.yaml", tiny_base, train, evaluation=evaluation)
    assert command("train", "r.yaml", "--output", "run").returncode == 0
    for of in ("", "--base-only"):
        done = command(*("eval", "run", of) if of else ("eval", "run"))
        assert done.returncode == 0, done.stderr
    page = command("report", "run", "--json")
    assert page.returncode == 0, page.stderr
    text = (here / "run" / "report.html").read_text()
    assert "f1 on words (3 rows): " in text
    assert "Loss on said (3 rows): " in text
    assert "p by permutation" in text
    assert "Loss, nats a token; less is better" in text
    assert "--tasks words.yaml,said.yaml,boolq" not in text  # the recipe says so
    shown = command("show", "run", "--terminal").stdout
    assert "loss, nats a token" in shown
    assert "f1, %" in shown
    card = (here / "run" / "adapter" / "README.md").read_text()
    assert "nats a token" in card
    alone = command("eval", "run", "--tasks", "said.yaml", "--output", "run/eval/lone-adapter")
    assert alone.returncode == 0, alone.stderr
    page = command("report", "run", "--overwrite", "--json")
    assert page.returncode == 0, page.stderr
    assert "--tasks said.yaml" in (here / "run" / "report.html").read_text()
    assert command("show", "run", "--terminal").returncode == 0
    assert command("runs").returncode == 0


# --- forgetting ---


def test_the_neutral_text_is_cut_at_words_and_nothing_of_it_is_lost():
    text = NEUTRAL.read_text(encoding="utf-8")
    found = chunks(text)
    assert " ".join(" ".join(found).split()) == " ".join(text.split())
    assert max(map(len, found)) <= CHUNK
    assert min(map(len, found[:-1])) > CHUNK - 50
    assert chunks("a bc\n") == ["a bc"]
    assert chunks(" \n") == []


@pytest.fixture
def tuned(command, here, tiny_base):
    """A run over the tiny base whose recipe asks what it forgot, its adapter merged."""
    train = write_rows(here / "train.json", rows(12))
    evaluation = {"forgetting": True, "tasks": ["boolq"], "limit": 3}
    write_recipe(here / "r.yaml", tiny_base, train, evaluation=evaluation)
    for words in (("train", "r.yaml", "--output", "run"), ("merge", "run", "--output", "merged")):
        done = command(*words)
        assert done.returncode == 0, done.stderr


def test_what_was_forgotten_is_the_rise_over_the_base_of_the_adapter_and_the_merged_model(
    command, here, tuned, tiny_base
):
    done = command("eval", "run", "--output", "a")
    assert done.returncode == 0, done.stderr
    results = read_evaluation(here / "a").results
    told = results.forgetting
    assert f"forgetting: {told}" in done.stdout
    assert told.low < told.rise < told.high
    (loss,) = results.losses
    assert (loss.task, loss.n) == ("forgetting", 3)
    assert told.rise == pytest.approx(loss.loss - told.base_loss)
    assert results.task_files == {}
    # Measured by itself the base says the same.
    for subject in (("--model", tiny_base), ("run", "--base-only")):
        base = command("eval", *subject, "--tasks", "forgetting", "--limit", 3, "--json")
        assert base.returncode == 0, base.stderr
        value = json.loads(base.stdout)
        assert value["losses"][0]["loss"] == pytest.approx(told.base_loss, rel=1e-5)
        assert "forgetting" not in value
    asked = ("--tasks", "forgetting", "--limit", 3)
    merged = command("eval", "--model", "merged", *asked, "--json")
    assert merged.returncode == 0, merged.stderr
    assert json.loads(merged.stdout)["forgetting"]["rise"] == pytest.approx(told.rise, abs=1e-4)
    manifest = here / "merged" / "merge_manifest.json"
    manifest.write_text(manifest.read_text().replace(str(tiny_base), "/gone/base"))
    alone = command("eval", "--model", "merged", *asked, "--fresh", "--json")
    assert "its base /gone/base is not here: what it forgot is not told" in alone.stderr
    assert "forgetting" not in json.loads(alone.stdout)


def test_a_page_tells_what_was_forgotten_and_how_to_ask_again(command, here, tuned):
    assert command("eval", "run").returncode == 0
    assert command("eval", "run", "--no-forgetting", "--base-only").returncode == 0
    page = command("report", "run", "--json")
    assert page.returncode == 0, page.stderr
    text = (here / "run" / "report.html").read_text()
    told = read_evaluation(next((here / "run" / "eval").glob("*-adapter"))).results.forgetting
    assert f"Forgetting: {told} of a neutral text." in text
    assert "san-llm eval --base-only --no-forgetting" in text
    assert str(told) in command("show", "run", "--terminal").stdout


def test_a_text_of_ones_own_is_told_by_loss_alone(here):
    (here / "tale.txt").write_text("Once there was a hen. " * 60)
    (here / "t.yaml").write_text("rows: tale.txt\njudge: loss\n")
    found = answers(tiny_model(), TOKENIZER, asked("t.yaml"))
    assert [row.base_loss for row in found] == [None, None]
    assert found[0].tokens + found[1].tokens == 22 * 60 - 2  # the space between, and at the end
    (here / "t.yaml").write_text("rows: tale.txt\njudge: exact\nprompt: alpaca\n")
    with pytest.raises(InputError) as told:
        asked("t.yaml")
    assert "prompt: a text as rows has no use for it" in str(told.value)
    assert "judge: of a text as rows only loss is told" in str(told.value)
    (here / "t.yaml").write_text("rows: tales.txt\njudge: loss\n")
    with pytest.raises(InputError, match=r"No such file .*did you mean '.*tale.txt'"):
        asked("t.yaml")


# --- the eight as files ---


def as_own(folder, task):
    """Return a published task's file under another name, its rows those of the pocket set."""
    text = (Path(tasks.__file__).with_name("commonsense") / f"{task.name}.yaml").read_text()
    copied = folder / f"own-{task.name}.yaml"
    copied.write_text(
        text.replace(f"name: {task.name}", f"name: own-{task.name}").replace(
            f"rows: {task.name}", f"rows: {POCKET / task.name}"
        )
    )
    return load_task(copied)


@pytest.fixture(scope="module")
def own_eight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eight")
    return [(task, as_own(folder, task)) for task in TASKS.values()]


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_each_of_the_eight_asks_as_its_file_says(task, here):
    own, asked = as_own(here, task), []
    for which in (task, own):
        questions = read_questions([which], "pocket", 4)
        items = pose(questions, Settings(), TOKENIZER, SimpleNamespace(vocab_size=512))
        asked.append([(i.way, i.prompt, i.tokens, i.row.answer, i.new_tokens) for i in items])
    assert asked[0] == asked[1]
    assert own.says.guessing == guessing([task.name])


@given(st.data())
def test_each_of_the_eight_is_judged_as_its_file_says(own_eight, data):
    task, own = data.draw(st.sampled_from(own_eight))
    words = st.sampled_from(["", " ", "\n", "### Response:", "not ", "Answer", *task.answers])
    text = "".join(data.draw(st.lists(words, max_size=8)))
    answer = data.draw(st.sampled_from(task.answers))
    published, by_file = (judge_text(which, 0, "", text, answer) for which in (task, own))
    assert (published.parsed, published.correct) == (by_file.parsed, by_file.correct)
