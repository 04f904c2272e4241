"""The training run: ``transformers.Trainer`` on Accelerate, resumable, the best checkpoint kept.

Two things are ours. The loss is the sum over all supervised tokens of a global batch divided by
their number, and the batches depend only on the global batch size, the seed and the epoch; so the
weights do not depend on how a batch is split over processes and accumulation steps.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerControl, TrainingArguments
from transformers.trainer_utils import set_seed

from san_llm.callbacks import Checkpoints, Log, StopAtNan, StopOnSignal, last_checkpoint
from san_llm.data.encode import Encoded, Pad, Rows, encode_rows, pad_id
from san_llm.data.rows import Row, read_rows, sha256_of, training_files
from san_llm.errors import InputError, SanError
from san_llm.launch import tell_failure
from san_llm.locate import base_folder
from san_llm.loss import token_losses
from san_llm.model import add_adapter, load_base, load_tokenizer, trainable_parameters
from san_llm.progress import bar, stderr
from san_llm.recipe import Recipe
from san_llm.record import manifest, whole_folder, write_json


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
        seconds: Training time of this process.
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
    seconds: float


def world_size() -> int:
    """Return how many processes train together, as their launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that speaks and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def agree(value: str | None) -> str:
    """Return the first process's ``value`` in all of them."""
    if world_size() == 1:
        return str(value)
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState(cpu=not torch.cuda.is_available())
    return str(broadcast_object_list([value])[0])


