"""The training run: ``transformers.Trainer`` on Accelerate, resumable, the best checkpoint kept.

Three things are ours. The loss is the sum over all supervised tokens of a global batch divided by
their number, and the batches depend only on the global batch size, the seed and the epoch; so the
weights do not depend on how a batch is split over processes and accumulation steps. And dropout's
dice are cast anew for each micro-batch, from the seed and its number; so there is no state of them
to save, and a resumed run throws what a straight one throws, on another number of processes too.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.utils.data import Sampler
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import set_seed

from san_llm.adapter_card import write_card
from san_llm.callbacks import SLOW, BadBatches, Checkpoints, Log, StopOnSignal
from san_llm.checkpoint import checkpoint_of, damage, last_checkpoint, remove_old, whole_checkpoint
from san_llm.data.encode import Encoded, Pad, Rows, encode_rows, label_rows, pad_id
from san_llm.data.pack import Pack
from san_llm.data.rows import Row, read_rows, sha256_of, training_files
from san_llm.engine import Engine, check_engine, load_weights_only, take_engine
from san_llm.errors import InputError, SanError
from san_llm.heartbeat import peers_watched
from san_llm.launch import tell_failure, tell_stopped
from san_llm.locate import base_folder
from san_llm.lock import sole_writer
from san_llm.loss import learned_tokens, token_losses
from san_llm.model import (
    add_adapter,
    load_base,
    load_tokenizer,
    save_adapter,
    trainable_parameters,
)
from san_llm.packed_attention import can_pack, has_dropout, use_packed_attention
from san_llm.processes import agree, is_first, rank, world_size
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
        skipped_batches: Batches left out because their loss ran away.
        stopped_by: ``SIGTERM`` or ``SIGINT`` if it was stopped by one and can go on.
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
    skipped_batches: int
    stopped_by: str | None
    seconds: float


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

    def __init__(
        self,
        *,
        recipe: Recipe,
        stop: StopOnSignal,
        bad: BadBatches,
        args: TrainingArguments,
        engine: Engine,
        **how: Any,
    ) -> None:
        """Train as ``recipe.training`` says; ``how`` goes to Trainer."""
        self._sharded = engine == "FSDP2"
        # Trainer does not believe that a run over a sharded base can resume. But what is trained,
        # and its optimizer's state, is whole in every process.
        args.save_only_model = self._sharded
        super().__init__(args=args, **how)
        args.save_only_model = False
        self._recipe, self._stop, self._bad = recipe, stop, bad
        self._skipped = False
        self._micro_batch = (-1, 0)  # the step that is made, and how many of its batches are done
        self.add_callback(_JudgeLate(self))
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

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Make one micro-batch's gradients, with dice of its own."""
        step, done = self.state.global_step, self._micro_batch[1]
        self._micro_batch = (step, done + 1 if self._micro_batch[0] == step else 0)
        # Batches go round the processes, so this is the micro-batch's number in the global batch.
        number = self._micro_batch[1] * self.args.world_size + self.args.process_index
        dice = random.Random(f"{self._recipe.training.seed} {step} {number}")
        torch.manual_seed(dice.getrandbits(63))
        return super().training_step(model, inputs, num_items_in_batch)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the gradient's norm; looks at the batch while the weights are still as before."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        loss = self.accelerator.reduce(self._tr_loss.detach().clone(), reduction="mean").item()
        rate = self._get_learning_rate()
        self._skipped = self._bad.is_bad(self.state, loss, float(norm), rate)
        if self._skipped:
            self.model.zero_grad(set_to_none=True)  # then the optimizer leaves every weight alone
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and say of a batch that it was skipped."""
        if self._skipped and "loss" in logs:
            logs = logs | {"skipped": 1}
            self._tr_loss.zero_()  # Trainer takes it away from itself, which leaves a nan as it is
        super().log(logs, start_time)

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, *how: Any, **more: Any
    ) -> None:
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, *how, **more)
        except _StoppedJudging:
            # Saved as it is, and judged when the run goes on.
            self.control.should_training_stop = True
            self._save_checkpoint(model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint that is whole or absent; see ``checkpoint.py``."""
        folder, state = Path(self.args.output_dir), self.state
        self.store_flos()
        if state.best_global_step:
            state.best_model_checkpoint = str(checkpoint_of(folder, state.best_global_step))
        try:
            with whole_checkpoint(
                folder,
                state.global_step,
                state.best_global_step or None,
                first=self.args.should_save,
                together=self.accelerator.wait_for_everyone,
            ) as temporary:
                self.save_model(str(temporary), _internal_call=True)
                self._save_optimizer_and_scheduler(str(temporary))
                self._save_scaler(str(temporary))
                if self.args.should_save:
                    state.save_to_json(str(temporary / "trainer_state.json"))
            if self.args.should_save:
                remove_old(folder, self._recipe.training.keep_checkpoints)
        except (OSError, RuntimeError, SafetensorError) as error:
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if isinstance(error, OSError):
                why = error.strerror or why
            elif isinstance(error, RuntimeError):
                if "inline_container" not in why and "PytorchStreamWriter" not in why:
                    raise  # not of torch's writer, which says only at which byte it failed
                why = "the disk is full, or the file is over a limit"
            free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
            raise SanError(
                f"{checkpoint_of(folder, state.global_step)}: cannot be written: {why} "
                f"({free / 1e6:,.0f} MB are free); make room, then "
                f"`san-llm train {folder.parent} --resume` goes on from the last checkpoint"
            ) from None

    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        """Save the adapter, from the first process; the recipe says all else."""
        if self.args.should_save:
            save_adapter(self.model, Path(output_dir))

    def _load_best_model(self) -> None:
        if not (self.args.should_save or self.is_deepspeed_enabled):
            return  # nothing is done with the weights of others; with DeepSpeed each loads a part
        wrong = damage(Path(self.state.best_model_checkpoint))
        if wrong is not None:
            raise SanError(f"{self.args.output_dir}: {wrong}: the best weights are lost")
        super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except pickle.UnpicklingError as error:
            raise SanError(
                f"{checkpoint}: its optimizer or scheduler is more than numbers, and was not "
                "loaded: it could have run code"
            ) from error

    def _save_rng_state(self, output_dir: str) -> None:
        """Save nothing: see :meth:`training_step`."""

    def _load_rng_state(self, checkpoint: Any) -> None:
        """Load nothing."""

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
        began = time.monotonic()
        with torch.no_grad():
            # All processes make as many turns, so that they can stop together.
            for start in range(0, -(-len(rows) // self.args.world_size), size):
                long = time.monotonic() - began > SLOW
                if self._stop.asked_anywhere(self.args, long):
                    model.train()
                    raise _StoppedJudging
                turn = mine[start : start + size]
                if not turn and not self._sharded:
                    continue
                # A sharded base needs all processes for every forward.
                batch = self.data_collator([rows[i] for i in turn or [0]])
                batch = self._prepare_inputs(batch)
                loss = token_losses(model, batch).double()
                if turn:
                    total[0] += loss
                    total[1] += learned_tokens(batch)
        total = self.accelerator.reduce(total, reduction="sum")
        model.train()
        metrics = {f"{metric_key_prefix}_loss": (total[0] / total[1]).item()}
        self.log(metrics)
        mean = metrics[f"{metric_key_prefix}_loss"]
        self._bad.check_held_out(self.state, mean, self._get_learning_rate())
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


class _StoppedJudging(Exception):  # noqa: N818 (nothing is wrong)
    """The run was asked to stop while it judged the held-out rows."""


class _JudgeLate(TrainerCallback):
    """Judges the checkpoint that a run goes on from, if it was stopped before it had come to that.

    Without this the best checkpoint of a resumed run could be another than a straight run's.
    """

    def __init__(self, trainer: SanTrainer) -> None:
        """Judge by ``trainer``'s held-out rows."""
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Evaluate and save, as would have come next."""
        step, trainer = state.global_step, self._trainer
        due = step and (step % int(args.eval_steps or 1) == 0 or step >= state.max_steps)
        known = any("eval_loss" in e for e in state.log_history if e["step"] == step)
        if trainer.eval_dataset is None or not due or known:
            return
        control.should_evaluate = control.should_save = True
        trainer._maybe_log_save_evaluate(
            torch.tensor(0.0), None, trainer.model_wrapped, None, state.epoch, None, 0.0
        )


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
        with sole_writer(run) if is_first() else nullcontext():
            return _train(recipe, run)
    except Exception as error:
        told = _told(error)
        if os.environ.get("SAN_LLM_DEBUG") != "1" and tell_failure(told):
            raise SystemExit(1) from None
        if isinstance(error, SanError) or told.startswith(type(error).__name__):
            raise
        raise SanError(told) from error
    except KeyboardInterrupt:
        if is_first():
            stderr.print(f"`san-llm train {run} --resume` goes on", markup=False)
        raise


def _told(error: Exception) -> str:
    """Return an error in one line; an unexpected one with the process that it comes from."""
    if isinstance(error, SanError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT, EFBIG):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}cannot be written: {error.strerror}; make room, then --resume goes on"
    first = (str(error).strip().splitlines() or [""])[0]
    told = f"{type(error).__name__}: {first}"
    return f"process {rank()}: {told}" if world_size() > 1 else told


def _train(recipe: Recipe, run: Path) -> TrainResult:
    engine = take_engine()
    check_engine(engine, recipe)
    if engine == "DeepSpeed":
        load_weights_only()
    rows, held_out_rows, hashes = split_held_out(recipe)
    _micro_batch(recipe)  # before anything is loaded
    tokenizer = load_tokenizer(recipe.base)
    data = recipe.data
    how = (tokenizer, data.prompt, data.loss, data.cutoff, data.workers)
    encoded = encode_rows(rows, *how)
    held_out = encode_rows(held_out_rows, *how) if held_out_rows else None
    _say_data(encoded, held_out)

    def named() -> list[Row]:
        """Return the rows that are trained on, without those whose response was cut away."""
        if not encoded.dropped:
            return rows
        return [
            row
            for row, kept in zip(rows, label_rows(rows, *how), strict=True)
            if kept.fate != "dropped"
        ]

    arguments = _arguments(recipe, run, judged=held_out is not None)
    set_seed(recipe.training.seed)
    base = load_base(recipe.base, sharded=engine == "FSDP2")
    model = add_adapter(base, recipe.method)
    collator: Pack | Pad = Pad(pad_id(tokenizer))
    if recipe.training.packing and can_pack(base):
        use_packed_attention(base)
        collator = Pack(share=not has_dropout(model))
    trained = trainable_parameters(model)
    resume = None
    if is_first():
        stderr.print(
            f"{recipe.method.name}: {trained:,} trained numbers on {recipe.base.model} "
            f"({arguments.device}, {_processes(engine)})"
        )
        facts = manifest(
            recipe=recipe.name,
            seed=recipe.training.seed,
            device=str(arguments.device),
            processes=world_size(),
            engine=engine if world_size() > 1 else None,
            sha256={
                "base config": sha256_of(base_folder(recipe.base) / "config.json"),
                "data": hashes,
            },
        )
        resume = last_checkpoint(run / "checkpoints", _warn)
        if resume is not None:
            _refuse_other_data(run, facts["sha256"])
            stderr.print(f"going on from {resume}", markup=False)
        write_json(run / "manifest.json", facts)
    resume = agree(resume)
    stop = StopOnSignal()
    began = time.monotonic()
    try:
        with bar("Training", 1, "steps", quiet=not is_first()) as progress, peers_watched():
            trainer = SanTrainer(
                recipe=recipe,
                stop=stop,
                bad=BadBatches(
                    skip=recipe.training.bad_batches == "skip",
                    vocabulary=base.get_input_embeddings().num_embeddings,
                    folder=run / "checkpoints",
                    rows=lambda step: _batch_names(recipe, step, Rows(encoded), named),
                ),
                model=model,
                args=arguments,
                engine=engine,
                train_dataset=Rows(encoded),
                eval_dataset=None if held_out is None else Rows(held_out),
                data_collator=collator,
                callbacks=[
                    Log(run / "log.jsonl", progress),
                    Checkpoints(held_out is not None, recipe.training.save_minutes * 60, stop),
                ],
            )
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    finally:
        stop.close()
    state = trainer.state
    if stop.stopped:
        tell_stopped(stop.name)
    steps = [entry for entry in state.log_history if "loss" in entry]
    losses = [entry["loss"] for entry in steps if "skipped" not in entry]
    best = Path(state.best_model_checkpoint).name if state.best_model_checkpoint else ""
    result = TrainResult(
        run=str(run),
        finished=not stop.stopped,
        steps=state.global_step,
        max_steps=state.max_steps,
        best_step=int(best.split("-")[1]) if best else state.global_step,
        held_out_loss=state.best_metric,
        train_loss=sum(losses) / max(len(losses), 1),
        trained_numbers=trained,
        rows=len(encoded.rows),
        dropped_rows=encoded.dropped,
        cut_rows=encoded.cut,
        skipped_batches=len(steps) - len(losses),
        stopped_by=stop.name if stop.stopped else None,
        seconds=time.monotonic() - began,
    )
    if result.finished and is_first():
        with whole_folder(run / "adapter", overwrite=True) as folder:
            save_adapter(model, folder)
            facts["sha256"]["adapter"] = sha256_of(folder / "adapter_model.safetensors")
            write_json(run / "manifest.json", facts)
            write_json(run / "metrics.json", asdict(result))
            write_card(run, folder)  # instead of PEFT's, which is a form to be filled in
            # The adapter appears last: a run that has one is finished.
        for path in (run / "checkpoints").glob(".checkpoint-*"):  # what kills left
            shutil.rmtree(path)
        shutil.rmtree(run / "checkpoints" / "runs", ignore_errors=True)
    return result


def _processes(engine: Engine) -> str:
    count = world_size()
    if count == 1:
        return "1 process"
    return f"{count} processes" + ("" if engine == "DDP" else f", {engine}")


def _warn(message: str) -> None:
    stderr.print(f"warning: {message}", markup=False)


def _refuse_other_data(run: Path, now: dict[str, Any]) -> None:
    """Refuse to go on with other rows or another base than a run began with.

    Raises:
        InputError: naming the file that has changed.
    """
    try:
        before = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["sha256"]
        pairs = [
            ("the base's config.json", before["base config"], now["base config"]),
            *((file, before["data"].get(file), hashed) for file, hashed in now["data"].items()),
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # no manifest that could tell
    for name, was, found in pairs:
        if was != found:
            raise InputError(
                f"{run}: {name} has changed since the run began; it goes on only as it began: "
                "bring the file back, or start a new run"
            )


def _batch_names(recipe: Recipe, step: int, data: Rows, named: Callable[[], list[Row]]) -> str:
    """Return file and row of each example in the batch of a step."""
    training = recipe.training
    sampler = GroupedByLength(
        data.lengths, training.batch_size, training.seed, step=lambda: step - 1, last=lambda: step
    )
    at = (step - 1) * training.batch_size % len(sampler)
    batch = list(sampler)[at : at + training.batch_size]
    rows = named()
    files: dict[str, list[str]] = {}
    for file, _, place in (
        rows[index].where.rpartition(": ") for index in sorted(batch) if index < len(rows)
    ):
        files.setdefault(file, []).append(place)
    return ", ".join(f"{file}: {', '.join(places)}" for file, places in files.items())


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
