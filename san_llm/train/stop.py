"""Where Ctrl-C and SIGTERM go: the step is finished, saved, and all processes stop together."""

from __future__ import annotations

import contextlib
import signal
from types import FrameType

import torch
from transformers import TrainingArguments

from san_llm.launch.notes import tell_ready
from san_llm.launch.processes import is_first
from san_llm.progress import say

SLOW = 10.0  # seconds of a step or a judging above which a stop does not wait for its end


def anywhere(args: TrainingArguments, *flags: bool) -> tuple[bool, ...]:
    """Return which flags are set in any of the processes."""
    if not torch.distributed.is_initialized():
        return flags
    reduced = torch.tensor(flags, dtype=torch.int32, device=args.device)
    torch.distributed.all_reduce(reduced, op=torch.distributed.ReduceOp.MAX)
    return tuple(bool(flag) for flag in reduced.tolist())


class StopOnSignal:
    """Ctrl-C or SIGTERM: finish the step, save it, stop. All processes stop together.

    Attributes:
        asked: Whether this process was asked to stop.
        stopped: Whether the run was stopped before its end.
        name: ``SIGTERM`` or ``SIGINT``, by which this process was asked.
    """

    def __init__(self) -> None:
        """Start to listen; see :meth:`close`."""
        self.asked = self.stopped = False
        self.name = "SIGINT"
        self._before = {
            number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        tell_ready()

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT and not torch.distributed.is_initialized():
            raise KeyboardInterrupt  # a second Ctrl-C means now
        # With no call between: that is where a second signal would be let in, and speak, too.
        again, self.asked = self.asked, True
        self.name = signal.Signals(number).name
        if not again and is_first():  # the next signal may arrive while this prints
            with contextlib.suppress(OSError):  # a terminal that was closed
                say("stopping after this step; Ctrl-C again stops at once")

    def asked_anywhere(self, args: TrainingArguments, here: bool = True) -> bool:
        """Whether to stop ``here``: any process was asked to, where it has reason. All must call.

        If so, the run counts as stopped.
        """
        (stopping,) = anywhere(args, self.asked and here)
        self.stopped = self.stopped or stopping
        return stopping


class StoppedJudging(Exception):  # noqa: N818 (nothing is wrong)
    """The run was asked to stop while it sampled, or judged the held-out rows."""
