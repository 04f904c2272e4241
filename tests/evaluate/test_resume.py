"""What is stored: an evaluation that stops goes on to the same bytes, and only the same one."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from running import start, workers
from san.adapted import adapt
from tiny import rows, save_tiny, tiny_model, write_rows

from san_llm.errors import InputError
from san_llm.evaluate.identity import identity
from san_llm.evaluate.questions import Settings, read_questions
from san_llm.evaluate.request import EvalTask
from san_llm.evaluate.store import Progress, progress_of, read_evaluation
from san_llm.models.locate import find_base
from san_llm.models.subject import find_subject
from san_llm.protocol.tasks import TASKS

FILES = ("rows.jsonl", "results.json")


@pytest.fixture
def cache(here, monkeypatch):
    """A cache that no other test has seen."""
    monkeypatch.setenv("SAN_LLM_CACHE", str(here / "cache"))
    return here / "cache" / "evaluations"


@pytest.fixture
def data(here):
    write_rows(here / "data" / "boolq" / "test.json", rows(48))
    write_rows(
        here / "data" / "piqa" / "test.json", [row | {"answer": "solution1"} for row in rows(400)]
    )
    return here / "data"


def asked(base, *more) -> list[str]:
    words = ("eval", "--model", base, "--tasks", "boolq", "--data", "data", "--prompt", "alpaca")
    return list(map(str, (*words, "--batch-size", 2, *more)))


def stored_rows(cache: Path) -> int:
    return sum(path.read_text().count("\n") for path in cache.glob("*/part-*.jsonl"))


def wait_for_rows(cache: Path, process: subprocess.Popen[str], count: int = 1) -> None:
    for _ in range(6000):
        if stored_rows(cache) >= count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    pytest.fail("no row was answered")


def files(folder: Path) -> dict[str, bytes]:
    """Return what an evaluation leaves; the folder's own name stands in its results."""
    name = folder.name.encode()
    return {file: (folder / file).read_bytes().replace(name, b"NAME") for file in FILES}


@pytest.mark.parametrize(
    ("protocol", "strict", "matters"),
    [
        ("generate", False, set()),  # in fp32 the search is the same in any batch
        ("loglik", False, {"batch_size"}),  # who shares a forward may change a last bit
        ("lm-eval", False, {"batch_size", "processes"}),
        ("lm-eval", True, set()),
    ],
)
def test_who_shares_a_forward_is_in_the_key_where_it_can_change_a_bit(
    here, data, tiny_base, monkeypatch, protocol, strict, matters
):
    subject = find_subject(str(tiny_base))
    questions, found = read_questions([TASKS["boolq"]], str(data), 2), find_base(subject.base)

    def key(batch_size: int, processes: int) -> dict[str, Any]:
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        settings = Settings(protocol, "alpaca", batch_size, strict)
        return identity(EvalTask(subject, questions, settings, {}, here), found)

    one = key(1, 1)
    wanted = version("lm_eval") if protocol == "lm-eval" else None
    assert one["versions"].get("lm_eval") == wanted
    for name, other in (("batch_size", key(2, 1)), ("processes", key(1, 2))):
        assert {field for field in one if one[field] != other[field]} == {name} & matters


def test_all_that_an_answer_depends_on_is_in_the_key_and_no_name(
    here, data, tiny_base, monkeypatch
):
    subject = find_subject(str(tiny_base), dtype="bfloat16")
    adapt(tiny_model()).save_pretrained(here / "adapter")
    pocket, found = str(data), find_base(subject.base)
    settings = Settings("generate", "alpaca", 1)

    def key(subject: Any = subject, tasks: str = "boolq", rows: int = 2, **how: Any) -> Any:
        questions = read_questions([TASKS[name] for name in tasks.split()], pocket, rows)
        task = EvalTask(subject, questions, replace(settings, **how), {"title": "x"}, here)
        return identity(task, found)

    def of_base(**changes: Any) -> Any:
        return key(replace(subject, base=subject.base.model_copy(update=changes)))

    one = key()
    assert one["model"].keys() >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert one["adapter"] is None
    assert one["data"]["boolq"]["rows"] == 2
    assert {"san_llm", "torch", "transformers"} <= {n.replace("-", "_") for n in one["versions"]}
    for part, other in (
        ("load", of_base(dtype="float32")),
        ("load", of_base(quantization="4bit")),
        ("load", of_base(quantization="4bit", double_quant=True)),
        ("data", key(rows=3)),
        ("data", key(tasks="piqa")),
        ("data", key(tasks="boolq piqa")),
        ("adapter", key(replace(subject, adapter=here / "adapter"))),
        ("protocol", key(prompt="llm-adapters")),
        ("protocol", key(protocol="loglik")),
        ("protocol", key(answers_only=True)),
        ("protocol", key(strict=True)),
        ("batch_size", key(batch_size=2)),
    ):
        differ = {name for name in one | other if one.get(name) != other.get(name)}
        assert part in differ, part
        assert differ <= {part, "batch_size", "processes"}, part
    assert of_base(model="elsewhere", revision="main") == one
    (data / "boolq" / "moved.json").write_text((data / "boolq" / "test.json").read_text())
    assert key() == one
    for name, value in (("BEAMS", 5), ("NEW_TOKENS", 33), ("FORMAT", 2)):
        with monkeypatch.context() as patch:
            patch.setattr(f"san_llm.evaluate.identity.{name}", value)
            assert key() != one, name
    for name in ("code_sha256", "versions"):
        with monkeypatch.context() as patch:
            patch.setattr(f"san_llm.evaluate.identity.{name}", lambda: {"other": "0"})
            assert key() != one, name


