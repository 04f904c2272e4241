"""Devices that this machine has not, put into torch's mouth: who computes on which of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from conftest import Cli
from launch.test_command import write_config

from san_llm.errors import InputError
from san_llm.launch import devices
from san_llm.launch.command import accelerate_command
from san_llm.launch.processes import agree
from san_llm.models.load import device
from san_llm.plan.request import find_device


@pytest.fixture
def gpus(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four GPUs, as far as a driver's file and torch's counts can tell."""
    (here / "driver").touch()
    monkeypatch.setattr(devices, "DRIVERS", (here / "driver",))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_without_a_driver_there_is_no_gpu_and_torch_is_not_asked(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: pytest.fail("was asked"))
    monkeypatch.setattr(devices, "DRIVERS", (here / "none",))
    assert (devices.gpus(), find_device(None)) == (0, "cpu")
    devices.check_processes(64, "--processes")
    devices.let_memory_grow()
    assert "PYTORCH_ALLOC_CONF" not in os.environ


@pytest.mark.usefixtures("gpus")
def test_more_processes_than_gpus_are_refused_where_they_are_asked_for(here: Path) -> None:
    assert find_device(None) == "cuda"
    accelerate_command([], 4, None)
    with pytest.raises(InputError, match=r"^--processes: 5 processes on this machine, which has 4"):
        accelerate_command([], 5, None)
    config = write_config(here / "c.yaml", num_processes=5)
    with pytest.raises(InputError, match=r"c\.yaml: 5 processes on this machine, which has 4 GPUs"):
        accelerate_command([], None, config)
    accelerate_command([], 4, config)
    several = {"num_machines": 2, "main_process_ip": "10.0.0.1", "main_process_port": 29999}
    accelerate_command([], None, write_config(config, num_processes=8, **several))
    with pytest.raises(InputError, match="5 processes on this machine"):
        accelerate_command([], None, write_config(config, num_processes=10, **several))
    with pytest.raises(InputError, match="3 processes on this machine, which has 2 GPUs"):
        accelerate_command([], None, write_config(config, num_processes=3, gpu_ids="1,3"))


@pytest.mark.usefixtures("gpus")
def test_a_worker_has_the_gpu_of_its_number_or_the_one_that_it_is_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device() == torch.device("cuda", 3)
    monkeypatch.setenv("LOCAL_RANK", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(InputError, match="started 8 processes on this machine, which has 4 GPUs"):
        agree("anything")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device() == torch.device("cuda", 0)


@pytest.mark.usefixtures("gpus")
def test_one_process_beside_idle_gpus_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    devices.tell_devices("train")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: 4 GPUs are here, and one process computes on the first")
    assert "`san-llm train ... --processes 4` uses all" in line


def test_a_gpu_of_another_make_is_not_passed_over_in_silence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    devices.tell_devices("eval")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    devices.tell_devices("eval")
    assert "GPU (mps) is not used" in capsys.readouterr().err
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    devices.tell_devices("eval")
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("installed", "name"),
    [("2.9.1+cu128", "PYTORCH_CUDA_ALLOC_CONF"), ("2.11.0+cu130", "PYTORCH_ALLOC_CONF")],
)
def test_memory_on_gpus_may_grow_unless_somebody_said_otherwise(
    monkeypatch: pytest.MonkeyPatch, installed: str, name: str
) -> None:
    monkeypatch.setattr(devices, "version", lambda _: installed)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    devices.let_memory_grow()
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    devices.let_memory_grow()
    assert os.environ[name] == "expandable_segments:True"
    assert len({"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & set(os.environ)) == 1


# --- started by others ------------------------------------------------------------------------

SRUN = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}


@pytest.mark.parametrize("words", ["train r.yaml", "eval --model base --tasks boolq"])
@pytest.mark.parametrize(
    ("environment", "starter"),
    [
        (SRUN | {"SLURM_PROCID": "0"}, "srun has started this 4 times (SLURM_STEP_NUM_TASKS)"),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "2"}, "srun has started this several times"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "mpirun (Open MPI) has"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "mpirun (PMI) has started this 2 times"),
    ],
)
def test_one_of_several_copies_that_know_nothing_of_one_another_is_refused(
    command: Cli,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    environment: dict[str, str],
    starter: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = command(*words.split())
    (line,) = done.stderr.splitlines()
    assert (done.returncode, line.startswith(f"error: {starter}")) == (2, True), line
    assert f"each would {words.split()[0]} by itself" in line
    assert list(here.iterdir()) == []


def test_copies_that_a_config_or_a_launcher_puts_together_are_not(
    command: Cli, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (SRUN | {"SLURM_PROCID": "0"}).items():
        monkeypatch.setenv(name, value)
    several = {"num_machines": 2, "main_process_ip": "10.0.0.1", "main_process_port": 29999}
    config = write_config(here / "c.yaml", num_processes=4, **several)
    done = command("train", "absent.yaml", "--accelerate", config)
    assert "absent.yaml" in done.stderr, done.stderr
    monkeypatch.setenv("WORLD_SIZE", "4")
    devices.check_alone("train")


def test_a_jobs_script_runs_once_and_hears_of_its_tasks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    devices.check_alone("train")
    devices.tell_devices("train")
    assert "Slurm gave this job 4 tasks, and this is one process" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_NTASKS", "1")
    devices.tell_devices("train")
    assert capsys.readouterr().err == ""


def test_what_accelerate_was_once_configured_for_does_not_count(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.commands import launch
    from accelerate.commands.config import config_args

    default = write_config(
        here / "default_config.yaml", gpu_ids="0", main_process_ip="10.0.0.9", num_processes=7
    )
    for module in (launch, config_args):
        monkeypatch.setattr(module, "default_config_file", str(default))
    command = accelerate_command(["train"], 2, None)
    words = command[command.index("san_llm.launch.launcher") + 1 :]
    asked, *_ = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))
    assert (asked.gpu_ids, asked.num_processes, asked.num_machines) == ("all", 2, 1)
    assert (asked.main_process_ip, asked.mixed_precision) == (None, "no")
