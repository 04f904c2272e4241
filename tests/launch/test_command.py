"""Real processes: several that train as one, stops, kills, failures, and what is printed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from conftest import Cli
from running import start, workers
from safetensors.torch import load_file
from tiny import rows, write_recipe, write_rows

from san_llm.errors import InputError
from san_llm.launch.command import accelerate_command
from san_llm.recipe.read import load_recipe
from san_llm.runs.folder import new_run
from san_llm.train.run import train

# As `accelerate config` writes it for two processes without GPUs.
CONFIG: dict[str, Any] = {
    "compute_environment": "LOCAL_MACHINE",
    "debug": False,
    "distributed_type": "MULTI_CPU",
    "downcast_bf16": "no",
    "enable_cpu_affinity": False,
    "machine_rank": 0,
    "main_training_function": "main",
    "mixed_precision": "no",
    "num_machines": 1,
    "num_processes": 2,
    "rdzv_backend": "static",
    "same_network": True,
    "tpu_env": [],
    "tpu_use_cluster": False,
    "tpu_use_sudo": False,
    "use_cpu": True,
}
TWO = {"num_machines": 2, "main_process_ip": "127.0.0.1", "main_process_port": 29999}
LONG = {"max_steps": 40, "epochs": 100.0, "evaluate_every": 4, "schedule": "constant_with_warmup"}

Spawn = Callable[..., "subprocess.Popen[str]"]


def reference(path: Path, folder: Path) -> None:
    """Train without a stop, in this process and on one thread, as the processes do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        recipe = load_recipe(path)
        train(recipe, new_run(recipe, folder, overwrite=False))
    finally:
        torch.set_num_threads(threads)


def adapter(run: Path) -> dict[str, Any]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def apart(first: Path, second: Path) -> float:
    one, two = adapter(first), adapter(second)
    assert one.keys() == two.keys()
    return max((one[key] - two[key]).abs().max().item() for key in one)


def steps(run: Path) -> list[int]:
    """Return the logged optimizer steps, in the order of the file."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [entry["step"] for entry in entries if "loss" in entry]


def write_config(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump({**CONFIG, **changes}))
    return path


def gone(recipe: Path) -> None:
    """Wait until no process works for the test's directory any more."""
    for _ in range(300):
        if not workers(recipe.parent):
            return
        time.sleep(0.1)
    pytest.fail(f"still there: {workers(recipe.parent)}")


@pytest.fixture
def recipe(here: Path, tiny_base: Path) -> Path:
    return write_recipe(here / "r.yaml", tiny_base, write_rows(here / "rows.json", rows(30)))


@pytest.fixture
def long_recipe(here: Path, tiny_base: Path) -> Path:
    data = write_rows(here / "rows.json", rows(30))
    return write_recipe(here / "long.yaml", tiny_base, data, training=LONG)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A run of the long recipe that nothing stopped. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("whole")
    data = write_rows(folder / "rows.json", rows(30))
    reference(write_recipe(folder / "long.yaml", tiny_base, data, training=LONG), folder / "run")
    return folder / "run"


@pytest.fixture
def spawn(here: Path) -> Spawn:
    """Start ``san-llm`` in the test's directory and return the process."""

    return partial(start, here)


