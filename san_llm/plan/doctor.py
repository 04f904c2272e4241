"""What this machine can do for a run, found out by doing a little of it.

Every check gives its findings and never stops the others: what is broken is what one came to see.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any, Literal

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from rich.filesize import decimal

from san_llm.errors import first_line, unexpected
from san_llm.files import cache_folder
from san_llm.launch.devices import unused_gpu
from san_llm.shown import plain

GB = 10**9
LITTLE_MEMORY, LITTLE_DISK = 4 * GB, 5 * GB  # what the 135M demo needs, with room
NO_DISK = GB // 2
HUB_SECONDS, PAIR_SECONDS = 3.0, 120.0
# The numbers of the two processes, 1 and 2, are added up by both.
PAIR = """
import sys, torch, torch.distributed as dist
rank, meeting, backend = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=2)
numbers = torch.full((4,), float(rank + 1), device="cpu" if backend == "gloo" else f"cuda:{rank}")
dist.all_reduce(numbers)
dist.destroy_process_group()
sys.exit(0 if numbers.tolist() == [3.0] * 4 else "the sum is wrong")
"""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: The thing's name.
        state: ``ok``; ``warning``, when some runs will not do; ``error``, when none will.
        found: What there is.
        remedy: What would mend it; empty where nothing need be.
    """

    what: str
    state: Literal["ok", "warning", "error"]
    found: str
    remedy: str = ""


def diagnose() -> Iterator[Finding]:
    """Give each finding as it is known, of everything there is, the quick checks first."""
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "python": _python,
        "packages": _packages,
        "load_adapter": _load_adapter,
        "memory": _memory,
        "folders": _folders,
        "hub": _hub,
        "devices": _devices,
        "bfloat16": _bfloat16,
        "4 bits": _four_bits,
        "two processes": _pair,
        "two GPUs": _pair_of_gpus,
    }
    for name, check in checks.items():
        try:
            yield from check()
        except Exception as error:  # any of them, from any library: that is the finding
            message = plain(unexpected(error))
            yield Finding(
                name, "error", message, "install san-llm anew, in an environment of its own"
            )


def _python() -> Iterator[Finding]:
    wanted = SpecifierSet(metadata("san-llm")["Requires-Python"])
    running = platform.python_version()
    fits = wanted.contains(running, prereleases=True)
    yield Finding(
        "python",
        "ok" if fits else "error",
        f"{running} on {platform.platform()}",
        "" if fits else f"san-llm needs Python {wanted}",
    )


def _packages() -> Iterator[Finding]:
    """Hold what is installed to what the package asks for: its metadata travels in the wheel."""
    required = [Requirement(text) for text in requires("san-llm") or ()]
    wanted = [
        requirement
        for requirement in required
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    ]
    wrong = 0
    for requirement in wanted:
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            installed = "not installed"
        if installed == "not installed" or not requirement.specifier.contains(
            installed, prereleases=True
        ):
            wrong += 1
            remedy = f"pip install '{requirement.name}{requirement.specifier}'"
            yield Finding(
                requirement.name, "error", f"{installed}; needed is {requirement.specifier}", remedy
            )
    if not wrong:
        main = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
        versions = ", ".join(f"{name} {version(name)}" for name in main)
        yield Finding("packages", "ok", f"all {len(wanted)} as needed: {versions}")


def _load_adapter() -> Iterator[Finding]:
    """Say where transformers would refuse the installed PEFT in ``model.load_adapter``."""
    from transformers.integrations.peft import MIN_PEFT_VERSION

    here = version("peft")
    if Version(here) < Version(MIN_PEFT_VERSION):
        yield Finding(
            "load_adapter",
            "warning",
            f"model.load_adapter of transformers {version('transformers')} wants PEFT "
            f"{MIN_PEFT_VERSION} or newer, here is {here}; san-llm does without",
            "load adapters by PEFT: PeftModel.from_pretrained(model, FOLDER)",
        )


def _memory() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    enough = memory.available >= LITTLE_MEMORY
    yield Finding(
        "memory",
        "ok" if enough else "warning",
        f"{decimal(memory.available)} of {decimal(memory.total)} free",
        "" if enough else "end other programs, or train over a 4-bit base (base.quantization)",
    )


def _folders() -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    for what, folder, remedy in (
        ("this folder", Path(), "work in a folder of your own"),
        ("cache", cache_folder("tokenized").parent, "set SAN_LLM_CACHE to another folder"),
        ("hub cache", Path(HF_HUB_CACHE), "set HF_HOME to another folder"),
    ):
        path = folder.expanduser().absolute()
        there = next(parent for parent in (path, *path.parents) if parent.exists())
        try:
            with tempfile.TemporaryFile(dir=there) as file:
                file.write(b"written")
        except OSError as error:
            yield Finding(what, "error", f"{path}: {error.strerror}", remedy)
            continue
        free = shutil.disk_usage(there).free
        state: Literal["ok", "warning", "error"] = (
            "ok" if free >= LITTLE_DISK else "warning" if free >= NO_DISK else "error"
        )
        text = f"{path}: can be written, {decimal(free)} free"
        yield Finding(what, state, text, "" if state == "ok" else f"make room there, or {remedy}")


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", "ok", "switched off (HF_HUB_OFFLINE)")
        return
    address = constants.ENDPOINT
    outcomes: list[str] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(address, method="HEAD")
            urllib.request.urlopen(request, timeout=HUB_SECONDS).close()
            outcomes.append("")
        except urllib.error.HTTPError:  # an answer, whatever it is
            outcomes.append("")
        except Exception as error:
            reason = getattr(error, "reason", error)
            text = getattr(reason, "strerror", None) or str(reason)
            outcomes.append(text or type(error).__name__)

    # Asking for a name's address knows no time-out, so the whole is left behind after one.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_SECONDS)
    why = outcomes[0] if outcomes else f"no answer in {HUB_SECONDS:.0f} s"
    if why:
        remedy = (
            "models in folders do without; HF_ENDPOINT names a mirror, HTTPS_PROXY a proxy, "
            "HF_HUB_OFFLINE=1 saves the asking"
        )
        yield Finding("hub", "warning", plain(f"{address} cannot be reached: {why}"), remedy)
        return
    signed = "signed in" if get_token() else "nobody signed in (`hf auth login`)"
    yield Finding("hub", "ok", plain(f"{address} answers, {signed}"))


