"""kill -9 of whole process trees, full disks, foreign pickles: nothing is lost, nothing is half."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import transformers
from conftest import Cli
from packaging.version import Version
from running import start
from tiny import rows, write_recipe, write_rows

from san_llm.errors import InputError, SanError
from san_llm.recipe.read import load_recipe
from san_llm.runs.folder import new_run, recipe_of
from san_llm.train.checkpoint import SEAL, _seal, best_of, damage
from san_llm.train.run import train

TRAINING = {"max_steps": 28, "epochs": 100.0, "evaluate_every": 4, "save_minutes": 0.005}


def written(folder: Path, base: Path) -> Path:
    # LoRA with dropout: the dice must fall alike, too.
    data = write_rows(folder / "rows.json", rows(30))
    method = {"name": "lora", "rank": 4, "dropout": 0.1}
    return write_recipe(folder / "r.yaml", base, data, training=TRAINING, method=method)


@pytest.fixture
def recipe(here: Path, tiny_base: Path) -> Path:
    return written(here, tiny_base)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A run of that recipe which nothing stopped. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("whole")
    straight(written(folder, tiny_base), folder / "run")
    return folder / "run"


def straight(path: Path, run: Path, *overrides: str) -> None:
    """Train without a stop, in this process and on one thread, as the processes do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        recipe = load_recipe(path, list(overrides))
        train(recipe, new_run(recipe, run, overwrite=False))
    finally:
        torch.set_num_threads(threads)


