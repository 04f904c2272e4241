"""What runs, evaluations and merges write down, each as a type that is written and read here.

The names of these files, and what is in them, are known here alone:

    of a run           manifest.json        where, when, with what and from what it was made
                       metrics.json         what it came to
    of an evaluation   manifest.json        the same, its key, and all that its answers depend on
                       results.json         accuracies
    of a merged model  merge_manifest.json  where, when, with what and from what it was made

What an older version did not write has a default here, and what a later one writes besides is no
mistake.
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import PydanticKnownError

from san_llm import __version__
from san_llm.errors import InputError, first_mistake
from san_llm.files import read_json, write_json
from san_llm.protocol.tasks import guessing
from san_llm.recipe.task_file import GRADED

# What a run's folder holds, by name; an adapter's two files are named by PEFT.
MANIFEST, METRICS, RESULTS = "manifest.json", "metrics.json", "results.json"
MERGE_MANIFEST = "merge_manifest.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "tokenizers")


def versions() -> dict[str, str]:
    """Return the versions of this package and of those that decide what it computes."""
    known = {"san-llm": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            known[package] = version(package)
        except PackageNotFoundError:
            known[package] = "absent"
    return known


def manifest(**facts: Any) -> dict[str, Any]:
    """Return a manifest: when, where and with what something is made, and the facts given."""
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


_Item = TypeVar("_Item")
_Kind = TypeVar("_Kind", bound=BaseModel)


def _of_list(value: Any) -> Any:
    """Return a list of a file as the tuple that is kept of it; whatever else is refused."""
    if not isinstance(value, list | tuple):
        raise PydanticKnownError("list_type")
    return tuple(value)


_List = Annotated[tuple[_Item, ...], BeforeValidator(_of_list)]


class _Record(BaseModel):
    """What a file, or a section of one, says."""

    model_config = ConfigDict(frozen=True)

    @property
    def written(self) -> dict[str, Any]:
        """All that the file has, in its order, and nothing that is a default here."""
        return self.model_dump(exclude_unset=True)


class Accuracy(_Record):
    """A share of right answers, as fractions of 1.

    Attributes:
        accuracy: The share of rows answered right.
        standard_error: The standard error of ``accuracy``; None where a task has one row.
        accuracy_norm: The same by likelihood a character, ``acc_norm``; None where it was not
            measured.
        standard_error_norm: The standard error of ``accuracy_norm``.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    accuracy: float
    standard_error: float | None
    accuracy_norm: float | None = None
    standard_error_norm: float | None = None


class TaskAccuracy(Accuracy):
    """One task's accuracy.

    Attributes:
        task: The task's name.
        n: Rows answered.
        unparseable: Rows without an answer in the output; they count as wrong.
        correct: Rows answered right.
        judge: Of a task of one's own: how its answers are judged.
        guessing: Of a task of one's own: the accuracy of guessing, where it is known.
    """

    task: str
    n: int
    unparseable: int
    correct: int | None = None
    judge: str | None = None
    guessing: float | None = None

    @property
    def graded(self) -> bool:
        """Whether an answer may be right in part, so that no average has it."""
        return self.judge in GRADED


def by_chance(tasks: Sequence[TaskAccuracy]) -> float | None:
    """Return the mean accuracy of guessing over tasks, from 0 to 1; None where one is not known."""
    known = [guessing([task.task]) if task.judge is None else task.guessing for task in tasks]
    shares = [share for share in known if share is not None]
    return sum(shares) / len(shares) if shares and len(shares) == len(known) else None


