"""Which devices this machine has, and how many processes may share them: a GPU for each, or CPUs.

What would be wrong in silence is told here: a second run beside the first on one GPU, GPUs that do
nothing, and commands that somebody else starts several times, each of which would train by itself.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packaging.version import Version

from san_llm.errors import InputError
from san_llm.progress import say

# The drivers of NVIDIA, of NVIDIA under Windows' Linux, and of AMD.
DRIVERS = tuple(map(Path, ("/proc/driver/nvidia/version", "/dev/dxg", "/dev/kfd")))
# How others say how many times they start a command, and as which of them: srun for a step, not for
# a job, whose script runs once; and MPI's kinds of mpirun.
STARTED = {
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    "mpirun (Open MPI)": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "mpirun (PMI)": ("PMI_SIZE", "PMI_RANK"),
}


def has_driver() -> bool:
    """Whether a driver of GPUs is here that torch calls CUDA, by files alone."""
    return any(path.exists() for path in DRIVERS)


def gpus() -> int:
    """Return how many GPUs torch sees; where there is no driver it is not asked, nor imported."""
    if not has_driver():
        return 0
    import torch

    return torch.cuda.device_count()


def unused_gpu() -> str | None:
    """Return the kind of a GPU that torch could use and this package does not, such as ``mps``."""
    import torch

    if not torch.accelerator.is_available():
        return None
    found: Any = torch.accelerator.current_accelerator()
    return None if found.type == "cuda" else str(found.type)


def check_processes(here: int, what: str, chosen: int | None = None) -> None:
    """Refuse more processes on this machine than it has GPUs; on CPUs any number can work.

    Args:
        here: How many would run on this machine.
        what: What asks for them, for the message.
        chosen: How many of the GPUs they may use; None: all.

    Raises:
        InputError: when two would have to share a GPU.
    """
    there = gpus() if chosen is None else min(gpus(), chosen)
    if 0 < there < here:
        raise InputError(
            f"{what}: {here} processes on this machine, which has {_count(there)} for them, and "
            f"each needs one of its own: ask for {there} at most, or hide all GPUs "
            "(CUDA_VISIBLE_DEVICES='') to compute on the CPU"
        )


def check_alone(command: str) -> None:
    """Refuse to be one of several copies that know nothing of one another.

    Args:
        command: ``train`` or ``eval``.

    Raises:
        InputError: when something other than a launcher of torch's has started several.
    """
    if "WORLD_SIZE" in os.environ:
        return
    for starter, (count, rank) in STARTED.items():
        times = os.environ.get(count, "")
        # A job's script is its process 0; only a step of srun has others.
        if not _several(times) and not (starter == "srun" and _number(rank)):
            continue
        raise InputError(
            f"{starter} has started this {times or 'several'} times ({count}), and each would "
            f"{command} by itself: start it once a machine, with --processes N or --accelerate "
            "CONFIG.yaml, as examples/slurm/train.sh does"
        )


def tell_devices(command: str) -> None:
    """Say what a process that works alone leaves unused, when it is about to begin.

    Args:
        command: ``train`` or ``eval``.
    """
    there, kind = gpus(), unused_gpu()
    if kind is not None:
        say(f"note: this machine's GPU ({kind}) is not used: NVIDIA's and AMD's are, or the CPU")
    if there > 1:
        say(
            f"note: {there} GPUs are here, and one process computes on the first of them; "
            f"`san-llm {command} ... --processes {there}` uses all, CUDA_VISIBLE_DEVICES chooses"
        )
    tasks = os.environ.get("SLURM_NTASKS", "")
    if _several(tasks):
        say(
            f"note: Slurm gave this job {tasks} tasks, and this is one process, started once; "
            "--processes N starts several"
        )


def let_memory_grow() -> None:
    """Let torch's memory on GPUs grow in place: batches differ in length, which leaves holes.

    It has to be said before torch looks. Whoever has set the variable knows better.
    """
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    if not has_driver() or any(name in os.environ for name in names):
        return
    # torch 2.9 passes over the new name, and later ones complain of the old one.
    old = Version(version("torch")) < Version("2.10")
    os.environ[names[0] if old else names[1]] = "expandable_segments:True"


def _several(text: str) -> bool:
    return text.isdecimal() and int(text) > 1


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else 0


def _count(gpus: int) -> str:
    return "1 GPU" if gpus == 1 else f"{gpus} GPUs"