def kill_tree(process: subprocess.Popen[str]) -> None:
    """Kill -9 a process and all that it has started."""
    tree = [process.pid]
    with contextlib.suppress(psutil.NoSuchProcess):
        tree += [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    for number in tree:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    process.communicate()


def wait_until(process: subprocess.Popen[str], there: object) -> bool:
    """Wait until ``there()`` is true; False if the process ended before."""
    while process.poll() is None:
        if there():  # type: ignore[operator]
            return True
        time.sleep(0.001)
    return False


def same_run(one: Path, two: Path) -> None:
    """Check that nobody can tell two runs apart."""
    for name in ("adapter/adapter_model.safetensors", "log.jsonl"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    first, second = (json.loads((run / "metrics.json").read_text()) for run in (one, two))
    for result in (first, second):
        for key in ("run", "seconds", "resumed_at", "peak_memory"):
            del result[key]
    assert first == second


# --- kills ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_kills_at_random_moments_and_inside_checkpoints_leave_no_trace(
    here: Path, recipe: Path, whole: Path
) -> None:
    dice = random.Random(1)
    run = here / "parts"
    process = start(here, "train", recipe, "--output", run)

    def writing() -> bool:
        return any(run.glob("checkpoints/.checkpoint-*/*"))

    def past(step: int) -> bool:
        log = run / "log.jsonl"
        return log.is_file() and f'"step": {step},' in log.read_text()

    kills = 0
    for step in (5, 13):
        inside = dice.random() < 0.67
        assert wait_until(process, lambda at=step: past(at))
        wait_until(process, writing) if inside else time.sleep(dice.uniform(0, 0.2))
        kill_tree(process)
        kills += 1
        assert not (run / "adapter").exists()
        for path in run.glob("checkpoints/checkpoint-*"):
            assert damage(path) is None, "what has its name is whole"
        process = start(here, "train", run, "--resume")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert kills == 2
    same_run(whole, run)
    assert not list(run.glob("checkpoints/.*"))
    assert not list(run.glob(".*"))


@pytest.mark.slow
def test_kills_inside_the_cache_a_merge_and_an_evaluation_leave_nothing_that_looks_whole(
    here: Path, recipe: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAN_LLM_CACHE", str(here / "cache"))
    cache = here / "cache" / "tokenized"
    write_rows(here / "rows.json", rows(1500))
    how = ("training.max_steps=2", "training.evaluate_every=2")
    process = start(here, "train", recipe, *how, "--output", "run")
    wait_until(process, lambda: cache.is_dir() and any(cache.glob(".*")))
    kill_tree(process)
    done = cli("train", "run", "--resume")
    assert done.returncode == 0, done.stderr
    straight(recipe, here / "whole", *how)  # with the cache that was made after the kill
    same_run(here / "whole", here / "run")

    process = start(here, "merge", "--adapter", "run/adapter", "--output", "merged")
    wait_until(process, lambda: any(here.glob(".merged*")))
    kill_tree(process)
    if (here / "merged").exists():  # the kill came too late
        shutil.rmtree(here / "merged")
    done = cli("merge", "--adapter", "run/adapter", "--output", "merged", "--verify")
    assert done.returncode == 0, done.stderr

    process = start(here, "eval", "--adapter", "run/adapter", "--limit", 2, "--output", "scores")
    wait_until(process, lambda: any(here.glob(".scores*/rows.jsonl")))
    kill_tree(process)
    if (here / "scores" / "results.json").exists():  # the kill came too late
        assert len((here / "scores" / "rows.jsonl").read_text().splitlines()) == 16


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"),
    reason="Trainer restores to the device 'cpu:0', which torch does not know",
)
def test_a_run_goes_on_with_another_number_of_processes(here: Path, whole: Path, cli: Cli) -> None:
    from safetensors.torch import load_file

    # Micro-batches of the same rows throw the same dice for dropout wherever they are computed.
    shutil.copytree(whole, here / "parts")
    shutil.rmtree(here / "parts" / "adapter")
    kept = sorted(
        int(path.name.split("-")[1]) for path in (here / "parts/checkpoints").glob("checkpoint-*")
    )
    for step in kept[1:]:
        shutil.rmtree(here / "parts" / "checkpoints" / f"checkpoint-{step}")
    assert kept[0] < 28
    done = cli("train", "parts", "--resume", "--processes", 2)
    assert done.returncode == 0, done.stderr
    one, two = (
        load_file(run / "adapter/adapter_model.safetensors") for run in (whole, here / "parts")
    )
    assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-5


# --- stops ------------------------------------------------------------------------------------


@pytest.mark.fresh
@pytest.mark.slow
def test_sigterm_before_the_first_step_says_try_again(here: Path, recipe: Path) -> None:
    process = start(here, "train", recipe, "--output", "run")
    lock = here / "run" / "lock"
    assert wait_until(process, lambda: lock.is_file() and lock.read_text())
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75, errors
    assert "--resume` goes on" in errors
    assert not lock.exists()


def test_a_second_run_into_a_folder_is_refused_with_the_first_ones_process(
    here: Path, recipe: Path, command: Cli
) -> None:
    process = start(here, "train", recipe, "training.max_steps=400", "--output", "run")
    lock = here / "run" / "lock"
    try:
        assert wait_until(process, lambda: lock.is_file() and lock.read_text())
        process.send_signal(signal.SIGSTOP)  # it holds the lock, and need not train for that
        for arguments in (("run", "--resume"), (recipe, "--output", "run", "--overwrite")):
            second = command("train", *arguments)
            assert second.returncode == 2
            line = second.stderr.splitlines()[-1]
            assert line.startswith(f"error: run: process {process.pid} has been training into it")
    finally:
        kill_tree(process)
    assert lock.is_file()  # of a dead process: no obstacle
    again = command("train", recipe, "training.max_steps=2", "--output", "run", "--overwrite")
    assert again.returncode == 0, again.stderr


# --- disks ------------------------------------------------------------------------------------


def test_a_full_disk_ends_with_one_line_and_leaves_no_half_checkpoint(
    here: Path, recipe: Path, whole: Path
) -> None:
    run = here / "run"
    with pytest.raises(SanError) as caught:
        _train_with_limit(recipe, run)
    assert "\n" not in str(caught.value)
    assert "cannot be written: " in str(caught.value)
    assert f"`san-llm train {run} --resume` goes on from the last checkpoint" in str(caught.value)
    assert not [p for p in run.rglob("*") if p.name.startswith(".")]
    for path in run.glob("checkpoints/checkpoint-*"):
        assert damage(path) is None
    train(recipe_of(run), run)
    same_run(whole, run)


def _train_with_limit(path: Path, run: Path) -> None:
    """Train with a limit on the size of files that the second checkpoint's optimizer exceeds."""
    from san_llm.train.trainer import SanTrainer

    recipe = load_recipe(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = SanTrainer._save_optimizer_and_scheduler
    times = 0

    def limited(self: SanTrainer, output_dir: str) -> None:
        nonlocal times
        times += 1
        if times == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        save(self, output_dir)

    SanTrainer._save_optimizer_and_scheduler = limited  # type: ignore[method-assign]
    try:
        train(recipe, new_run(recipe, run, overwrite=False))
    finally:
        SanTrainer._save_optimizer_and_scheduler = save  # type: ignore[method-assign]
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- going on ---------------------------------------------------------------------------------


def unfinish(run: Path) -> Path:
    """Make a finished run one that was killed after its last checkpoint but one."""
    shutil.rmtree(run / "adapter")
    last, *_ = sorted(
        (run / "checkpoints").iterdir(), key=lambda path: -int(path.name.split("-")[1])
    )
    return last


def test_a_damaged_last_checkpoint_is_left_out_with_a_warning(
    here: Path, whole: Path, command: Cli
) -> None:
    shutil.copytree(whole, here / "run")
    optimizer = unfinish(here / "run") / "optimizer.pt"
    content = bytearray(optimizer.read_bytes())
    content[len(content) // 2] ^= 1
    optimizer.write_bytes(content)
    done = command("train", "run", "--resume")
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: run/")]
    assert warnings == [
        "warning: run/checkpoints: checkpoint-28/optimizer.pt has changed since it was written; "
        "not gone on from checkpoint-28"
    ]
    same_run(whole, here / "run")


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_in_a_checkpoint_never_runs(here: Path, recipe: Path, name: str) -> None:
    straight(recipe, here / "run", "training.max_steps=2", "training.evaluate_every=1")
    last = unfinish(here / "run")
    assert not list(last.glob("rng_state*"))
    assert not (last / "training_args.bin").exists()
    with (last / name).open("wb") as file:
        torch.save({"state": _Bomb(here / "exploded"), "param_groups": []}, file)
    best = best_of(last)
    (last / SEAL).unlink()
    _seal(last, best)  # someone who can write there can make the checksums, too
    with pytest.raises(pickle.UnpicklingError), (last / name).open("rb") as file:
        torch.load(file, weights_only=True)
    why = "no part of a checkpoint" if name == "rng_state.pth" else "more than numbers, and was not"
    with pytest.raises(InputError, match=why):
        train(recipe_of(here / "run"), here / "run")
    assert not (here / "exploded").exists()


def test_a_changed_recipe_goes_on_where_the_change_is_harmless(
    here: Path, recipe: Path, command: Cli
) -> None:
    straight(recipe, here / "run", "training.max_steps=2", "training.evaluate_every=1")
    unfinish(here / "run")
    refused = command(
        "train", "run", "--resume", "training.learning_rate=1e-3", "data.cutoff=64",
        "training.save_minutes=1",
    )  # fmt: skip
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1] == (
        "error: run: goes on only with what it began with; changed are data.cutoff: 256 -> 64, "
        "training.learning_rate: 0.01 -> 0.001: change them back, or start a new run"
    )
    changes = ("training.save_minutes=1", "training.bad_batches=skip", "evaluation.limit=3")
    done = command("train", "run", "--resume", *changes)
    assert done.returncode == 0, done.stderr
    assert recipe_of(here / "run").training.save_minutes == 1


def test_changed_rows_weights_and_tokenizers_are_refused(
    here: Path, tiny_base: Path, recipe: Path
) -> None:
    base = Path(shutil.copytree(tiny_base, here / "base"))
    how = ("training.max_steps=2", "training.evaluate_every=1", f"base.model={base}")
    straight(recipe, here / "run", *how)
    unfinish(here / "run")

    def refused(file: Path, change: Callable[[bytes], bytes]) -> None:
        before = file.read_bytes()
        file.write_bytes(change(before))
        match = rf"{re.escape(file.name)} has changed since the run began"
        with pytest.raises(InputError, match=match):
            train(recipe_of(here / "run"), here / "run")
        file.write_bytes(before)

    refused(here / "rows.json", lambda text: text.replace(b"correct", b"CORRECT"))
    refused(base / "model.safetensors", lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]))
    # One that reads every text as before, but for a word that no row has.
    refused(base / "tokenizer.json", lambda text: text.replace(b"<unk>", b"<unknown>"))
    train(recipe_of(here / "run"), here / "run")