class GroupedByLength(Sampler[int]):
    """Shuffled rows in global batches of like length; the same on any number of processes.

    Every epoch is filled up to whole batches with the filler row (index ``len(lengths)``).
    """

    WINDOW = 50  # global batches sorted together: enough for like lengths, few enough to shuffle

    def __init__(
        self,
        lengths: list[int],
        batch_size: int,
        seed: int,
        step: Callable[[], int],
        last: Callable[[], int],
    ) -> None:
        """Group rows of these token counts into batches of ``batch_size``.

        ``step`` gives the optimizer steps done, and ``last`` how many there will be. The epoch
        follows from ``step`` alone: Trainer's ``set_epoch`` does not reach a sampler that resumes
        in several processes. After the last step there are no rows: Trainer, resumed there, would
        train one step more.
        """
        self._lengths, self._batch_size, self._seed = lengths, batch_size, seed
        self._step, self._last = step, last

    def __len__(self) -> int:
        """Return the rows of an epoch, fillers included."""
        return -(-len(self._lengths) // self._batch_size) * self._batch_size

    def __iter__(self) -> Iterator[int]:
        """Iterate over row numbers."""
        if self._step() >= self._last():
            return
        epoch = self._step() // (len(self) // self._batch_size)
        dice = random.Random(f"{self._seed} {epoch}")
        rows = list(range(len(self._lengths)))
        dice.shuffle(rows)
        window = self.WINDOW * self._batch_size
        batches = []
        for start in range(0, len(rows), window):
            near = sorted(rows[start : start + window], key=lambda row: -self._lengths[row])
            batches += [
                near[i : i + self._batch_size] for i in range(0, len(near), self._batch_size)
            ]
        dice.shuffle(batches)
        for batch in batches:
            yield from batch
            yield from [len(self._lengths)] * (self._batch_size - len(batch))


class SanTrainer(Trainer):
    """Trainer with our batches and our loss; everything else is its own."""

    control: TrainerControl

    def __init__(self, *, recipe: Recipe, **how: Any) -> None:
        """Train as ``recipe.training`` says; ``how`` goes to Trainer."""
        super().__init__(**how)
        self._recipe = recipe
        self.model_accepts_loss_kwargs = True  # so that Trainer counts tokens over a global batch
        self.loss_is_scaled_for_ga = True
        self.can_return_loss = True
        self.remove_callback(PrinterCallback)  # it prints on stdout, where results go

    def _get_train_sampler(self, train_dataset: Any = None) -> GroupedByLength:
        rows: Rows = self.train_dataset
        training = self._recipe.training
        return GroupedByLength(
            rows.lengths,
            training.batch_size,
            training.seed,
            step=lambda: self.state.global_step,
            last=lambda: self.state.max_steps,
        )

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return this micro-batch's share of the loss per token of the global batch.

        DDP averages gradients over processes, so the share is multiplied by their number.
        """
        if num_items_in_batch is None:
            raise SanError("Trainer did not count the tokens of the batch")
        share: torch.Tensor = token_losses(model, inputs) / num_items_in_batch
        return share * int(self.args.world_size)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return the held-out loss per token, over all processes' shares of the rows."""
        rows: Rows = self.eval_dataset
        model = self.model.eval()
        mine = sorted(range(len(rows)), key=lambda row: rows.lengths[row])
        mine = mine[self.args.process_index :: self.args.world_size]
        size = self.args.per_device_train_batch_size
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with torch.no_grad():
            for start in range(0, len(mine), size):
                batch = self.data_collator([rows[i] for i in mine[start : start + size]])
                batch = self._prepare_inputs(batch)
                total[0] += token_losses(model, batch).double()
                total[1] += (batch["labels"][:, 1:] != -100).sum()
        total = self.accelerator.reduce(total, reduction="sum")
        model.train()
        metrics = {f"{metric_key_prefix}_loss": (total[0] / total[1]).item()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


def split_held_out(recipe: Recipe) -> tuple[list[Row], list[Row], dict[str, str]]:
    """Return training rows, held-out rows, and the sha256 of each file they came from.

    Raises:
        InputError: when a file is wrong, or has no rows left to train on.
    """
    data = recipe.data
    files = training_files(data.train)
    rows = [row for file in files for row in read_rows(file)][: data.limit]
    if isinstance(data.held_out, str):
        files.append(Path(data.held_out))
        held_out = read_rows(files[-1])
    else:
        if data.held_out >= len(rows):
            raise InputError(
                f"data.held_out: {data.held_out} of {len(rows)} rows leave none to train on"
            )
        chosen = set(random.Random(recipe.training.seed).sample(range(len(rows)), data.held_out))
        held_out = [row for number, row in enumerate(rows) if number in chosen]
        rows = [row for number, row in enumerate(rows) if number not in chosen]
    return rows, held_out, {str(file): sha256_of(file) for file in files}


def _micro_batch(recipe: Recipe) -> int:
    share, rest = divmod(recipe.training.batch_size, world_size())
    if rest:
        raise InputError(
            f"training.batch_size: {recipe.training.batch_size} is not a multiple of "
            f"{world_size()} processes"
        )
    limit = recipe.training.micro_batch_size
    return next(size for size in range(min(limit, share), 0, -1) if share % size == 0)


def _arguments(recipe: Recipe, run: Path, judged: bool) -> TrainingArguments:
    training, micro = recipe.training, _micro_batch(recipe)
    arguments = TrainingArguments(
        output_dir=str(run / "checkpoints"),
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=training.batch_size // (micro * world_size()),
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        activation_checkpointing=training.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        seed=training.seed,
        data_seed=training.seed,
        eval_strategy="steps" if judged else "no",
        eval_steps=training.evaluate_every,
        save_strategy="steps",
        save_steps=training.evaluate_every,
        save_total_limit=training.keep_checkpoints,
        load_best_model_at_end=judged,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        use_cpu=not torch.cuda.is_available(),
    )
    if arguments.world_size != world_size():
        raise SanError(
            f"the launcher started {world_size()} processes, but Trainer sees "
            f"{arguments.world_size}: they would train apart"
        )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs: one process each, never DataParallel
    return arguments


def train(recipe: Recipe, run: Path) -> TrainResult:
    """Train a recipe in its run folder, going on from the last whole checkpoint if there is one.

    Args:
        recipe: What to do.
        run: The run's folder, made by ``record.new_run``; the same in all processes.

    Raises:
        InputError: when the data, the base or the number of processes cannot serve.
        SanError: when the training fails.
    """
    try:
        return _train(recipe, run)
    except Exception as error:
        if os.environ.get("SAN_LLM_DEBUG") != "1":
            first = (str(error).strip().splitlines() or [""])[0]
            known = isinstance(error, SanError)
            if tell_failure(str(error) if known else f"{type(error).__name__}: {first}"):
                raise SystemExit(1) from None
        raise
    except KeyboardInterrupt:
        if is_first():
            stderr.print(f"`san-llm train {run} --resume` goes on", markup=False)
        raise


def _train(recipe: Recipe, run: Path) -> TrainResult:
    rows, held_out_rows, hashes = split_held_out(recipe)
    _micro_batch(recipe)  # before anything is loaded
    tokenizer = load_tokenizer(recipe.base)
    data = recipe.data
    how = (tokenizer, data.prompt, data.loss, data.cutoff, data.workers)
    encoded = encode_rows(rows, *how)
    held_out = encode_rows(held_out_rows, *how) if held_out_rows else None
    _say_data(encoded, held_out)

    arguments = _arguments(recipe, run, judged=held_out is not None)
    set_seed(recipe.training.seed)
    base = load_base(recipe.base)
    model = add_adapter(base, recipe.method)
    trained = trainable_parameters(model)
    if is_first():
        stderr.print(
            f"{recipe.method.name}: {trained:,} trained numbers on {recipe.base.model} "
            f"({arguments.device}, {world_size()} process{'es' if world_size() > 1 else ''})"
        )
        facts = manifest(
            recipe=recipe.name,
            seed=recipe.training.seed,
            device=str(arguments.device),
            processes=world_size(),
            sha256={
                "base config": sha256_of(base_folder(recipe.base) / "config.json"),
                "data": hashes,
            },
        )
        write_json(run / "manifest.json", facts)

    resume = last_checkpoint(run / "checkpoints")
    if resume is not None and is_first():
        stderr.print(f"going on from {resume}")
    stop = StopOnSignal()
    began = time.monotonic()
    try:
        with bar("Training", 1, "steps", quiet=not is_first()) as progress:
            trainer = SanTrainer(
                recipe=recipe,
                model=model,
                args=arguments,
                train_dataset=Rows(encoded),
                eval_dataset=None if held_out is None else Rows(held_out),
                data_collator=Pad(pad_id(tokenizer)),
                callbacks=[
                    Log(run / "log.jsonl", progress),
                    StopAtNan(),
                    Checkpoints(judged=held_out is not None),
                    stop,
                ],
            )
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    finally:
        stop.close()
    state = trainer.state
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    best = Path(state.best_model_checkpoint).name if state.best_model_checkpoint else ""
    result = TrainResult(
        run=str(run),
        finished=not stop.stopped,
        steps=state.global_step,
        max_steps=state.max_steps,
        best_step=int(best.split("-")[1]) if best else state.global_step,
        held_out_loss=state.best_metric,
        train_loss=sum(losses) / len(losses),
        trained_numbers=trained,
        rows=len(encoded.rows),
        dropped_rows=encoded.dropped,
        cut_rows=encoded.cut,
        seconds=time.monotonic() - began,
    )
    if result.finished and is_first():
        with whole_folder(run / "adapter", overwrite=True) as folder:
            model.save_pretrained(folder)
            facts["sha256"]["adapter"] = sha256_of(folder / "adapter_model.safetensors")
            write_json(run / "manifest.json", facts)
            write_json(run / "metrics.json", asdict(result))
            # The adapter appears last: a run that has one is finished.
        shutil.rmtree(run / "checkpoints" / "runs", ignore_errors=True)
    return result


def _say_data(encoded: Encoded, held_out: Encoded | None) -> None:
    if not is_first():
        return
    lost = [
        f"{count:,} {what}"
        for count, what in (
            (encoded.dropped, "dropped (the cutoff cut the whole response away)"),
            (encoded.cut, "cut short (the cutoff took the response's end)"),
        )
        if count
    ]
    stderr.print(
        f"data: {len(encoded.rows):,} rows, {encoded.supervised:,} tokens to learn"
        + (f"; {len(held_out.rows):,} held out" if held_out else "")
        + ("; " + ", ".join(lost) if lost else "")
    )
