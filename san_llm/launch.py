"""Several processes: the ``accelerate launch`` command line and its child process.

The command starts a launcher (this module, run with ``python -m``), and the launcher the workers.
The three share a folder of notes: the first worker to fail writes why, so that one process tells
it, once; a worker that can be stopped between two steps says so, and why it has stopped.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

from san_llm.engine import engine_of, read_config
from san_llm.errors import STOPPED, InputError, SanError, debugging
from san_llm.progress import stderr

NOTES = "SAN_LLM_NOTES"  # the environment's name for the folder of notes
_VERDICT, _FAILURE, _READY, _STOPPED = "verdict", "failure", "ready", "stopped"
_FAILED, _REFUSED = "failed", "refused"  # the first line of a failure's note
_PARENT = os.getppid()  # of a worker: its launcher
FROZEN = 20.0  # seconds after which a worker that SIGSTOP holds counts as lost


def accelerate_command(
    arguments: list[str], processes: int | None, config: Path | None
) -> list[str]:
    """Return the command that runs ``python -m san_llm ARGUMENTS`` in several processes.

    Args:
        arguments: The arguments of each process.
        processes: How many, on this machine.
        config: Accelerate's own YAML file instead, as ``accelerate config`` writes it.

    Raises:
        InputError: when the config file cannot serve: most of what is wrong with one makes
            Accelerate start a single process, or processes that train apart, without a word.
    """
    worker = ["-m", "san_llm", *arguments]
    if config is None and processes == 1:
        return [sys.executable, *worker]
    launch = [sys.executable, "-m", "san_llm.launch"]
    if config is not None:
        launch += ["--config_file", str(config), *_settings(config, processes)]
    else:
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
        asked = 0

        def stop(number: int, frame: FrameType | None) -> None:
            nonlocal asked, ended
            asked += number == signal.SIGINT
            ready = Path(folder, _READY)
            if asked < 2 and ready.is_file():
                _send(number, [psutil.Process(int(ready.read_text()))])
            else:
                ended = number
                launcher = psutil.Process(child.pid)
                _send(signal.SIGKILL, [launcher, *launcher.children()])

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
            stderr.print("stopped before the first step; `san-llm train --resume` goes on")
            return STOPPED["SIGTERM"]
        if ended:
            raise KeyboardInterrupt
        for failure in (Path(folder, _VERDICT), Path(folder, _FAILURE)):
            if failure.is_file():
                kind, _, message = failure.read_text(encoding="utf-8").partition("\n")
                raise (InputError if kind == _REFUSED else SanError)(message)
        if code < 0:
            _send(signal.SIGTERM, _workers(folder))
            raise SanError(
                f"the launcher of the processes was ended by {signal.Signals(-code).name}; they "
                "were asked to stop"
            )
        stopped = Path(folder, _STOPPED)
        return STOPPED[stopped.read_text()] if code == 0 and stopped.is_file() else code


def _workers(folder: str) -> list[psutil.Process]:
    """Return the processes that leave notes in a folder, whosever children they are."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # another user's, or it has just ended
            if process.environ().get(NOTES) == folder:
                found.append(process)
    return found


def _send(number: int, processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


def launcher_is_gone() -> bool:
    """Whether the launcher that started this worker has ended."""
    return os.getppid() != _PARENT


def tell_ready() -> None:
    """Let the command know that this worker, if it is the first here, can be asked to stop."""
    _tell(_READY, str(os.getpid()))


def tell_stopped(name: str) -> None:
    """Let the command know by which signal the workers were stopped: ``SIGINT`` or ``SIGTERM``."""
    _tell(_STOPPED, name)


def _tell(kind: str, text: str) -> None:
    if NOTES in os.environ and os.environ.get("LOCAL_RANK", "0") == "0":
        with contextlib.suppress(OSError):  # the command is gone, and its notes
            note = Path(os.environ[NOTES], f".{kind}")
            note.write_text(text)
            note.rename(note.with_name(kind))


def tell_failure(
    message: str, first: bool = True, verdict: bool = False, refused: bool = False
) -> bool:
    """Leave a worker's error for the command to tell; say whether there is a command that will.

    Args:
        message: What went wrong.
        first: Keep an earlier message. What fails next fails because of the first, mostly.
        verdict: It is certain that this came first: no other message counts.
        refused: The input was wrong; nothing has failed.
    """
    if NOTES not in os.environ:
        return False
    note = Path(os.environ[NOTES], _VERDICT if verdict else _FAILURE)
    try:
        with note.open("x" if first else "w", encoding="utf-8") as file:
            file.write(f"{_REFUSED if refused else _FAILED}\n{message}")
    except FileExistsError:
        pass
    except OSError:  # the command is gone, and its notes
        return False
    return True


def leave() -> NoReturn:
    """End a worker that has done its work, without the interpreter's own end.

    The process group's threads can outlive their owner there, and a worker that is aborted at its
    very end makes its launcher call the whole job failed.
    """
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _watch(parent: int) -> None:
    """Ask the workers to stop when the command that started the launcher is gone.

    Also end one that is frozen: its peers notice, but here may be no other that could end it.
    """
    held: dict[int, float] = {}
    while os.getppid() == parent:
        time.sleep(0.5)
        for worker in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                stopped = worker.status() == psutil.STATUS_STOPPED
                held[worker.pid] = held.get(worker.pid, 0) + 0.5 if stopped else 0
                if held[worker.pid] > FROZEN:
                    rank = worker.environ().get("RANK")
                    tell_failure(
                        f"process {rank} was frozen (SIGSTOP) for {FROZEN:.0f} s", verdict=True
                    )
                    worker.kill()
    _send(signal.SIGTERM, psutil.Process().children())


def _main() -> None:
    """Run Accelerate's launcher without its own report of a worker that has told its error."""
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()
    from accelerate.commands.launch import main
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if not debugging():
        logging.disable()
    try:
        main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        if code < 0:
            hint = "; out of memory?" if code == -signal.SIGKILL else ""
            message = f"process {rank} was ended by {signal.Signals(-code).name}{hint}"
            tell_failure(message, first=code == -signal.SIGTERM)
        else:
            tell_failure(f"process {rank} ended with exit code {code}")
        sys.exit(1)
    except SignalException:
        # The whole group was asked to stop, as Slurm does: the workers have saved, and said so.
        sys.exit(0)
    except Exception as error:
        tell_failure(f"accelerate launch: {' '.join(str(error).split())}")
        sys.exit(1)


if __name__ == "__main__":
    _main()