def test_a_progress_says_what_it_is_of_and_vanishes_where_nothing_was_answered(cache):
    for answered in (False, True, False):
        with progress_of({"a": 1}) as progress:
            (folder,) = (path for path in cache.iterdir() if path.is_dir())
            assert progress.folder == folder
            assert json.loads((folder / "identity.json").read_text()) == {"a": 1}
            if answered:
                (folder / "identity.json").write_text('{"a":   1}')  # not written anew
                (folder / "part-0.jsonl").write_text("")
        kept = (folder / "part-0.jsonl").exists()
        assert folder.exists() == kept
        if kept:
            assert (folder / "identity.json").read_text() == '{"a":   1}'
    with progress_of({"a": 2}) as other:
        assert other.folder != folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "options", "count"),
    [
        (signal.SIGKILL, ("--protocol", "generate", "--tasks", "boolq"), 48),
        (signal.SIGINT, ("--protocol", "loglik", "--tasks", "piqa"), 400),
        (signal.SIGKILL, ("--protocol", "generate", "--tasks", "boolq", "--processes", 2), 48),
    ],
    ids=["kill", "ctrl-c", "kill-2-processes"],
)
def test_a_stopped_evaluation_goes_on_to_the_same_bytes(
    command, here, cache, data, tiny_base, stop, options, count
):
    words = asked(tiny_base, *options)
    process = start(here, *words, "--output", "parts")
    try:
        wait_for_rows(cache, process)
        process.send_signal(stop)
        out, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == (130 if stop == signal.SIGINT else -stop), errors
    assert out == ""
    assert "Traceback" not in errors
    if stop == signal.SIGINT:
        assert "the same command goes on with the rows that are not answered yet" in errors
    # Nothing partial looks complete.
    assert not (here / "parts").exists()
    assert not list(here.rglob("results.json"))
    for _ in range(200):  # workers notice that their command is gone
        if not workers(here):
            break
        time.sleep(0.1)
    before = stored_rows(cache)
    assert 0 < before < count
    words = [*words, "--processes", "1"]
    done = command(*words, "--output", "parts")
    assert done.returncode == 0, done.stderr
    identities = [json.loads(path.read_text()) for path in cache.glob("*/identity.json")]
    assert len(identities) == 1, [
        (key, [identity[key] for identity in identities])
        for key in identities[0]
        if any(identity[key] != identities[0][key] for identity in identities)
    ]
    assert f"going on: {before:,} of {count:,} rows were answered before" in done.stderr
    assert stored_rows(cache) == 0
    whole = command(*words, "--output", "whole", "--fresh")
    assert whole.returncode == 0, whole.stderr
    assert "going on" not in whole.stderr
    assert files(here / "parts") == files(here / "whole")