def test_a_base_and_rows_that_moved_are_known_by_what_they_hold(
    here: Path, tiny_base: Path, recipe: Path, command: Cli
) -> None:
    base = Path(shutil.copytree(tiny_base, here / "base"))
    shutil.copyfile(here / "rows.json", here / "more.json")
    how = ("training.max_steps=2", "training.evaluate_every=1", f"base.model={base}")
    straight(recipe, here / "run", *how, "data.train=[rows.json]", "data.held_out=more.json")
    weights_of = here / "run" / "adapter" / "adapter_model.safetensors"
    before = weights_of.read_bytes()
    unfinish(here / "run")
    (here / "new").mkdir()
    for name in ("base", "rows.json", "more.json"):
        (here / name).rename(here / "new" / name)

    def refused(*changes: str) -> str:
        recipe_before = (here / "run" / "recipe.yaml").read_text()
        done = command("train", "run", "--resume", *changes)
        assert done.returncode == 2, done.stderr
        assert (here / "run" / "recipe.yaml").read_text() == recipe_before
        return str(done.stderr.splitlines()[-1])

    moved = {
        "data.train": "new/rows.json",
        "data.held_out": "new/more.json",
        "base.model": str(here / "new" / "base"),
    }
    named: list[str] = []
    for key, place in moved.items():
        assert refused(*named).endswith(f"if it has moved, `--resume {key}=PATH` goes on with it")
        named.append(f"{key}={place}")
    assert "data.limit: None -> 3" in refused(*named, "data.limit=3")
    assert "data.held_out: 'more.json' -> 4" in refused(*named, "data.held_out=4")
    # Another base at the new place, and rows of which one letter is another.
    weights = here / "new" / "base" / "model.safetensors"
    raw = weights.read_bytes()
    was, now = (hashlib.sha256(text).hexdigest()[:12] for text in (raw, raw + b" "))
    weights.write_bytes(raw + b" ")
    assert f"model.safetensors has changed since the run began (sha256: {was}" in refused(*named)
    assert f"{now}... now" in refused(*named)
    weights.write_bytes(raw)
    text = (here / "new" / "more.json").read_text()
    (here / "new" / "more.json").write_text(text.replace("correct", "Correct", 1))
    assert "new/more.json has changed since the run began" in refused(*named)
    (here / "new" / "more.json").write_text(text)
    manifest = here / "run" / "manifest.json"
    told = manifest.read_text()
    manifest.write_text("{}")
    assert "its manifest does not say what it began with" in refused(*named)
    manifest.write_text(told)

    done = command("train", "run", "--resume", *named)
    assert done.returncode == 0, done.stderr
    assert recipe_of(here / "run").base.model == moved["base.model"]
    assert weights_of.read_bytes() == before
