"""What runs, evaluations and merges write down, each as a type that is written and read here."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydantic import BaseModel, ConfigDict

from san_llm import __version__

# What a run's folder holds, by name; an adapter's two files are named by PEFT.
MANIFEST, METRICS, RESULTS = "manifest.json", "metrics.json", "results.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class _Mean(BaseModel):
    """A share of right answers; all else of an evaluation's files is taken as it is."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    accuracy: float
    standard_error: float | None
    accuracy_norm: float | None = None
    standard_error_norm: float | None = None


class _Score(_Mean):
    task: str
    n: int
    unparseable: int


class _Results(BaseModel):
    model_config = ConfigDict(strict=True)
    title: str
    protocol: str
    prompt: str
    tasks: list[_Score]
    average: _Mean


class _Questions(BaseModel):
    model_config = ConfigDict(strict=True)
    sha256: str
    rows: int


class _Identity(BaseModel):
    model_config = ConfigDict(strict=True)
    data: dict[str, _Questions]
    protocol: dict[str, Any]
    load: dict[str, Any]
    versions: dict[str, str]
    device: str
    code: str


class _Manifest(BaseModel):
    rows_sha256: str
    identity: _Identity


@dataclass(frozen=True)
class MergeResult:
    """What a merge made.

    Attributes:
        output: The checkpoint's folder.
        base: The base that was used.
        adapter: The adapter.
        dtype: Of the merged weights.
        parameters: Numbers in the merged model.
        trained_over: How the base was quantized in training, or None.
        quantized: How its quantization was merged over, ``dequantize`` or ``keep``; None: the base
            is the full-precision one.
        gguf: The ``.gguf`` file that was written too, or None.
        pushed: Where it is on the hub, or None.
        verified: How it compares with base + adapter, or None if that was not asked.
    """

    output: str
    base: str
    adapter: str
    dtype: str
    parameters: int
    trained_over: str | None
    quantized: str | None = None
    gguf: str | None = None
    pushed: str | None = None
    verified: VerifyResult | None = None

    @property
    def stored_as(self) -> str:
        """How the weights are stored, in words."""
        return f"4 bits and {self.dtype}" if self.quantized == "keep" else self.dtype


class _Read(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Hashes(_Read):
    """The sha256 of what went into a run and came out of it."""

    data: dict[str, str] = {}
    adapter: str | None = None


class Manifest(_Read):
    """What of ``manifest.json`` the page speaks of; it shows all of it besides."""

    versions: dict[str, str] = {}
    device: str | None = None
    processes: int = 1
    engine: str | None = None
    sha256: Hashes = Hashes()


class Metrics(_Read):
    """What of ``metrics.json`` the page speaks of; see ``train.TrainResult``."""

    steps: int
    best_step: int
    held_out_loss: float | None
    train_loss: float
    trained_numbers: int
    rows: int
    dropped_rows: int
    cut_rows: int
    skipped_batches: int
    seconds: float
    resumed_at: int = 0
    peak_memory: int | None = None


PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "tokenizers")


def versions() -> dict[str, str]:
    """Return the versions of this package and of those that decide what it computes."""
    found = {"san-llm": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def manifest(**facts: Any) -> dict[str, Any]:
    """Return where and with what a run was made, with the facts that only it knows."""
    return {
        "made": datetime.now().astimezone().isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "versions": versions(),
        "git": _git_state(),
        **facts,
    }


def _git_state() -> dict[str, Any] | None:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        run: Its folder.
        finished: False when it was stopped and can go on.
        steps: Optimizer steps done, of ``max_steps``.
        max_steps: Optimizer steps planned.
        best_step: The step of the checkpoint that was kept.
        held_out_loss: Its loss on the held-out rows, per token; None without held-out rows.
        train_loss: Mean of the steps' losses, per token.
        trained_numbers: How many numbers were trained.
        rows: Rows trained on.
        dropped_rows: Rows whose response the cutoff cut away.
        cut_rows: Rows whose response lost its end.
        skipped_batches: Batches left out because their loss ran away.
        stopped_by: ``SIGTERM`` or ``SIGINT`` if it was stopped by one and can go on.
        seconds: Training time of this process.
        resumed_at: The step after which this process went on; 0 if it began the run.
        peak_memory: Bytes that this process held at most, on its GPU if it has one.
    """

    run: str
    finished: bool
    steps: int
    max_steps: int
    best_step: int
    held_out_loss: float | None
    train_loss: float
    trained_numbers: int
    rows: int
    dropped_rows: int
    cut_rows: int
    skipped_batches: int
    stopped_by: str | None
    seconds: float
    resumed_at: int
    peak_memory: int


@dataclass(frozen=True)
class VerifyResult:
    """How far the merged model is from base + adapter.

    Attributes:
        largest_difference: Of a logit, over all prompts, tokens and words.
        relative: The same in standard deviations of the logits.
        bound: What ``relative`` may be: what rounding the merged weights explains, and a margin.
        adapter_moved: Largest difference that the adapter made to the base, as a measure.
        same_top_word: Share of positions where both find the same word likeliest.
        same_greedy: Share of the words that both write after the prompts, until their first
            difference, when each takes the likeliest.
        quantization_moved: Largest difference to the base as it was quantized in training +
            adapter, where the merge was into the full-precision base.
        weight_errors: Of each tensor, against the formula in fp64, relative to the largest number
            of a row; None where there is no such formula: PEFT's methods, and weights in 4 bits.
    """

    largest_difference: float
    relative: float
    bound: float
    adapter_moved: float
    same_top_word: float
    same_greedy: float
    quantization_moved: float | None = None
    weight_errors: dict[str, float] | None = None

    @property
    def largest_weight_error(self) -> tuple[str, float] | None:
        """The worst of ``weight_errors``, with its tensor's name."""
        return max(self.weight_errors.items(), key=lambda e: e[1]) if self.weight_errors else None

    @property
    def errors_by_kind(self) -> dict[str, float]:
        """The worst of ``weight_errors`` of each kind of module, such as ``q_proj``."""
        worst: dict[str, float] = {}
        for name, error in (self.weight_errors or {}).items():
            kind = name.split(".")[-2]
            worst[kind] = max(error, worst.get(kind, 0.0))
        return worst