def reach(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Wait until the run has logged a step."""
    log = run / "log.jsonl"
    for _ in range(12000):
        if log.is_file() and f'"step": {step},' in log.read_text():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    pytest.fail(f"step {step} was not reached")


# --- several processes as one -----------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(cli: Cli, here: Path, recipe: Path) -> None:
    one = cli("train", recipe, "--output", "one", "--json")
    two = cli("train", recipe, "--output", "two", "--json", "--processes", 2)
    config = write_config(here / "cpu.yaml")
    three = cli("train", recipe, "--output", "three", "--accelerate", config)
    for process in (one, two, three):
        assert process.returncode == 0, process.stderr
    gammas = adapter(here / "one")
    assert max((gamma - 1).abs().max().item() for gamma in gammas.values()) > 0.01
    assert apart(here / "one", here / "two") < 1e-5
    assert apart(here / "one", here / "three") < 1e-5
    facts = [json.loads((here / run / "manifest.json").read_text()) for run in ("one", "two")]
    assert [fact["processes"] for fact in facts] == [1, 2]

    # Results on stdout, nothing else; on stderr our own lines, nothing of a library's.
    first, second = json.loads(one.stdout), json.loads(two.stdout)
    assert first["held_out_loss"] == pytest.approx(second["held_out_loss"], rel=1e-5)
    assert second["run"] == "two"
    assert three.stdout.splitlines()[-1].split() == ["adapter", "three/adapter"]
    assert three.stdout.startswith("trained numbers")
    for process in (one, two, three):
        shown = process.stderr[process.stderr.index("run: ") :].splitlines()
        starts = ("run: ", "data: 26 rows", "san: 896 trained numbers", "Training: 4 of 4 steps")
        starts += () if process in (one, two) else ("next: ",)  # on stdout is JSON of those
        assert len(shown) == len(starts), process.stderr
        assert all(line.startswith(start) for line, start in zip(shown, starts, strict=True))
    assert (here / "runs" / "latest").resolve() == (here / "three").resolve()


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", ["accelerate", pytest.param("torchrun", marks=pytest.mark.fresh)]
)
def test_a_launcher_of_the_users_own_trains_as_one(here: Path, recipe: Path, launcher: str) -> None:
    reference(recipe, here / "one")
    probe = accelerate_command([], 2, None)
    port = probe[probe.index("--main_process_port") + 1]
    command = {
        "accelerate": [
            *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
            *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
            *("--main_process_port", port),
        ],
        "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", port],
    }[launcher]
    done = subprocess.run(
        [sys.executable, "-m", *command, "-m", "san_llm", "train", str(recipe), "--output", "two"],
        cwd=here,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out loss") == 1
    assert apart(here / "one", here / "two") < 1e-5


def test_one_process_needs_no_launcher() -> None:
    assert accelerate_command(["train"], 1, None) == [sys.executable, "-m", "san_llm", "train"]


@pytest.mark.parametrize(
    ("changes", "processes", "message"),
    [
        ({"distributed_type": "NO", "num_processes": 1}, None, "NO starts one process only"),
        ({"distributed_type": "NO"}, 2, "NO starts one process only"),
        ({"distributed_type": False}, None, "NO starts one process only"),
        ({"num_processes": 1}, None, "num_processes 1 starts one process only"),
        ({}, 1, "num_processes 1 starts one process only"),
        ({"num_processes": None}, None, "num_processes is missing"),
        ({"num_processes": "two"}, None, "num_processes is missing"),
        ({"distributed_type": "XLA"}, None, "XLA: not supported; MULTI_GPU, MULTI_CPU, FSDP and"),
        ({"distributed_type": "FSDP"}, None, "distributed_type FSDP without its fsdp_config"),
        ({"distributed_type": "DEEPSPEED"}, None, "DEEPSPEED without its deepspeed_config"),
        ({"num_machines": 2}, None, "num_machines 2 need main_process_ip, that of the first"),
        ({**TWO, "num_processes": 3}, None, "num_processes 3 is not a multiple of num_machines 2"),
        ({**TWO, "machine_rank": 2}, None, "machine_rank 2: the 2 machines have the numbers 0 to"),
        ({"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, None, "dynamo_backend INDUCTOR"),
        ({"compute_environment": "AMAZON_SAGEMAKER"}, None, "only LOCAL_MACHINE"),
        ({"mixed_precision": "bf16"}, None, "the recipe's base.dtype says that"),
    ],
)
def test_a_config_that_would_train_otherwise_is_refused(
    tmp_path: Path, changes: dict[str, Any], processes: int | None, message: str
) -> None:
    config = write_config(tmp_path / "c.yaml", **changes)
    with pytest.raises(InputError) as caught:
        accelerate_command([], processes, config)
    assert str(caught.value).startswith(f"{config}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no distributed_type"),
        ("[1, 2]", "no distributed_type"),
        ("a: [", "not YAML"),
        ("num_processes: 2", "no distributed_type"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(text)
    with pytest.raises(InputError, match=message):
        accelerate_command([], None, config)
    with pytest.raises(InputError, match="no such file"):
        accelerate_command([], None, tmp_path / "absent.yaml")


@pytest.mark.parametrize("kind", ["MULTI_GPU", "MULTI_CPU"])
def test_a_config_of_several_processes_keeps_its_own_port(tmp_path: Path, kind: str) -> None:
    config = write_config(tmp_path / "c.yaml", distributed_type=kind, main_process_port=29999)
    command = accelerate_command([], None, config)
    assert "--multi_gpu" in command
    assert "--main_process_port" not in command
    assert command[command.index("--config_file") + 1] == str(config)


# --- failures ---------------------------------------------------------------------------------


def test_a_batch_that_the_processes_cannot_share_is_told_before_they_start(
    cli: Cli, here: Path, recipe: Path
) -> None:
    process = cli("train", recipe, "training.batch_size=5", "--processes", 2)
    assert process.returncode == 2
    message = "error: training.batch_size: 5 is not a multiple of 2 processes"
    assert process.stderr.splitlines()[-1] == message
    assert not (here / "runs").exists()


@pytest.mark.slow
def test_input_that_workers_refuse_ends_with_one_message_and_leaves_no_run(
    cli: Cli, recipe: Path
) -> None:
    # Both workers find it out, and it is the input that is wrong.
    process = cli("train", recipe, "data.cutoff=8", "--processes", 2)
    assert process.returncode == 2
    assert process.stdout == ""
    assert not (recipe.parent / "runs").exists()
    assert process.stderr.count("error:") == 1
    assert "error: no tokens to learn: the cutoff of 8 tokens" in process.stderr
    assert "Traceback" not in process.stderr
    gone(recipe)


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_and_is_named(
    spawn: Spawn, here: Path, long_recipe: Path
) -> None:
    process = spawn("train", long_recipe, "training.max_steps=4000", "--processes", 2)
    run = wait_for_run(here, process)
    reach(run, 4, process)
    rank(here, 1).kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.count("error:") == 1
    assert "process 1 was ended by SIGKILL" in errors
    assert "Traceback" not in errors
    gone(long_recipe)


def inject(here: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let code run at the start of every process of a test."""
    (here / "inject").mkdir()
    (here / "inject" / "sitecustomize.py").write_text(code)
    path = f"{here / 'inject'}:{os.environ.get('PYTHONPATH', '')}"
    monkeypatch.setenv("PYTHONPATH", path.rstrip(":"))


@pytest.mark.slow
def test_a_worker_with_an_error_ends_the_run_and_is_named(
    spawn: Spawn, here: Path, long_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A real exception in one worker's training loop, at a moment of the test's choice.
    inject(
        *(here, monkeypatch),
        "import signal\n"
        "def fail(*_): raise ValueError('row 7 is broken')\n"
        "signal.signal(signal.SIGUSR1, fail)\n",
    )
    process = spawn("train", long_recipe, "training.max_steps=4000", "--processes", 2)
    run = wait_for_run(here, process)
    reach(run, 4, process)
    rank(here, 1).send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.count("error:") == 1, errors
    assert "error: process 1: ValueError: row 7 is broken" in errors
    assert "Traceback" not in errors
    gone(long_recipe)


@pytest.mark.slow
def test_a_frozen_worker_ends_the_run_and_is_named(
    spawn: Spawn, here: Path, long_recipe: Path
) -> None:
    process = spawn("train", long_recipe, "training.max_steps=4000", "--processes", 2)
    run = wait_for_run(here, process)
    reach(run, 4, process)
    rank(here, 1).send_signal(signal.SIGSTOP)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.count("error:") == 1, errors
    assert "error: process 1 was frozen (SIGSTOP) for 20 s" in errors
    gone(long_recipe)


@pytest.mark.slow
def test_peers_notice_a_frozen_worker_under_any_launcher(
    here: Path, long_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every 2 s, and 30 s of silence, are what it is for a user.
    sooner = "heartbeat.EVERY, heartbeat.SILENCE = 0.5, 8.0"
    inject(here, monkeypatch, f"from san_llm.launch import heartbeat\n{sooner}\n")
    probe = accelerate_command([], 2, None)
    port = probe[probe.index("--main_process_port") + 1]
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
            *("--master_port", port, "-m", "san_llm", "train", str(long_recipe)),
            *("training.max_steps=4000", "--output", "run"),
        ],
        cwd=here,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    reach(here / "run", 4, process)
    rank(here, 1).send_signal(signal.SIGSTOP)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    first = next(line for line in errors.splitlines() if "rror" in line)
    assert first.startswith("error: process 1 gave no sign of life for 8"), errors
    gone(long_recipe)


def rank(folder: Path, number: int) -> psutil.Process:
    """Return the worker of a rank."""
    return next(w for w in workers(folder) if w.environ().get("RANK") == str(number))


def wait_for_run(here: Path, process: subprocess.Popen[str]) -> Path:
    latest = here / "runs" / "latest"
    for _ in range(1200):
        if latest.exists():
            return latest.resolve()
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    return pytest.fail("no run was made")


# --- stops and kills --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "processes"),
    [(signal.SIGINT, 2), (signal.SIGTERM, 2)],
)
def test_a_stopped_run_says_how_to_go_on_and_ends_the_same(
    spawn: Spawn, cli: Cli, here: Path, long_recipe: Path, whole: Path, number: int, processes: int
) -> None:
    several = ("--processes", processes) if processes > 1 else ()
    process = spawn("train", long_recipe, "--output", "parts", *several)
    reach(here / "parts", 6, process)
    # Ctrl-C is for the command, which is in front; Slurm sends SIGTERM to all there are.
    for one in [process] if number == signal.SIGINT else workers(here):
        one.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == (75 if number == signal.SIGTERM else 130), errors
    assert out == ""
    assert errors.count("stopping after this step") == 1
    assert errors.count("`san-llm train parts --resume` goes on") == 1
    assert "Traceback" not in errors
    assert 6 <= steps(here / "parts")[-1] < 40
    assert not (here / "parts" / "adapter").exists()
    done = cli("train", "parts", "--resume", *several)
    assert done.returncode == 0, done.stderr
    assert steps(here / "parts") == list(range(1, 41))
    assert apart(whole, here / "parts") <= (0 if processes == 1 else 1e-5)
    gone(long_recipe)


@pytest.mark.slow
def test_workers_stop_politely_when_their_command_is_gone(
    spawn: Spawn, cli: Cli, here: Path, long_recipe: Path
) -> None:
    process = spawn(
        "train", long_recipe, "training.max_steps=4000", "--output", "run", "--processes", 2
    )
    reach(here / "run", 4, process)
    process.kill()
    process.communicate()
    gone(long_recipe)
    # They saved the step that they were in.
    last = steps(here / "run")[-1]
    assert (here / "run" / "checkpoints" / f"checkpoint-{last}" / "sha256.json").is_file()


def test_a_worker_asks_itself_to_stop_when_its_launcher_is_gone(here: Path) -> None:
    (here / "worker.py").write_text(
        "import pathlib, signal, threading\n"
        "from torch.distributed import HashStore\n"
        "from san_llm.launch import heartbeat\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('asked to stop'))\n"
        "heartbeat.EVERY = 0.1\n"
        "pathlib.Path('ready').touch()\n"
        "heartbeat._watch(HashStore(), 0, 1, threading.Event())\n"
    )
    launcher = f"{sys.executable} worker.py & while [ ! -e ready ]; do sleep 0.1; done; sleep 0.5"
    done = subprocess.run(
        ["sh", "-c", launcher], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "asked to stop\n", done.stderr


@pytest.mark.slow
def test_ctrl_c_before_the_first_step_leaves_no_process(
    spawn: Spawn, here: Path, long_recipe: Path
) -> None:
    process = spawn("train", long_recipe, "--processes", 2)
    wait_for_run(here, process)
    time.sleep(0.5)  # the launcher is importing now
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "Error" not in errors
    gone(long_recipe)


@pytest.mark.slow
def test_resume_finds_the_best_checkpoint_of_a_moved_run(
    spawn: Spawn, cli: Cli, here: Path, tiny_base: Path
) -> None:
    # The loss gets worse at the end, so the best checkpoint lies before the stop.
    data = write_rows(here / "rows.json", rows(30))
    training = LONG | {"max_steps": 20, "evaluate_every": 1}
    training |= {"learning_rate": 0.6, "warmup_steps": 10}
    path = write_recipe(here / "r.yaml", tiny_base, data, training=training)
    reference(path, here / "whole")
    best = json.loads((here / "whole" / "metrics.json").read_text())["best_step"]
    assert best < 14, best
    process = spawn("train", path, "--output", "parts")
    reach(here / "parts", best + 2, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    (here / "parts").rename(here / "moved")
    done = cli("train", "moved", "--resume")
    assert done.returncode == 0, done.stderr
    assert json.loads((here / "moved" / "metrics.json").read_text())["best_step"] == best
    assert apart(here / "whole", here / "moved") == 0
