"""``transformers.Trainer`` with batches, a loss and checkpoints of our own; all else is its own.

The loss is the sum over all supervised tokens of a global batch divided by their number, and the
batches depend only on the global batch size, the seed and the epoch; so the weights do not depend
on how a batch is split over processes and accumulation steps. And dropout's dice are cast anew for
each micro-batch, from the seed and its number; so there is no state of them to save, and a resumed
run throws what a straight one throws, on another number of processes too.
"""

from __future__ import annotations

import random
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from san_llm.data.tokenized import Rows
from san_llm.errors import SanError, first_line
from san_llm.launch.engine import Engine
from san_llm.merge.whole import save_weights
from san_llm.models.adapter import save_adapter
from san_llm.recipe.schema import Recipe
from san_llm.runs.record import HELD_OUT_PART
from san_llm.train.batches import GroupedByLength
from san_llm.train.callbacks import BadBatches, Drift
from san_llm.train.checkpoint import checkpoint_of, damage, remove_old, whole_checkpoint
from san_llm.train.checkpoint_check import check_optimizer
from san_llm.train.loss import learned_tokens, share_of_loss, token_losses
from san_llm.train.samples import Samples
from san_llm.train.stop import SLOW, StopOnSignal, StoppedJudging
from san_llm.train.view import View

