"""Several processes: the ``accelerate launch`` command line and its child process.

The command starts a launcher (this module, run with ``python -m``), and the launcher the workers.
The three share a folder of notes: the first worker to fail writes why, so that one process tells
it, once; a worker that can be stopped between two steps says so, and why it has stopped.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Generic, TypeVar

import psutil

from san_llm.errors import STOPPED, InputError, SanError, debugging
from san_llm.launch.devices import check_processes
from san_llm.launch.engine import engine_of, read_config
from san_llm.launch.notes import FAILURE, NOTES, READY, REFUSED, STOPPED_BY, VERDICT, send
from san_llm.progress import say
from san_llm.recipe.shipped import shipped_configs

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ended(Generic[Result]):
    """How what a command started has ended.

    Attributes:
        code: The command's exit code.
        result: What it came to; None where another process tells it.
    """

    code: int
    result: Result | None = None


def accelerate_command(
    arguments: list[str], processes: int | None, config: Path | None
) -> list[str]:
    """Return the command that runs ``python -m san_llm ARGUMENTS`` in several processes.

    Args:
        arguments: The arguments of each process.
        processes: How many processes, on this machine.
        config: Accelerate's own YAML file instead, as ``accelerate config`` writes it.

    Raises:
        InputError: when the config file cannot serve: most of what is wrong with one makes
            Accelerate start a single process, or processes that train apart, without a word. And
            when there are more processes than GPUs.
    """
    worker = ["-m", "san_llm", *arguments]
    if config is None and processes == 1:
        return [sys.executable, *worker]
    launch = [sys.executable, "-m", "san_llm.launch.launcher"]
    if config is not None:
        launch += ["--config_file", str(config), *_settings(config, processes)]
        check_processes(_here(config, processes), f"{config}", _chosen(config))
    else:
        check_processes(processes or 1, "--processes")
        # A file of ours, or Accelerate reads the one in its cache, which may choose GPUs.
        launch += ["--config_file", str(shipped_configs()["ddp"])]
        launch += ["--num_machines", "1", "--main_process_port", str(_free_port())]
        launch += ["--num_cpu_threads_per_process", "1", "--multi_gpu"]
    if processes is not None:
        launch += ["--num_processes", str(processes)]
    # The numbers are computed as the recipe says: no autocast, no compiler.
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*launch, *worker]


def _settings(config: Path, processes: int | None) -> list[str]:
    """Return what the command line adds to a config file of Accelerate's, after a check of it."""
    values = read_config(config)
    kind, place = values["distributed_type"], values.get("compute_environment", "LOCAL_MACHINE")
    if place != "LOCAL_MACHINE":
        raise InputError(f"{config}: compute_environment {place}: only LOCAL_MACHINE can be used")
    if kind in ("NO", False):  # YAML 1.1 reads an unquoted NO as false
        raise InputError(
            f"{config}: distributed_type NO starts one process only; "
            "for one process leave --accelerate out"
        )
    engine = engine_of(config)
    count = processes or values.get("num_processes")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise InputError(f"{config}: num_processes is missing; name it there or with --processes")
    if count == 1:
        raise InputError(
            f"{config}: num_processes 1 starts one process only; "
            "for one process leave --accelerate out"
        )
    precision = values.get("mixed_precision")
    if precision not in (None, "no", False):
        raise InputError(
            f"{config}: mixed_precision {precision}: the recipe's base.dtype says that; set it "
            "to 'no' in the file"
        )
    dynamo = (values.get("dynamo_config") or {}).get("dynamo_backend", "NO")
    if str(dynamo).upper() != "NO":
        raise InputError(f"{config}: dynamo_backend {dynamo}: not supported; set it to 'NO'")
    # Without GPUs --multi_gpu means gloo, where --cpu or MULTI_CPU would start one process.
    flags = {"DDP": ["--multi_gpu"], "FSDP2": ["--use_fsdp"], "DeepSpeed": ["--use_deepspeed"]}
    machines = values.get("num_machines") or 1
    if machines == 1:
        if values.get("main_process_port"):
            return flags[engine]
        return [*flags[engine], "--main_process_port", str(_free_port())]
    for key in ("main_process_ip", "main_process_port"):
        if not values.get(key):
            raise InputError(f"{config}: num_machines {machines} need {key}, that of the first")
    if not isinstance(machines, int) or count % machines:
        raise InputError(
            f"{config}: num_processes {count} is not a multiple of num_machines {machines}: it is "
            "the number on all of them together"
        )
    if machine_rank(config) not in range(machines):
        raise InputError(
            f"{config}: machine_rank {values.get('machine_rank')}: the {machines} machines have "
            f"the numbers 0 to {machines - 1}, each in its own file"
        )
    return flags[engine]


