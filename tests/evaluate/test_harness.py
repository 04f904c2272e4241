"""lm-evaluation-harness's own tasks: what it measures itself, in the frame of the training."""

import json

import pytest
import yaml
from tiny import rows, tiny_tokenizer, write_recipe, write_rows

from san_llm.protocol.prompts import evaluation_prompt

pytest.importorskip("lm_eval")

ASK = {
    "output_type": "generate_until",
    "doc_to_text": "Q: {{q}}\nA:",
    "doc_to_target": "{{a}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
    "num_fewshot": 1,
    "fewshot_config": {"sampler": "first_n", "samples": [{"q": "1?", "a": "2"}]},
    "filter_list": [
        {
            "name": "letter",
            "filter": [
                {"function": "regex", "regex_pattern": "([a-m])"},
                {"function": "take_first"},
            ],
        },
        {"name": "whole", "filter": [{"function": "take_first"}]},
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
CHOOSE = {
    "output_type": "multiple_choice",
    "doc_to_text": "Q: {{q}}\nA:",
    "doc_to_choice": "{{c}}",
    "doc_to_target": "{{g}}",
    "metric_list": [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True}
        for metric in ("acc", "acc_norm")
    ],
}


@pytest.fixture
def theirs(here, monkeypatch):
    """Return what writes a task of lm_eval's, with four rows, and gives its file's name."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", here / "cache")
    choices = ["a", "a long one", "bc"]
    values = [
        {"q": f"{n} {'x' * n}?", "a": "abdl"[n], "c": choices, "g": n % 3, "text": "So it is."}
        for n in range(4)
    ]
    (here / "q.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))

    def write(name, **says):
        data = {"data_files": {"test": str(here / "q.jsonl")}}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
        (here / f"{name}.yaml").write_text(yaml.safe_dump(task | says))
        return f"{name}.yaml"

    return write


def told(folder):
    lines = (folder / "rows.jsonl").read_text().splitlines()
    results = json.loads((folder / "results.json").read_text())
    by_task = {}
    for row in map(json.loads, lines):
        by_task.setdefault(row["task"], []).append(row)
    return results, by_task


def by_itself(base, *files):
    """Return what lm_eval says when it is asked alone."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    return simple_evaluate(
        model=HFLM(pretrained=str(base), device="cpu", dtype="float32", batch_size=2),
        tasks=list(files),
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )


def test_scores_and_answers_are_those_of_lm_eval_alone(command, here, theirs, tiny_base):
    files = theirs("ask", **ASK), theirs("choose", **CHOOSE)
    asked = ("eval", "--model", tiny_base, "--protocol", "lm-eval", "--tasks", ",".join(files))
    done = command(*asked, "--output", "out")
    assert done.returncode == 0, done.stderr
    results, found = told(here / "out")
    assert (results["protocol"], results["prompt"]) == ("lm-eval", "none")
    alone = by_itself(tiny_base, *files)
    scores = {task["task"]: task for task in results["tasks"]}
    assert list(scores) == ["ask/letter", "ask/whole", "choose"]
    for kind in ("letter", "whole"):
        theirs_says = alone["results"]["ask"][f"exact_match,{kind}"]
        assert scores[f"ask/{kind}"]["accuracy"] == theirs_says
        samples = [one for one in alone["samples"]["ask"] if one["filter"] == kind]
        rows = found[f"ask/{kind}"]
        assert [row["prompt"] for row in rows] == [one["arguments"][0][0] for one in samples]
        assert [row["output"] for row in rows] == [one["resps"][0][0] for one in samples]
        parsed = [one["filtered_resps"][0] for one in samples]
        assert [row["parsed"] or "[invalid]" for row in rows] == parsed
    assert any(row["parsed"] for row in found["ask/letter"])
    assert scores["ask/letter"]["unparseable"] == sum(not r["parsed"] for r in found["ask/letter"])
    for key, theirs_key in (("accuracy", "acc,none"), ("accuracy_norm", "acc_norm,none")):
        assert scores["choose"][key] == alone["results"]["choose"][theirs_key]
    assert 0 < scores["choose"]["accuracy"] < 1
    for row, one in zip(found["choose"], alone["samples"]["choose"], strict=True):
        assert [c["logprob"] for c in row["choices"]] == pytest.approx(
            [logprob for logprob, _ in one["filtered_resps"]], abs=1e-4
        )
        assert row["answer"] == ["a", "a long one", "bc"][one["target"]]
    # What stands apart is in no average.
    counted = [scores[name]["accuracy"] for name in ("ask/letter", "choose")]
    assert results["average"]["accuracy"] == pytest.approx(sum(counted) / 2)
    assert "average: over ask/letter, choose, whose answers are right or wrong" in done.stdout
    again = command(*asked, "--output", "again")
    assert "all 12 rows were answered before" in again.stderr
    assert told(here / "again")[1] == found