def test_a_finished_evaluation_is_taken_again_only_while_everything_is_the_same(
    command, here, cache, data, tiny_base
):
    base = shutil.copytree(tiny_base, here / "base")
    adapt(tiny_model()).save_pretrained(here / "adapter")
    # Characters that end a line for some readers, but no row of an evaluation.
    rows_file = here / "data" / "boolq" / "test.json"
    rows_file.write_text(rows_file.read_text().replace("even?", "even\u2028\u2029\x85?"))
    number = iter(range(100))

    def again(*more) -> bool:
        """Evaluate into a new folder; whether all rows were taken from an earlier one."""
        folder = f"out{next(number)}"
        words = (*asked(base, "--adapter", "adapter", "--limit", 3), *more, "--output", folder)
        done = command(*words)
        assert done.returncode == 0, done.stderr
        assert len(read_evaluation(here / folder).rows) == 3
        return "all 3 rows were answered before" in done.stderr

    assert not again()
    assert again()
    assert again("--batch-size", 1)  # it does not change an answer
    assert files(here / "out0") == files(here / "out2")
    assert not again("--prompt", "llm-adapters")
    assert not again("--protocol", "loglik")
    assert not again("--strict")
    assert not again("--dtype", "bfloat16")
    assert not again("--fresh")
    assert again()

    config = here / "base" / "generation_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": 7}))
    assert not again()
    # Other weights of the same size, with the old times put back.
    weights = here / "adapter" / "adapter_model.safetensors"
    facts, content = weights.stat(), weights.read_bytes()
    adapt(tiny_model(), seed=9).save_pretrained(here / "adapter")
    os.utime(weights, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert weights.stat().st_size == facts.st_size
    assert not again()
    weights.write_bytes(content)
    assert again()
    write_rows(data / "boolq" / "test.json", rows(49))
    assert not again()
    # The folder that the cache names is another now.
    (here / "out0" / "rows.jsonl").write_text("")
    for folder in here.glob("out*"):
        shutil.rmtree(folder)
    assert not again()


def test_the_same_evaluation_twice_at_once_is_done_once(here, cache, data, tiny_base):
    processes = [start(here, *asked(tiny_base, "--output", f"out{n}")) for n in range(2)]
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert files(here / "out0") == files(here / "out1")
    assert sum("all 48 rows were answered before" in errors for _, errors in said) == 1


def test_a_line_that_was_cut_short_is_answered_again(command, here, cache, data, tiny_base):
    words = asked(tiny_base, "--limit", 4, "--output")
    assert command(*words, "whole").returncode == 0
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    (folder / "finished.json").unlink()
    lines = [
        json.dumps([number, row.to_json()])
        for number, row in enumerate(read_evaluation(here / "whole").rows)
    ]
    (folder / "part-x.jsonl").write_text(f"{lines[0]}\n{lines[1]}\n{lines[2][:40]}")
    assert sorted(Progress(folder).rows()) == [0, 1]
    done = command(*words, "parts")
    assert "going on: 2 of 4 rows" in done.stderr
    assert files(here / "parts") == files(here / "whole")


@pytest.mark.parametrize("broken", ["rows.jsonl", "manifest.json", "results.json"])
def test_an_evaluation_that_was_changed_is_refused(command, here, cache, data, tiny_base, broken):
    for name in ("one", "two"):
        assert command(*asked(tiny_base, "--limit", 2, "--output", name)).returncode == 0
    path = here / "two" / broken
    if broken == "rows.jsonl":
        path.write_text(path.read_text().replace('"correct": false', '"correct": true'))
        message = "two/rows.jsonl: not the rows that were written: its sha256 is another"
    else:
        path.unlink()
        message = f"two: not a finished evaluation: no {broken} in it"
    done = command("compare", "one", "two")
    assert done.returncode == 2
    if broken == "manifest.json":
        message = "two: no finished evaluation in it; `san-llm eval` makes one"
    assert done.stderr == f"error: {message}\n"


def test_what_no_evaluation_has_written_is_refused(command, here, cache, data, tiny_base):
    assert command(*asked(tiny_base, "--limit", 2, "--output", "one")).returncode == 0

    def refused(name, change, message):
        file = here / "one" / name
        before = file.read_text()
        file.write_text(change(before))
        with pytest.raises(InputError, match=message):
            read_evaluation(here / "one")
        file.write_text(before)

    def patched(**changes):
        return lambda text: json.dumps(json.loads(text) | changes)

    refused("results.json", patched(average={"accuracy": {}}), r"average\.accuracy: Input should")
    refused(
        "results.json", patched(tasks=[{"task": 5}]), r"results\.json: tasks\.0\.accuracy: Field"
    )
    lost = {"data": {"boolq": {"sha256": "0"}}, "load": [[]]}
    refused("manifest.json", patched(identity=lost), r"identity\.data\.boolq\.rows: Field required")
    (here / "one" / "rows.jsonl").write_text("[1]\n")
    digest = sha256(b"[1]\n").hexdigest()
    refused("manifest.json", patched(rows_sha256=digest), r"rows\.jsonl: not rows of an evaluation")


def test_what_cannot_be_written_leaves_the_rows_for_the_next_time(
    command, here, cache, data, tiny_base, monkeypatch
):
    base = save_tiny(here / "other", seed=3)

    def full(folder, *_):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    with monkeypatch.context() as patched:
        patched.setattr("san_llm.evaluate.run.write_evaluation", full)
        done = command(*asked(base, "--limit", 2, "--output", "out"))
    assert done.returncode == 1
    assert "No space left on device; make room" in done.stderr
    assert not (here / "out").exists()
    assert stored_rows(cache) == 2
    done = command(*asked(base, "--limit", 2, "--output", "out"))
    assert done.returncode == 0
    assert "going on: 2 of 2 rows" in done.stderr
