"""Several processes: the ``accelerate launch`` command line and its child process."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

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
    """Run a launcher to its end and return its exit code; it gets the signals that we get."""
    child = subprocess.Popen(command)
    # A terminal sends Ctrl-C to the child as well; a kill of this process must reach it through us.
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(
            signal.SIGTERM, lambda number, frame: child.send_signal(number)
        ),
    }
    try:
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