class TaskLoss(_Record):
    """The loss of a task of one's own that is judged by it; the less, the better.

    Attributes:
        task: The task's name.
        n: Rows.
        tokens: Tokens of all answers, ends included.
        loss: The mean negative log-likelihood a token, in nats.
        standard_error: The standard error of ``loss``, over rows; None for one row.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    task: str
    n: int
    tokens: int
    loss: float
    standard_error: float | None


class UnparseableExample(_Record):
    """An output without an answer.

    Attributes:
        task: The task's name.
        row: The row's number in the task's file, from 0.
        output: What the model said.
    """

    task: str
    row: int
    output: str


class Forgetting(_Record):
    """How much less well than its base a model says the neutral text, in nats a token.

    Attributes:
        rise: The loss with training minus that without.
        low: The lower end of its 95 % interval over the text's chunks.
        high: The upper end.
        p: The p-value of a permutation test.
        base_loss: The loss without training.
        base_standard_error: The standard error of ``base_loss``; None for one chunk.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    rise: float
    low: float
    high: float
    p: float
    base_loss: float
    base_standard_error: float | None

    def __str__(self) -> str:
        """Return ``+0.0120 [0.0080, 0.0160] nats a token``."""
        return f"{self.rise:+.4f} [{self.low:.4f}, {self.high:.4f}] nats a token"


class EvaluationResults(_Record):
    """What an evaluation came to.

    Attributes:
        title: What was evaluated on what, in words.
        model: The base, or the model alone.
        adapter: The adapter's folder, or None.
        data: ``pocket``, or the folder of the test files.
        limit: Only so many rows of each task were asked; None: all.
        protocol: The protocol by which rows were asked.
        prompt: The prompt style.
        strict: Whether each row was computed alone.
        output: The evaluation's folder, as it was named.
        tasks: The accuracy of each task.
        average: The mean over the tasks; None where there are none.
        losses: The loss of each task that is judged by it.
        forgetting: What training made the model forget; None where that was not asked.
        task_files: The file of each task of one's own, by its name; of lm_eval's what it was
            asked by.
        unparseable_examples: Some outputs without an answer.
        notes: What a reader of the scores should know.
        sha256: The sha256 of each test file.
    """

    model_config = ConfigDict(strict=True)

    title: str = ""
    model: str = ""
    adapter: str | None = None
    data: str = ""
    limit: int | None = None
    protocol: str
    prompt: str
    strict: bool = False
    output: str = ""
    tasks: _List[TaskAccuracy]
    average: Accuracy | None
    losses: _List[TaskLoss] = ()
    forgetting: Forgetting | None = None
    task_files: dict[str, str] = {}
    unparseable_examples: _List[UnparseableExample] = ()
    notes: _List[str] = ()
    sha256: dict[str, str] = {}

    @property
    def written(self) -> dict[str, Any]:
        """All that the file has, in its order: there a task's name and counts come first."""
        values = super().written
        first = ("task", "n", "correct", "unparseable")
        return values | {
            "tasks": [
                {key: task[key] for key in first if key in task} | task for task in values["tasks"]
            ]
        }


class TaskRows(_Record):
    """The rows of a task that were asked.

    Attributes:
        sha256: The sha256 of the test file.
        rows: How many rows were asked, from its first on.
        asked: Of a task of one's own: how they were asked and judged.
    """

    model_config = ConfigDict(strict=True)

    sha256: str
    rows: int
    asked: dict[str, Any] | None = None


class Asking(_Record):
    """How rows were asked; what is None here is not of the protocol.

    In the order of the file, which is that of a comparison's notes.

    Attributes:
        name: The protocol's name.
        prompt: The prompt style.
        beams: The number of beams in the search.
        new_tokens: The most tokens that were generated.
        choices: The text that each choice was scored in.
        answers_only: Whether nothing was generated once an answer was certain.
        strict: Whether each row was computed alone.
        date: What the chat template wrote as today's; None where it was told none.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    name: str
    prompt: str
    beams: int | None = None
    new_tokens: int | None = None
    choices: str | None = None
    answers_only: bool = False
    strict: bool = False
    date: str | None = None


class Loading(_Record):
    """How the model was loaded.

    Attributes:
        dtype: The dtype of the weights; how they were quantized is kept as it stands.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    dtype: str


