"""Several processes: the ``accelerate launch`` command line and its child process."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import FrameType

import psutil

from san_llm.errors import InputError


def accelerate_command(
    arguments: list[str], processes: int | None, config: Path | None
) -> list[str]:
    """Return the command that runs ``python -m san_llm ARGUMENTS`` in several processes.

    Args:
        arguments: The arguments of each process.
        processes: How many, on this machine.
        config: Accelerate's own YAML file instead, as ``accelerate config`` writes it.

    Raises:
        InputError: when the config file is not there.
    """
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    if config is not None:
        if not config.is_file():
            raise InputError(f"{config}: no such file; `accelerate config` writes one")
        launch += ["--config_file", str(config)]
        if processes is not None:
            launch += ["--num_processes", str(processes)]
    else:
        launch += [
            # On a machine without GPUs --multi_gpu means gloo, where --cpu would start one process.
            *("--multi_gpu", "--num_processes", str(processes), "--num_machines", "1"),
            *("--mixed_precision", "no", "--dynamo_backend", "no"),
            *("--num_cpu_threads_per_process", "1", "--main_process_port", str(_free_port())),
        ]
    return [*launch, "-m", "san_llm", *arguments]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_launched(command: list[str]) -> int:
    """Run a launcher to its end and return its exit code.

    Ctrl-C and a polite kill go to the training processes alone, which save and end well; the
    launcher, if it were asked to stop, would end them after its own manner.
    """
    # In a session of its own the launcher does not get the terminal's Ctrl-C.
    child = subprocess.Popen(command, start_new_session=True)

    def stop(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(psutil.Error):
            for worker in psutil.Process(child.pid).children():
                with contextlib.suppress(psutil.Error):
                    worker.send_signal(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
