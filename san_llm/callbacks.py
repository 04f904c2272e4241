"""What is watched while a run trains: the log, the bar, a stop asked for, whole checkpoints."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from san_llm.errors import SanError
from san_llm.launch import tell_ready
from san_llm.progress import Bar, stderr

COMPLETE = "complete"  # in a checkpoint's folder: everything in it was written to the end


class Log(TrainerCallback):
    """Writes every logged number to ``log.jsonl`` and moves the bar."""

    def __init__(self, path: Path, bar: Bar) -> None:
        """Log to ``path``, one JSON object a line."""
        self._path, self._bar = path, bar

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Forget what was logged after the checkpoint that the run goes on from."""
        self._bar.total = state.max_steps
        if not state.is_world_process_zero:
            return
        kept = []
        if self._path.is_file():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the last line of a killed run
                if entry["step"] <= state.global_step:
                    kept.append(line + "\n")
        self._path.write_text("".join(kept), encoding="utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **_: Any,
    ) -> None:
        """Append what Trainer logs; rank 0 only."""
        if state.is_world_process_zero and "train_runtime" not in logs:
            entry: dict[str, float | None] = {"step": state.global_step}
            # JSON has no nan: what is not finite is written as null.
            entry |= {key: value if math.isfinite(value) else None for key, value in logs.items()}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            if "loss" in logs:
                self._bar.to(state.global_step, f"loss {logs['loss']:.3f}")


class StopAtNan(TrainerCallback):
    """Ends a run that has diverged, before its weights are saved over good ones."""

    def __init__(self) -> None:
        """Remember the learning rate of the last step."""
        self._rate = 0.0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **_: Any,
    ) -> None:
        """Look at what Trainer logs, which is the same in all processes.

        Raises:
            SanError: when a loss or the gradient's norm is not finite.
        """
        self._rate = logs.get("learning_rate", self._rate)
        for key, what in (
            ("loss", "loss"),
            ("grad_norm", "gradient's norm"),
            ("eval_loss", "held-out loss"),
        ):
            value = logs.get(key, 0.0)
            if math.isfinite(value):
                continue
            kept = last_checkpoint(Path(args.output_dir))
            raise SanError(
                f"step {state.global_step}: the {what} is {value} at a learning rate of "
                f"{self._rate:g}; "
                + (f"{kept} is the last good checkpoint; " if kept else "nothing was saved; ")
                + "lower training.learning_rate, or compute in another base.dtype"
            )


class Checkpoints(TrainerCallback):
    """Judges and saves the last step as well, and marks each checkpoint once it is whole."""

    def __init__(self, judged: bool) -> None:
        """Ask for a held-out loss with the last checkpoint if the run is ``judged`` by one."""
        self._judged = judged

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Find the best checkpoint again in a run that was moved, or named from elsewhere.

        Trainer would delete it among the old ones, and keep the last weights without a word.
        """
        if state.best_model_checkpoint:
            name = Path(state.best_model_checkpoint).name
            state.best_model_checkpoint = str(Path(args.output_dir) / name)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ask for the last step's checkpoint."""
        if state.global_step >= state.max_steps:
            control.should_save = True
            control.should_evaluate = self._judged

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Mark the checkpoint just written."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (folder / COMPLETE).touch()


def last_checkpoint(folder: Path) -> Path | None:
    """Return the latest checkpoint that was written to its end, or None."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)


class StopOnSignal(TrainerCallback):
    """Ctrl-C or a polite kill: finish the step, save it, stop. All processes stop together."""

    def __init__(self) -> None:
        """Start to listen; see :meth:`close`."""
        self.stopped = False
        self._asked = False
        self._before = {
            number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        tell_ready()

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT and not torch.distributed.is_initialized():
            raise KeyboardInterrupt  # a second Ctrl-C means now
        if not self._asked and os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):  # a terminal that was closed
                stderr.print("stopping after this step; Ctrl-C again stops at once")
        self._asked = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop and save if any process was asked to."""
        asked = self._asked
        if torch.distributed.is_initialized():
            flag = torch.tensor(int(asked), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            asked = bool(flag.item())
        if asked and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = control.should_training_stop = True