class Identity(_Record):
    """What of an evaluation's identity is read again; ``evaluate.identity`` says all that is in it.

    Attributes:
        data: The rows of each task.
        protocol: How they were asked.
        load: How the model was loaded.
        versions: The versions of the packages that decide what is computed.
        device: What it was computed on.
        code: The sha256 of this package's code.
        adapter: The sha256 of the adapter's files; None without one.
        batch_size: Rows at once, None for what memory allows; there only where it can change an
            answer's last bit.
        processes: The number of processes; there only where it can change such a bit.
    """

    model_config = ConfigDict(strict=True)

    data: dict[str, TaskRows]
    protocol: Asking
    load: Loading
    versions: dict[str, str]
    device: str
    code: str
    adapter: dict[str, str] | None = None
    batch_size: int | None = None
    processes: int | None = None


@dataclass(frozen=True)
class Question:
    """What was asked, and how: where two are equal, their answers can be compared row by row.

    Attributes:
        protocol: The protocol by which rows were asked.
        prompt: The prompt style.
        rows: ``(task, sha256 of its test file, number of rows, how they were asked)``, sorted by
            the tasks' names; the last as JSON, of a task of one's own.
    """

    protocol: str
    prompt: str
    rows: tuple[tuple[str, str, int, str], ...]


class Manifest(_Record):
    """Where and when something was made, and with what.

    Attributes:
        made: When it was made, as ISO 8601.
        platform: The system.
        versions: The versions of this package, of Python and of :data:`PACKAGES`.
        git: The commit of the working directory, and whether it was changed; None outside of git.
    """

    made: str = ""
    platform: str = ""
    versions: dict[str, str] = {}
    git: dict[str, Any] | None = None


class EvaluationManifest(Manifest):
    """What an evaluation is made of, as far as it is read again.

    Attributes:
        rows_sha256: The sha256 of the file with all rows.
        key: The hash of the identity.
        identity: All that its answers depend on.
        batch_size: Rows at once, as asked; None: chosen by memory.
        processes: The number of processes that answered.
    """

    rows_sha256: str
    key: str = ""
    identity: Identity
    batch_size: int | None = None
    processes: int = 1

    @property
    def question(self) -> Question:
        """What was asked, and how."""
        asking, data = self.identity.protocol, self.identity.data
        rows = tuple(
            (task, data[task].sha256, data[task].rows, json.dumps(data[task].asked, sort_keys=True))
            for task in sorted(data)
        )
        return Question(asking.name, asking.prompt, rows)


def evaluations_of(run: Path) -> list[Path]:
    """Return the folders of a run's evaluations that have results, by name."""
    return sorted(file.parent for file in run.glob(f"eval/*/{RESULTS}"))


def write_results(folder: Path, results: EvaluationResults) -> None:
    """Write what an evaluation came to."""
    write_json(folder / RESULTS, results.written)


def read_results(folder: Path) -> EvaluationResults:
    """Return what an evaluation came to, read from its folder.

    Raises:
        InputError: when there is none in the folder, or it is not the results of one.
    """
    return _checked(EvaluationResults, _of_evaluation(folder, RESULTS), folder / RESULTS)