def test_a_run_is_asked_in_its_frame_and_compared_with_its_base(command, here, theirs, tiny_base):
    train = write_rows(here / "rows.json", rows(12))
    training = {"max_steps": 1, "evaluate_every": 1}
    write_recipe(here / "r.yaml", tiny_base, train, training=training)
    done = command("train", "r.yaml", "--output", "run")
    assert done.returncode == 0
    assert "next: `san-llm generate --rows held-out --limit 10 --compare`, `san-llm" in done.stderr
    file = theirs("ask", **ASK)
    asked = ("eval", "run", "--protocol", "lm-eval", "--tasks", file)
    plain = [f"Q: 1?\nA: 2\n\nQ: {n} {'x' * n}?\nA:" for n in range(4)]
    turns = [
        [
            {"role": "user", "content": "Q: 1?\nA:"},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": text.split("\n\n")[1]},
        ]
        for text in plain
    ]
    templated = [
        tiny_tokenizer().apply_chat_template(each, tokenize=False, add_generation_prompt=True)
        for each in turns
    ]
    in_alpaca = [evaluation_prompt("alpaca", text) for text in plain]
    for output, more, prompts in (
        ("run/eval/adapted", (), in_alpaca),
        ("run/eval/base", ("--base-only",), in_alpaca),
        ("plain", ("--prompt", "none"), plain),
        ("chat", ("--prompt", "chat"), templated),
    ):
        done = command(*asked, "--output", output, *more)
        assert done.returncode == 0, done.stderr
        _, found = told(here / output)
        assert [row["prompt"] for row in found["ask/whole"]] == prompts, output
    assert command("report", "run").returncode == 0
    page = (here / "run" / "report.html").read_text()
    assert "san-llm eval --protocol lm-eval --tasks ask.yaml\n" in page.replace("</code>", "\n")
    assert "score on ask/whole (4 rows): " in page
    base, adapted = "run/eval/base", "run/eval/adapted"
    done = command("compare", base, adapted, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == {"ask/letter": 4, "ask/whole": 4}
    done = command("compare", base, "chat")
    assert done.stderr.startswith(f"error: {base} and chat: not the same prompt: alpaca and chat")
    # Another text around the same rows is another question.
    theirs("ask", **ASK | {"doc_to_text": "{{q}}"})
    assert command(*asked, "--output", "other").returncode == 0
    done = command("compare", adapted, "other")
    assert "ask/letter is not asked the same: lm_eval" in done.stderr


def test_a_row_longer_than_the_context_is_told(command, here, theirs, tiny_base):
    file = theirs("ask", **ASK | {"doc_to_text": "{{q * 100}}", "num_fewshot": 0})
    done = command(
        *("eval", "--model", tiny_base, "--protocol", "lm-eval", "--tasks", file),
        *("--output", "out", "--limit", 4),
    )
    assert done.returncode == 0, done.stderr
    # Of 300, 400, 500 and 600 characters one token each, and 6 new ones: none of 1,024.
    assert "warning" not in done.stderr
    file = theirs("ask", **ASK | {"doc_to_text": "{{q * 200}}", "num_fewshot": 0})
    done = command(
        *("eval", "--model", tiny_base, "--protocol", "lm-eval", "--tasks", file),
        *("--output", "long"),
    )
    assert "warning: ask: 1 rows are longer than the model's context of 1,024" in done.stderr


@pytest.mark.parametrize(
    ("tasks", "says", "message"),
    [
        ("asq", {}, "task 'asq' is none of the eight, and none of lm_eval's (did you mean 'ask'?)"),
        (
            "boolq,ask.yaml",
            {},
            "--tasks: ask.yaml is lm_eval's, boolq is not: evaluate them apart",
        ),
        (
            "ask.yaml",
            {"output_type": "generate"},
            "ask.yaml: lm_eval cannot load it: Got invalid output_type 'generate', must be in",
        ),
        (
            "ask.yaml",
            {"dataset_kwargs": {"data_files": {"test": "none.jsonl"}}},
            "ask.yaml: lm_eval cannot load it: Unable to find",
        ),
        (
            "ask.yaml",
            {
                "output_type": "loglikelihood_rolling",
                "doc_to_target": "{{text}}",
                "metric_list": [{"metric": "word_perplexity"}],
            },
            "ask: is a text, without answers; a task file of judge loss takes it",
        ),
        ("ask.yaml", {"unsafe_code": True}, "ask: runs what the model writes as a program"),
        (
            "ask.yaml",
            {"metric_list": [{"metric": "bleu"}]},
            "ask: has no metric of single rows: bl",
        ),
        ("asq.yaml", {}, "asq.yaml: no such task file (did you mean 'ask.yaml'?)"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    command, here, theirs, tiny_base, monkeypatch, tasks, says, message
):
    from lm_eval.tasks import TaskManager

    def few(defaults):  # to read all of lm_eval's takes seconds
        return TaskManager(include_defaults=False, include_path=str(here) if defaults else None)

    monkeypatch.setattr("san_llm.evaluate.harness.task_manager", few)
    theirs("ask", **ASK | says)
    done = command("eval", "--model", tiny_base, "--protocol", "lm-eval", "--tasks", tasks)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert message in done.stderr.splitlines()[-1]
    assert not (here / "eval").exists()
