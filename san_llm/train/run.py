"""The training run: from a recipe to a folder with an adapter, resumable, the best one kept."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from san_llm.data.tokenized import Rows
from san_llm.errors import SanError, of_the_disk, unexpected
from san_llm.files import sha256_of, whole_folder
from san_llm.launch.heartbeat import peers_watched
from san_llm.launch.notes import tell_stopped
from san_llm.launch.processes import agree, is_first, rank, told_once, world_size
from san_llm.merge.frame import keep_frame
from san_llm.merge.request import SHARD_SIZE
from san_llm.merge.whole import copy_tokenizer, save_whole
from san_llm.models.adapter import save_adapter
from san_llm.models.cards import write_card
from san_llm.models.locate import FoundBase
from san_llm.progress import say
from san_llm.recipe.schema import Recipe
from san_llm.runs.folder import MODEL
from san_llm.runs.lock import sole_writer
from san_llm.runs.record import (
    ADAPTER_WEIGHTS,
    RunManifest,
    TrainResult,
    held_out_parts,
    write_metrics,
    write_run_manifest,
)
from san_llm.train.batches import batch_names
from san_llm.train.callbacks import BadBatches, Checkpoints, Log, Patience
from san_llm.train.checkpoint import step_of
from san_llm.train.prepare import Prepared, prepare
from san_llm.train.resume import facts_of, resume_point
from san_llm.train.stop import StopOnSignal
from san_llm.train.trackers import go_on_in_tensorboard, reported
from san_llm.train.trainer import SanTrainer
from san_llm.train.view import peak_memory, watching


def train(recipe: Recipe, run: Path, found: FoundBase | None = None) -> TrainResult:
    """Train a recipe in its run folder, and return what it came to.

    Goes on from the last whole checkpoint if there is one.

    Args:
        recipe: What to do.
        run: The run's folder, made by ``runs.folder.new_run``; the same in all processes.
        found: The recipe's base, where it has been looked up already.

    Raises:
        InputError: when the data, the base or the number of processes cannot serve.
        SanError: when the training fails.
    """
    in_one_line = partial(_in_one_line, run=run)
    try:
        with told_once(in_one_line), sole_writer(run) if is_first() else nullcontext():
            prepared = prepare(recipe, run, found)
            facts = facts_of(recipe, prepared) if is_first() else None
            resume = agree(None if facts is None else resume_point(run, prepared, facts))
            result = fit(recipe, run, prepared, resume)
            if result.finished and facts is not None:
                keep(recipe, run, prepared, result, facts)
            return result
    except Exception as error:
        line = in_one_line(error)
        if isinstance(error, SanError) or line.startswith(type(error).__name__):
            raise
        raise SanError(line) from error
    except KeyboardInterrupt:
        if is_first():
            say(f"`san-llm train {run} --resume` goes on")
        raise


def fit(recipe: Recipe, run: Path, prepared: Prepared, resume: Path | None) -> TrainResult:
    """Make the steps, to the end or to a stop, and return what they came to."""
    stop, began = StopOnSignal(), time.monotonic()
    data, first = prepared.data, is_first()
    rows, judged = Rows(data.train), data.held_out is not None
    resumed_at = 0 if resume is None else step_of(resume)
    try:
        with (
            short_factors(recipe.base.dtype),
            reported(recipe, run) if first else nullcontext(),
            watching(quiet=not first) as view,
            peers_watched(),
        ):
            trainer = SanTrainer(
                recipe=recipe,
                stop=stop,
                bad=BadBatches(
                    skip=recipe.training.bad_batches == "skip",
                    vocabulary=prepared.vocabulary,
                    folder=run / "checkpoints",
                    rows=lambda step: batch_names(recipe, step, rows, data.names),
                ),
                model=prepared.model,
                args=prepared.arguments,
                engine=prepared.engine,
                samples=prepared.samples,
                view=view,
                parts=data.parts,
                train_dataset=rows,
                eval_dataset=None if data.held_out is None else Rows(data.held_out),
                data_collator=prepared.collator,
                callbacks=[
                    Log(run / "log.jsonl", view),
                    Checkpoints(judged, recipe.training.save_minutes * 60, stop),
                    *([Patience(recipe.training.patience)] if recipe.training.patience else []),
                ],
            )
            if first and "tensorboard" in recipe.training.report_to:
                go_on_in_tensorboard(trainer, run / "tensorboard", resumed_at)
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    finally:
        stop.close()
    if stop.stopped:
        tell_stopped(stop.name)
    seconds = time.monotonic() - began
    return _result(run, prepared, trainer.state, stop, resumed_at, seconds)


@contextmanager
def short_factors(dtype: str) -> Iterator[None]:
    """Multiply matrices in TF32 on GPUs that can, where the base has 16 bits a number.

    Then what is left in fp32 are the low-rank paths of LoRA, DoRA and SAN's carriers. Their inputs
    have no more bits than TF32 takes, and whole fp32 products take several times as long there.
    """
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = before or dtype != "float32"
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def keep(
    recipe: Recipe, run: Path, prepared: Prepared, result: TrainResult, facts: RunManifest
) -> None:
    """Write what a finished run leaves behind, its product last: a run that has one is finished."""
    whole = not isinstance(prepared.model, PeftModel)
    with whole_folder(run / (MODEL if whole else "adapter"), overwrite=True) as folder:
        if whole:
            sums = save_whole(prepared.model, prepared.found.folder, folder, SHARD_SIZE)
            write_run_manifest(run, facts.with_product(model=sums))
        else:
            save_adapter(prepared.model, folder)
            digest = sha256_of(folder / ADAPTER_WEIGHTS)
            write_run_manifest(run, facts.with_product(adapter=digest))
        if prepared.before is not None:
            copy_tokenizer(prepared.before, folder)
        system, base = prepared.data.system, prepared.found.folder
        keep_frame(prepared.tokenizer, recipe.data.prompt, system, base, folder)
        write_metrics(run, result)
        write_card(run, folder)  # instead of PEFT's, which is a form to be filled in
    for path in (run / "checkpoints").glob(".checkpoint-*"):  # what kills left
        shutil.rmtree(path)
    shutil.rmtree(run / "checkpoints" / "runs", ignore_errors=True)


def _result(
    run: Path,
    prepared: Prepared,
    state: Any,
    stop: StopOnSignal,
    resumed_at: int,
    seconds: float,
) -> TrainResult:
    steps = [entry for entry in state.log_history if "loss" in entry]
    losses = [entry["loss"] for entry in steps if "skipped" not in entry]
    judged: dict[str, float] = {}
    for entry in state.log_history:
        if entry["step"] == state.best_global_step:
            judged |= held_out_parts(entry)
    best, encoded = state.best_model_checkpoint, prepared.data.train
    return TrainResult(
        run=str(run),
        finished=not stop.stopped,
        steps=state.global_step,
        max_steps=state.max_steps,
        best_step=step_of(Path(best)) if best else state.global_step,
        held_out_loss=state.best_metric,
        held_out_losses=judged,
        train_loss=sum(losses) / max(len(losses), 1),
        trained_numbers=prepared.trained_numbers,
        rows=len(encoded.rows),
        dropped_rows=encoded.dropped,
        cut_rows=encoded.cut,
        skipped_batches=len(steps) - len(losses),
        stopped_by=stop.name if stop.stopped else None,
        seconds=seconds,
        resumed_at=resumed_at,
        peak_memory=peak_memory(),
        row_kind=prepared.data.kind,
    )


def _in_one_line(error: Exception, run: Path) -> str:
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