def write_evaluation_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write what an evaluation is made of; its identity stays as it was hashed."""
    write_json(folder / MANIFEST, facts)


def read_evaluation_manifest(folder: Path) -> EvaluationManifest:
    """Return what an evaluation is made of, read from its folder.

    Raises:
        InputError: when the folder has no manifest, or not that of an evaluation.
    """
    return _checked(EvaluationManifest, _of_evaluation(folder, MANIFEST), folder / MANIFEST)


def read_made(folder: Path) -> str:
    """Return when an evaluation was made, as ISO 8601, whatever else its manifest says.

    Raises:
        InputError: when the folder has no manifest.
    """
    return _checked(Manifest, _of_evaluation(folder, MANIFEST), folder / MANIFEST).made


def _of_evaluation(folder: Path, name: str) -> dict[str, Any]:
    if not (folder / name).is_file():
        raise InputError(f"{folder}: not a finished evaluation: no {name} in it")
    return read_json(folder / name)


def _checked(kind: type[_Kind], values: Mapping[str, Any], path: Path) -> _Kind:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{path}: {first_mistake(error)}") from None


class Hashes(_Record):
    """The sha256 of what went into a run and came out of it.

    Attributes:
        base: The sha256 of each file that the base was loaded from.
        data: The sha256 of each file of rows.
        adapter: The sha256 of the adapter's weights; None before the training's end.
        model: The sha256 of each file of weights, where every weight was trained.
    """

    model_config = ConfigDict(extra="allow")

    base: dict[str, str] = {}
    data: dict[str, str] = {}
    adapter: str | None = None
    model: dict[str, str] | None = None


class RunManifest(Manifest):
    """What a run was made of; all of it is shown, so that what is not known here is kept, too.

    Attributes:
        recipe: The recipe's name.
        seed: The recipe's seed.
        device: What it was trained on.
        processes: The number of processes that trained.
        engine: What kept several processes together; None with one.
        sha256: The hashes of what went in, and of the adapter that came out.
    """

    model_config = ConfigDict(extra="allow")

    recipe: str = ""
    seed: int | None = None
    device: str | None = None
    processes: int = 1
    engine: str | None = None
    sha256: Hashes = Hashes()

    def with_product(self, **sha256: Any) -> RunManifest:
        """Return the same with the sha256 of the ``adapter`` that came out, or of the ``model``."""
        hashes = self.sha256.model_copy(update=sha256)
        return self.model_copy(update={"sha256": hashes})


def write_run_manifest(run: Path, manifest: RunManifest) -> None:
    """Write what a run is made of."""
    write_json(run / MANIFEST, manifest.written)


def read_run_manifest(run: Path) -> RunManifest:
    """Return what a run is made of; nothing, where training has not begun.

    Raises:
        InputError: when its manifest is damaged.
    """
    path = run / MANIFEST
    return _checked(RunManifest, read_json(path), path) if path.is_file() else RunManifest()


# What a run's rows are: of the eight tasks, of one's own, or texts, which ask nothing.
RowKind = Literal["tasks", "own", "texts"]


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        run: The run's folder.
        finished: False when the run was stopped and can go on.
        steps: Optimizer steps done, of ``max_steps``.
        max_steps: Optimizer steps planned.
        best_step: The step of the checkpoint that was kept.
        held_out_loss: That checkpoint's loss on the held-out rows, per token; None without such
            rows.
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
        row_kind: What the rows are.
        held_out_losses: That checkpoint's loss on each file or source of held-out rows, by its
            name; empty where there is one.
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
    row_kind: RowKind
    held_out_losses: dict[str, float] = field(default_factory=dict)


class Metrics(_Record):
    """What a run came to, as far as it is read again; :class:`TrainResult` says what each is.

    Attributes:
        resumed_at: 0, too, for a run of a version that did not write it.
        peak_memory: None for a run of a version that did not write it.
        row_kind: That of the published rows for a run of a version that did not write it.
        held_out_losses: Likewise empty.
    """

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
    row_kind: RowKind = "tasks"
    held_out_losses: dict[str, float] = {}


HELD_OUT_PART = "eval_loss_"  # begins what the log calls the loss of a held-out file or source


def held_out_parts(entry: Mapping[str, Any]) -> dict[str, float]:
    """Return the loss of each file or source of held-out rows in an entry of a log, by its name."""
    return {
        key.removeprefix(HELD_OUT_PART): loss
        for key, loss in entry.items()
        if key.startswith(HELD_OUT_PART)
    }


def write_metrics(run: Path, result: TrainResult) -> None:
    """Write what a run came to."""
    write_json(run / METRICS, asdict(result))


def read_metrics(run: Path) -> Metrics | None:
    """Return what a run came to; None before its end.

    Raises:
        InputError: when its metrics are damaged.
    """
    path = run / METRICS
    values = read_json(path) if path.is_file() else {}
    return _checked(Metrics, values, path) if values else None


class MergeManifest(Manifest):
    """What a merged model was made of.

    Attributes:
        base: The base, as the merge was told it.
        prompt: The prompt style of the training; None where it is not known.
        date: The date that the chat template wrote in training, where it was told one.
        sha256: The sha256 of the base's config, of the adapter, and of each file that was made.
    """

    base: str = ""
    prompt: str | None = None
    date: str | None = None
    sha256: dict[str, str] = {}


def write_merge_manifest(folder: Path, manifest: MergeManifest) -> None:
    """Write what a merged model was made of."""
    write_json(folder / MERGE_MANIFEST, manifest.written)


def read_merge_manifest(folder: Path) -> MergeManifest | None:
    """Return what a merged model was made of; None of a model that no merge of ours has made.

    Raises:
        InputError: when its manifest is damaged.
    """
    path = folder / MERGE_MANIFEST
    return _checked(MergeManifest, read_json(path), path) if path.is_file() else None


@dataclass(frozen=True)
class MergeResult:
    """What a merge made.

    Attributes:
        output: The checkpoint's folder.
        base: The base that was used.
        adapter: The adapter's folder.
        dtype: The dtype of the merged weights.
        parameters: How many numbers the merged model has.
        trained_over: How the base was quantized in training, or None.
        quantized: How its quantization was merged over, ``dequantize`` or ``keep``; None: the base
            is the full-precision one.
        gguf: The ``.gguf`` file that was written too, or None.
        pushed: Where it is on the hub, or None.
        verified: How it compares with base + adapter, or None if that was not asked.
        run: The run that the adapter is from, or None.
        whole: Whether the run trained every weight, and its model was copied; then ``adapter`` is
            that model's folder.
        checked: What a merge looks at that was told neither to verify nor not to, or None.
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
    run: str | None = None
    checked: Checked | None = None
    whole: bool = False

    @property
    def stored_as(self) -> str:
        """How the weights are stored, in words."""
        return f"4 bits and {self.dtype}" if self.quantized == "keep" else self.dtype


