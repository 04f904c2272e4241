"""What is watched while a run trains: the log, the view, a stop asked for, checkpoints."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from san_llm.errors import SanError
from san_llm.files import write_text
from san_llm.progress import say
from san_llm.san.formulas import STILL
from san_llm.train.checkpoint import checkpoint_of, last_checkpoint
from san_llm.train.stop import SLOW, StopOnSignal, anywhere
from san_llm.train.view import View


class Log(TrainerCallback):
    """Writes all that is logged to ``log.jsonl``, and tells the view of it."""

    def __init__(self, path: Path, view: View) -> None:
        """Log to ``path``, one JSON object a line."""
        self._path, self._view = path, view

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write the log of the checkpoint that the run goes on from: no more, and no less."""
        self._view.begin(state.global_step, state.max_steps, state.log_history)
        if state.is_world_process_zero:
            write_text(self._path, "".join(map(_line, state.log_history)))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **_: Any,
    ) -> None:
        """Append what Trainer logs; rank 0 only."""
        if state.is_world_process_zero and "train_runtime" not in logs:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(logs | {"step": state.global_step}))
            self._view.tell(state.global_step, logs)


def _line(entry: dict[str, Any]) -> str:
    # JSON has no nan: what is not finite is written as null. Sorted as a checkpoint's copy is.
    values = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in sorted(entry.items())
    }
    return json.dumps({"step": values.pop("step"), **values}) + "\n"


class Checkpoints(TrainerCallback):
    """Says when to save: after so much time, when asked to stop, and the last step, judged."""

    def __init__(self, judged: bool, seconds: float, stop: StopOnSignal) -> None:
        """Save every so many ``seconds``; ``judged`` asks for a held-out loss with the last."""
        self._judged, self._seconds, self._stop = judged, seconds, stop
        self._saved = self._began = time.monotonic()
        self._saved_step = -1
        self._slow = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Find the best checkpoint again in a run that was moved, or named from elsewhere.

        Trainer would keep the last weights without a word.
        """
        self._saved = time.monotonic()
        best = state.best_global_step
        place = checkpoint_of(Path(args.output_dir), best) if best else None
        state.best_model_checkpoint = place and str(place)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Look at the clock."""
        self._began = time.monotonic()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop inside a long step. Its gradients are lost, the weights are those before it."""
        long = time.monotonic() - self._began > SLOW
        if self._slow and self._stop.asked_anywhere(args, long):
            control.should_training_stop = True
            control.should_save = self._saved_step != state.global_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ask for a checkpoint where there is a reason for one. All processes decide alike."""
        now = time.monotonic()
        due, long = now - self._saved > self._seconds, now - self._began > SLOW
        # One message for the three; the last saves the messages inside steps that are short.
        stopping, due, self._slow = anywhere(args, self._stop.asked, due, long)
        if state.global_step >= state.max_steps:
            control.should_save = True
            control.should_evaluate = self._judged
        elif stopping:
            self._stop.stopped = True
            control.should_save = control.should_training_stop = True
        elif due:
            control.should_save = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start to count anew."""
        self._saved, self._saved_step = time.monotonic(), state.global_step


class Patience(TrainerCallback):
    """Ends a run whose held-out loss has not fallen for so many evaluations.

    By the log alone, which a resumed run has, too.
    """

    def __init__(self, evaluations: int) -> None:
        """Wait for so many ``evaluations`` after the best."""
        self._evaluations = evaluations

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """End a run that had come to its end and was killed before it had said so."""
        self._look(state, control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Look at the losses so far."""
        self._look(state, control)

    def _look(self, state: TrainerState, control: TrainerControl) -> None:
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        since = len(losses) - 1 - losses.index(min(losses)) if losses else 0
        if since >= self._evaluations and state.global_step < state.max_steps:
            control.should_training_stop = True
            if state.is_world_process_zero:
                say(f"step {state.global_step}: {since} held-out losses, none below the best: ends")


class BadBatches:
    """Stops a run before its weights learn from a batch whose loss has run away, or skips it.

    A loss has exploded when it is five times what an even guess over the vocabulary costs, or five
    times the run's first loss, if that was greater.
    """

    IN_A_ROW = 10  # skipped batches after which it is not the batches that are bad

    def __init__(
        self, skip: bool, vocabulary: int, folder: Path, rows: Callable[[int], str]
    ) -> None:
        """``rows`` names those of a step's batch; ``folder`` holds the run's checkpoints."""
        self._skip, self._folder, self._rows = skip, folder, rows
        self._most = 5 * math.log(vocabulary)
        self._in_a_row = 0

    def is_bad(self, state: TrainerState, loss: float, norm: float, rate: float) -> bool:
        """Whether to skip the batch of the step being made, by numbers that all processes share.

        Raises:
            SanError: when it is bad, and not to be skipped.
        """
        first = next((entry["loss"] for entry in state.log_history if "loss" in entry), loss)
        most = max(self._most, 5 * first if math.isfinite(first) else 0.0)
        if math.isfinite(loss) and math.isfinite(norm) and loss <= most:
            self._in_a_row = 0
            return False
        self._in_a_row += 1
        step = state.global_step + 1
        what = (
            f"step {step}: the loss is {loss:.4g}, the gradient's norm {norm:.4g}, at a learning "
            f"rate of {rate:g}, in the batch of {self._rows(step)}"
        )
        if not self._skip:
            raise SanError(
                f"{what}; {self._kept()}lower training.learning_rate, compute in another "
                "base.dtype, or leave such batches out with training.bad_batches=skip"
            )
        if self._in_a_row == self.IN_A_ROW:
            raise SanError(
                f"{what}; that is the {self.IN_A_ROW}th in a row; {self._kept()}".strip()
            )
        if state.is_world_process_zero:
            say(f"skipped: {what}")
        return True

    def check_held_out(self, state: TrainerState, loss: float, rate: float) -> None:
        """Refuse weights that have no loss on the held-out rows.

        Raises:
            SanError: when it is not finite.
        """
        if not math.isfinite(loss):
            raise SanError(
                f"step {state.global_step}: the held-out loss is {loss} at a learning rate of "
                f"{rate:g}; {self._kept()}lower training.learning_rate, or compute in another "
                "base.dtype"
            )

    def _kept(self) -> str:
        kept = last_checkpoint(self._folder)
        return f"{kept} is the last good checkpoint; " if kept else "nothing was saved; "


class Drift:
    """The neuron scales of a model in training, where the adapter holds them as they are."""

    def __init__(self, model: Any) -> None:
        """Find them; the low-rank carriers and other methods have none."""
        self._gammas = [p for name, p in model.named_parameters() if ".san_gamma." in name]

    def measure(self) -> dict[str, float]:
        """Return the shares above 1 (LTP) and below 1 (LTD), and the mean of ``|gamma - 1|``.

        Nothing where there are no scales, or where an engine holds them in parts.
        """
        if not self._gammas or any(not gamma.numel() for gamma in self._gammas):
            return {}
        with torch.no_grad():
            moved = torch.cat([gamma.float().ravel() for gamma in self._gammas]) - 1
            means = torch.stack(
                [
                    (moved > STILL).float().mean(),
                    (moved < -STILL).float().mean(),
                    moved.abs().mean(),
                ]
            ).tolist()
        names = ("gamma_potentiated", "gamma_depressed", "gamma_change")
        return dict(zip(names, means, strict=True))