def _here(config: Path, processes: int | None) -> int:
    """Return how many processes a config file of Accelerate's starts on this machine."""
    values = read_config(config)
    return int((processes or values["num_processes"]) // (values.get("num_machines") or 1))


def _chosen(config: Path) -> int | None:
    """Return how many GPUs of this machine a config file of Accelerate's chooses; None: all."""
    chosen = str(read_config(config).get("gpu_ids") or "all")
    return None if chosen == "all" else len(chosen.split(","))


def machines(config: Path | None) -> int:
    """Return on how many machines a config file of Accelerate's starts processes."""
    count = 1 if config is None else read_config(config).get("num_machines") or 1
    return count if isinstance(count, int) else 1


def machine_rank(config: Path | None) -> int:
    """Return which of several machines this one is by a config file of Accelerate's, else 0."""
    rank = 0 if config is None else read_config(config).get("machine_rank") or 0
    return rank if isinstance(rank, int) else -1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_launched(command: list[str]) -> int:
    """Run a launcher to its end; return its exit code, or that of the signal it was stopped by.

    Ctrl-C and a polite kill go to the first worker alone, which stops the others with it after
    the step that they are in; a second Ctrl-C ends them all at once.

    Raises:
        InputError: when a worker refused its input, with its message.
        SanError: when a worker failed, with its message.
        KeyboardInterrupt: when Ctrl-C ended the workers at once.
    """
    ended = 0
    with tempfile.TemporaryDirectory(prefix="san-llm-") as folder:
        # In a session of its own the launcher does not get the terminal's Ctrl-C.
        # Torch's own warnings, pages of frames, would hide the line that counts.
        quiet = {} if debugging() else {"TORCH_CPP_LOG_LEVEL": "ERROR"}
        environment = {**quiet, **os.environ, NOTES: folder}
        child = subprocess.Popen(command, start_new_session=True, env=environment)
        interrupts = 0

        def stop(number: int, frame: FrameType | None) -> None:
            nonlocal interrupts, ended
            interrupts += number == signal.SIGINT
            ready = Path(folder, READY)
            if interrupts < 2 and ready.is_file():
                send(number, [psutil.Process(int(ready.read_text()))])
            else:
                ended = number
                launcher = psutil.Process(child.pid)
                send(signal.SIGKILL, [launcher, *launcher.children()])

        def on_signal(number: int, frame: FrameType | None) -> None:
            with contextlib.suppress(psutil.Error):  # it has just ended
                stop(number, frame)

        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, on_signal) for number in signals}
        try:
            code = child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if ended == signal.SIGTERM:
            say("stopped before the first step; `san-llm train --resume` goes on")
            return STOPPED["SIGTERM"]
        if ended:
            raise KeyboardInterrupt
        for failure in (Path(folder, VERDICT), Path(folder, FAILURE)):
            if failure.is_file():
                kind, _, message = failure.read_text(encoding="utf-8").partition("\n")
                raise (InputError if kind == REFUSED else SanError)(message)
        if code < 0:
            send(signal.SIGTERM, _workers(folder))
            raise SanError(
                f"the launcher of the processes was ended by {signal.Signals(-code).name}; they "
                "were asked to stop"
            )
        stopped = Path(folder, STOPPED_BY)
        return STOPPED[stopped.read_text()] if code == 0 and stopped.is_file() else code


def _workers(folder: str) -> list[psutil.Process]:
    """Return the processes that leave notes in a folder, whosever children they are."""
    workers = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # another user's, or it has just ended
            if process.environ().get(NOTES) == folder:
                workers.append(process)
    return workers