@dataclass(frozen=True)
class Checked:
    """What a merge was cheaply held against, and how far it is from that.

    Attributes:
        what: What was compared, in words.
        apart: The largest difference: of a weight, relative to the largest number of its row; of a
            logit, relative to the logits' spread.
    """

    what: str
    apart: float


@dataclass(frozen=True)
class VerifyResult:
    """How far the merged model is from base + adapter.

    Attributes:
        largest_difference: The largest difference of a logit, over all prompts, tokens and words.
        relative: The same in standard deviations of the logits.
        bound: What ``relative`` may be: what rounding the merged weights explains, and a margin.
        adapter_moved: Largest difference that the adapter made to the base, as a measure.
        same_top_word: Share of positions where both find the same word likeliest.
        same_greedy: Share of the words that both write after the prompts, until their first
            difference, when each takes the likeliest.
        quantization_moved: Largest difference to the base as it was quantized in training +
            adapter, where the merge was into the full-precision base.
        weight_errors: The error of each tensor against the formula in fp64, relative to the largest
            number of a row; None where there is no such formula: PEFT's methods, and weights in 4
            bits.
        frame: What of the training the chat templates of the merged model's files were held to, or
            why nothing, in words.
    """

    largest_difference: float
    relative: float
    bound: float
    adapter_moved: float
    same_top_word: float
    same_greedy: float
    quantization_moved: float | None = None
    weight_errors: dict[str, float] | None = None
    frame: str | None = None

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
