"""The training run: from a recipe to a folder with an adapter, resumable, the best one kept."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    TrainingArguments,
)
from transformers.trainer_utils import set_seed

from san_llm.adapter_card import write_card
from san_llm.allocator import spares_memory, without_holes
from san_llm.callbacks import BadBatches, Checkpoints, Log, StopOnSignal
from san_llm.checkpoint import last_checkpoint, step_of
from san_llm.checkpoint_content import check_content
from san_llm.data.encode import Encoded, Pad, Rows, encode_rows, label_rows, pad_id
from san_llm.data.pack import Pack
from san_llm.data.rows import Row, read_rows, sha256_of, training_files
from san_llm.engine import Engine, check_engine, load_weights_only, take_engine
from san_llm.errors import InputError, SanError, of_the_disk, unexpected
from san_llm.evaluate.fingerprint import folder_sha256
from san_llm.heartbeat import peers_watched
from san_llm.launch import tell_stopped
from san_llm.live import peak_memory, watching
from san_llm.locate import base_folder, trained_bits
from san_llm.lock import sole_writer
from san_llm.model import (
    add_adapter,
    load_base,
    load_tokenizer,
    save_adapter,
    trainable_parameters,
)
from san_llm.packed_attention import can_pack, has_dropout, use_packed_attention
from san_llm.processes import agree, is_first, rank, told_once, world_size
from san_llm.progress import stderr
from san_llm.recipe import Recipe, check_held_out, micro_batch
from san_llm.record import manifest, whole_folder, write_json
from san_llm.samples import Samples
from san_llm.trackers import go_on_in_tensorboard, reported
from san_llm.trainer import GroupedByLength, SanTrainer


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
        check_held_out(data.held_out, len(rows))
        chosen = set(random.Random(recipe.training.seed).sample(range(len(rows)), data.held_out))
        held_out = [row for number, row in enumerate(rows) if number in chosen]
        rows = [row for number, row in enumerate(rows) if number not in chosen]
    return rows, held_out, {str(file): sha256_of(file) for file in files}


def _arguments(recipe: Recipe, run: Path, judged: bool) -> TrainingArguments:
    training = recipe.training
    micro = micro_batch(training, world_size())
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
        report_to=list(training.report_to) or "none",
        run_name=run.name,
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
    told = partial(_told, run=run)
    try:
        with told_once(told), sole_writer(run) if is_first() else nullcontext():
            return _train(recipe, run)
    except Exception as error:
        line = told(error)
        if isinstance(error, SanError) or line.startswith(type(error).__name__):
            raise
        raise SanError(line) from error
    except KeyboardInterrupt:
        if is_first():
            stderr.print(f"`san-llm train {run} --resume` goes on", markup=False)
        raise


def _told(error: Exception, run: Path) -> str:
    """Return an error in one line; an unexpected one with the process that it comes from."""
    if isinstance(error, SanError):
        return str(error)
    if isinstance(error, OSError) and not run.is_dir():
        return f"{run}: was taken away while the run went on; where it lies now, --resume goes on"
    if isinstance(error, OSError) and error.filename is None:  # the lock or the log
        error.filename = str(run)
    if line := of_the_disk(error):
        return f"{line}; then `san-llm train {run} --resume` goes on"
    line = unexpected(error)
    return f"process {rank()}: {line}" if world_size() > 1 else line


def _train(recipe: Recipe, run: Path) -> TrainResult:
    engine = take_engine()
    check_engine(engine, recipe)
    if engine == "DeepSpeed":
        load_weights_only()
    rows, held_out_rows, hashes = split_held_out(recipe)
    micro_batch(recipe.training, world_size())  # before anything is loaded
    tokenizer = load_tokenizer(recipe.base)
    samples = Samples(recipe, tokenizer)
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
    if arguments.use_cpu and spares_memory(
        recipe.training.gradient_checkpointing, trained_bits(recipe.base)
    ):
        without_holes()
    base = load_base(recipe.base, sharded=engine == "FSDP2")
    vocabulary = base.get_input_embeddings().num_embeddings  # which may be adapted, next
    samples.check(base.config)
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
                "base": folder_sha256(base_folder(recipe.base)),
                "data": hashes,
            },
        )
        resume = last_checkpoint(run / "checkpoints", _warn)
        if resume is None and any(run.glob("checkpoints/checkpoint-*")):
            raise InputError(
                f"{run}/checkpoints: none is whole, so there is nothing to go on from; "
                "--output with --overwrite begins again"
            )
        if resume is not None:
            check_content(resume, model, engine)
            _refuse_other_data(run, facts["sha256"])
            stderr.print(f"going on from {resume}", markup=False)
        else:  # a resumed run's is written when it ends
            write_json(run / "manifest.json", facts)
    resume = agree(resume)
    resumed_at = 0 if resume is None else step_of(resume)
    stop = StopOnSignal()
    began = time.monotonic()
    try:
        with (
            reported(recipe, run) if is_first() else nullcontext(),
            watching(quiet=not is_first()) as view,
            peers_watched(),
        ):
            trainer = SanTrainer(
                recipe=recipe,
                stop=stop,
                bad=BadBatches(
                    skip=recipe.training.bad_batches == "skip",
                    vocabulary=vocabulary,
                    folder=run / "checkpoints",
                    rows=lambda step: _batch_names(recipe, step, Rows(encoded), named),
                ),
                model=model,
                args=arguments,
                engine=engine,
                samples=samples,
                view=view,
                train_dataset=Rows(encoded),
                eval_dataset=None if held_out is None else Rows(held_out),
                data_collator=collator,
                callbacks=[
                    Log(run / "log.jsonl", view),
                    Checkpoints(held_out is not None, recipe.training.save_minutes * 60, stop),
                ],
            )
            if is_first() and "tensorboard" in recipe.training.report_to:
                go_on_in_tensorboard(trainer, run / "tensorboard", resumed_at)
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    finally:
        stop.close()
    state = trainer.state
    if stop.stopped:
        tell_stopped(stop.name)
    steps = [entry for entry in state.log_history if "loss" in entry]
    losses = [entry["loss"] for entry in steps if "skipped" not in entry]
    best = state.best_model_checkpoint
    result = TrainResult(
        run=str(run),
        finished=not stop.stopped,
        steps=state.global_step,
        max_steps=state.max_steps,
        best_step=step_of(Path(best)) if best else state.global_step,
        held_out_loss=state.best_metric,
        train_loss=sum(losses) / max(len(losses), 1),
        trained_numbers=trained,
        rows=len(encoded.rows),
        dropped_rows=encoded.dropped,
        cut_rows=encoded.cut,
        skipped_batches=len(steps) - len(losses),
        stopped_by=stop.name if stop.stopped else None,
        seconds=time.monotonic() - began,
        resumed_at=resumed_at,
        peak_memory=peak_memory(),
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
        data = {file: (before["data"].get(file), hashed) for file, hashed in now["data"].items()}
        names = before["base"].keys() | now["base"].keys()
        base = {
            f"the base's {name}": (before["base"].get(name), now["base"].get(name))
            for name in sorted(names)
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # no manifest that could tell
    for name, (was, found) in (base | data).items():
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
    rows = named()
    files: dict[str, list[str]] = {}
    for file, _, place in (
        rows[index].where.rpartition(": ") for index in sorted(sampler.batch(step))
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