def _devices() -> Iterator[Finding]:
    import torch

    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        text = f"{name}, {decimal(free)} of {decimal(total)} free"
        yield Finding(f"gpu {number}", "ok", text)
    if torch.cuda.device_count():
        return
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if shutil.which("nvidia-smi") or Path("/dev/nvidiactl").exists():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without"
        yield Finding(
            "devices",
            "warning",
            f"an NVIDIA driver is here, but torch {torch.__version__} ({built}) sees no GPU",
            "install torch for the driver's CUDA (nvidia-smi names it), and look at "
            "CUDA_VISIBLE_DEVICES",
        )
    if kind := unused_gpu():
        yield Finding(
            "devices",
            "warning",
            f"the GPU here ({kind}) is not used: torch's CUDA is, NVIDIA's and AMD's, or the CPU",
            "train small models here, and large ones on such a GPU",
        )
    yield Finding("cpu", "ok", f"{cores}; no GPU: small models only")


def _bfloat16() -> Iterator[Finding]:
    import torch

    from san_llm.models.load import device

    error = _product_error(device())
    where = device().type
    text = f"a product on the {where} is right to {error:.1g}"
    if error > 0.02:  # 8 bits of mantissa allow half of that
        yield Finding("bfloat16", "error", text, "set base.dtype to float32")
    elif where == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        remedy = "set base.dtype to float32; with base.quantization 4bit the weights stay small"
        yield Finding("bfloat16", "warning", f"{text}, but emulated", remedy)
    else:
        yield Finding("bfloat16", "ok", text)


def _product_error(device: Any) -> float:
    import torch

    torch.manual_seed(0)
    a, b = torch.randn(2, 64, 64, device=device)
    return float(((a.bfloat16() @ b.bfloat16()).float() - a @ b).norm() / (a @ b).norm())


def _four_bits() -> Iterator[Finding]:
    from san_llm.models.load import device
    from san_llm.models.quantize import nf4_error

    remedy = "train over the base as it is (no base.quantization), or reinstall bitsandbytes"
    try:
        error = nf4_error(device())
    except Exception as failed:  # an absent library, or one for another CUDA
        yield Finding("4 bits", "warning", plain(first_line(failed)), remedy)
        return
    text = f"an NF4 layer on the {device().type} is within {error:.1g} of full precision"
    right = 0 < error < 0.2  # its 16 levels are within 0.1 of normal numbers
    yield Finding("4 bits", "ok" if right else "warning", text, "" if right else remedy)


def _pair() -> Iterator[Finding]:
    """Add numbers up between two processes, as every step of a training on several does."""
    failure = _failure_of_pair("gloo")
    if failure:
        remedy = (
            "train in one process; or name the network interface they are to use, such as lo, in "
            "GLOO_SOCKET_IFNAME"
        )
        yield Finding("two processes", "warning", plain(failure), remedy)
    else:
        yield Finding("two processes", "ok", "have added their numbers up (gloo)")


def _pair_of_gpus() -> Iterator[Finding]:
    """Do it over NCCL, where there are two GPUs: another library, other wires, other drivers."""
    import torch

    if torch.cuda.device_count() < 2:
        return
    if failure := _failure_of_pair("nccl"):
        remedy = (
            "train on one GPU; or look closer with NCCL_DEBUG=INFO: NCCL_P2P_DISABLE=1 and "
            "NCCL_IB_DISABLE=1 leave two of its ways out, NCCL_SOCKET_IFNAME names a network"
        )
        yield Finding("two GPUs", "warning", plain(failure), remedy)
        return
    number = ".".join(map(str, torch.cuda.nccl.version()))
    yield Finding("two GPUs", "ok", f"have added their numbers up (NCCL {number})")


def _failure_of_pair(backend: str) -> str:
    """Return why two processes cannot add numbers up over a backend, or nothing where they can."""
    with tempfile.TemporaryDirectory(prefix="san-llm-") as folder, ExitStack() as stack:
        pair = [
            subprocess.Popen(
                [sys.executable, "-c", PAIR, str(rank), str(Path(folder) / "meeting"), backend],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(2)
        ]
        for process in pair:
            stack.callback(process.kill)
        try:
            for process in pair:
                _, stderr = process.communicate(timeout=PAIR_SECONDS)
                if process.returncode:
                    lines = stderr.strip().splitlines()
                    return lines[-1] if lines else f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            return f"no sum in {PAIR_SECONDS:.0f} s"
    return ""