ONE_FILE = 2**60  # bytes that a checkpoint's file of weights may hold


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
        samples: Samples,
        view: View,
        parts: Sequence[str] = (),
        **keywords: Any,
    ) -> None:
        """Train as ``recipe.training`` says; ``keywords`` goes to Trainer.

        ``parts`` names of each held-out row what its loss is told apart by.
        """
        self._sharded = engine == "FSDP2"
        # Trainer does not believe that a run over a sharded base can resume. But what is trained,
        # and its optimizer's state, is whole in every process.
        args.save_only_model = self._sharded
        super().__init__(args=args, **keywords)
        args.save_only_model = False
        self._recipe, self._stop, self._bad = recipe, stop, bad
        self._parts = parts
        self._samples, self._view, self._drift = samples, view, Drift(self.model)
        self._batches = GroupedByLength(
            self.train_dataset.lengths,
            recipe.training.batch_size,
            recipe.training.seed,
            step=lambda: self.state.global_step,
            last=lambda: self.state.max_steps,
        )
        self._learned: torch.Tensor | int = 0  # tokens of the step that is made
        self._skipped = False
        self._micro_batch = (-1, 0)  # the step that is made, and how many of its batches are done
        self.add_callback(_JudgeLate(self))
        self.model_accepts_loss_kwargs = True  # so that Trainer counts tokens over a global batch
        self.remove_callback(PrinterCallback)  # it prints on stdout, where results go

    def _get_train_sampler(self, train_dataset: Any = None) -> GroupedByLength:
        return self._batches

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return this micro-batch's share of the loss per token of the global batch."""
        if num_items_in_batch is None:
            raise SanError("Trainer did not count the tokens of the batch")
        return share_of_loss(model, inputs, num_items_in_batch, int(self.args.world_size))

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Make one micro-batch's gradients, with dice of its own."""
        step, done = self.state.global_step, self._micro_batch[1]
        self._micro_batch = (step, done + 1 if self._micro_batch[0] == step else 0)
        # Batches go round the processes, so this is the micro-batch's number in the global batch.
        number = self._micro_batch[1] * self.args.world_size + self.args.process_index
        dice = random.Random(f"{self._recipe.training.seed} {step} {number}")
        torch.manual_seed(dice.getrandbits(63))
        self._learned = num_items_in_batch
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
        """Log a step with its neuron scales, and say of its batch if it was skipped."""
        if "loss" not in logs:
            super().log(logs, start_time)
            return
        logs = logs | self._drift.measure()
        if self._skipped:
            logs["skipped"] = 1
            self._tr_loss.zero_()  # Trainer takes it away from itself, which leaves a nan as it is
        lengths = self.train_dataset.lengths
        rows = self._batches.batch(self.state.global_step)
        self._view.counted(sum(lengths[row] for row in rows), int(self._learned))
        super().log(logs, start_time)
        self._sample()

    def samples_due(self) -> bool:
        """Whether the chosen prompts are to be asked now, and have not been."""
        step = self.state.global_step
        return self._samples.due(step, self.state.max_steps) and not any(
            "sample_1" in e for e in self.state.log_history if e["step"] == step
        )

    def _sample(self) -> None:
        """Ask the chosen prompts where that is due, and log the answers."""
        if not self.samples_due():
            return
        model, began = self.model.eval(), time.monotonic()
        answers: dict[str, Any] = {}
        try:
            for name, text in self._samples.answers(model):
                answers[name] = text
                if self._stop.asked_anywhere(self.args, time.monotonic() - began > SLOW):
                    raise StoppedJudging
        finally:
            model.train()
        self.log(answers)

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, *arguments: Any, **more: Any
    ) -> None:
        try:
            if self.state.global_step == self._globalstep_last_logged:  # before a stop
                self._sample()
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, *arguments, **more)
        except StoppedJudging:
            # Saved as it is, and judged when the run goes on.
            self.control.should_training_stop = True
            self._save_checkpoint(model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint that is whole or absent; see ``train.checkpoint``."""
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
            why = first_line(error)
            if isinstance(error, OSError):
                why = error.strerror or why
            elif isinstance(error, RuntimeError):
                if not re.search("inline_container|PytorchStreamWriter|iostream error", why):
                    raise  # not of torch's writer, which says only at which byte it failed
                why = "the disk is full, or the file is over a limit"
            free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
            raise SanError(
                f"{checkpoint_of(folder, state.global_step)}: cannot be written: {why} "
                f"({free / 1e6:,.0f} MB are free); make room, then "
                f"`san-llm train {folder.parent} --resume` goes on from the last checkpoint"
            ) from None

    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        """Save what is trained, from the first process; the recipe says all else."""
        if not self.args.should_save:
            return
        if self._recipe.method.name == "full":
            save_weights(self.model, Path(output_dir), ONE_FILE)
        else:
            save_adapter(self.model, Path(output_dir))

    def _load_best_model(self) -> None:
        if not (self.args.should_save or self.is_deepspeed_enabled):
            return  # nothing is done with the weights of others; with DeepSpeed each loads a part
        wrong = damage(Path(self.state.best_model_checkpoint))
        if wrong is not None:
            raise SanError(f"{self.args.output_dir}: {wrong}: the best weights are lost")
        super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        if checkpoint is not None and not self.is_deepspeed_enabled:
            # Trainer would start with fresh ones, if one of them were missing.
            check_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: Any) -> None:
        """Load nothing: see :meth:`training_step`."""

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return the held-out loss per token, over all processes' shares of the rows."""
        rows: Rows = self.eval_dataset
        model = self.model.eval()
        parts: dict[str, list[int]] = {}
        for row in sorted(range(len(rows)), key=lambda row: rows.lengths[row]):
            parts.setdefault(self._parts[row] if self._parts else "", []).append(row)
        size, world = self.args.per_device_train_batch_size, self.args.world_size
        total = torch.zeros(len(parts), 2, dtype=torch.float64, device=self.args.device)
        began = time.monotonic()
        # All processes make as many turns, so that they can stop together.
        turns = [
            (number, part[self.args.process_index :: world][start : start + size])
            for number, part in enumerate(parts.values())
            for start in range(0, -(-len(part) // world), size)
        ]
        with torch.no_grad():
            for number, turn in turns:
                long = time.monotonic() - began > SLOW
                if self._stop.asked_anywhere(self.args, long):
                    model.train()
                    raise StoppedJudging
                if not turn and not self._sharded:
                    continue
                # A sharded base needs all processes for every forward.
                batch = self.data_collator([rows[i] for i in turn or [0]])
                batch = self._prepare_inputs(batch)
                loss = token_losses(model, batch).double()
                if turn:
                    total[number, 0] += loss
                    total[number, 1] += learned_tokens(batch)
        total = self.accelerator.reduce(total, reduction="sum")
        model.train()
        both = total.sum(0)
        metrics = {f"{metric_key_prefix}_loss": (both[0] / both[1]).item()}
        if len(parts) > 1:
            each = (total[:, 0] / total[:, 1]).tolist()
            named = zip(parts, each, strict=True)
            metrics |= {f"{HELD_OUT_PART}{part}": loss for part, loss in sorted(named)}
        self.log(metrics)
        mean = metrics[f"{metric_key_prefix}_loss"]
        self._bad.check_held_out(self.state, mean, self._get_learning_rate())
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


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
        """Sample, evaluate and save, as would have come next."""
        step, trainer = state.global_step, self._trainer
        due = step and (step % int(args.eval_steps or 1) == 0 or step >= state.max_steps)
        known = any("eval_loss" in e for e in state.log_history if e["step"] == step)
        judge = bool(trainer.eval_dataset is not None and due and not known)
        if not judge and not trainer.samples_due():
            return
        control.should_evaluate, control.should_save = judge, True
        trainer._maybe_log_save_evaluate(
            torch.tensor(0.0), None, trainer.model_wrapped, None, state.epoch, None, 0.0
        )
