"""What is watched: the log after a resume, when to save, stops, and losses that run away."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from san_llm.errors import SanError
from san_llm.train.callbacks import BadBatches, Checkpoints, Log
from san_llm.train.stop import StopOnSignal
from san_llm.train.view import watching


@pytest.fixture
def arguments(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path / "checkpoints"), report_to="none")


@pytest.fixture
def stop() -> Iterator[StopOnSignal]:
    stop = StopOnSignal()
    yield stop
    stop.close()


def state(step: int, last: int = 9) -> TrainerState:
    return TrainerState(global_step=step, max_steps=last, is_world_process_zero=True)


def test_the_log_is_that_of_the_checkpoint_neither_more_nor_less(
    tmp_path: Path, arguments: TrainingArguments
) -> None:
    path = tmp_path / "log.jsonl"
    # A kill lost line 2, left lines after the checkpoint, and half a line.
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    resumed = state(2)
    resumed.log_history = [
        {"loss": 1.5, "epoch": 0.5, "step": 1},
        {"loss": 1.25, "epoch": 1.0, "step": 2},
        {"eval_loss": float("nan"), "step": 2},
    ]
    with watching(quiet=True) as view:
        log = Log(path, view)
        log.on_train_begin(arguments, resumed, TrainerControl())
        log.on_log(arguments, state(3), TrainerControl(), {"loss": float("inf"), "grad_norm": 2.0})
        log.on_log(arguments, state(9), TrainerControl(), {"train_runtime": 1.0})
    assert path.read_text().splitlines() == [
        '{"step": 1, "epoch": 0.5, "loss": 1.5}',
        '{"step": 2, "epoch": 1.0, "loss": 1.25}',
        '{"step": 2, "eval_loss": null}',
        '{"step": 3, "grad_norm": 2.0, "loss": null}',
    ]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 2, 3]
    assert (view.total, view.step) == (9, 3)


def test_the_best_is_found_where_the_run_is_now(
    tmp_path: Path, arguments: TrainingArguments, stop: StopOnSignal
) -> None:
    resumed = state(3)
    resumed.best_global_step = 2
    resumed.best_model_checkpoint = None  # Trainer forgets one that is not where it was
    Checkpoints(True, 300, stop).on_train_begin(arguments, resumed, TrainerControl())
    assert resumed.best_model_checkpoint == str(tmp_path / "checkpoints" / "checkpoint-2")


@pytest.mark.parametrize("judged", [True, False])
def test_the_last_step_is_saved_and_judged(
    arguments: TrainingArguments, judged: bool, stop: StopOnSignal
) -> None:
    watch = Checkpoints(judged, 300, stop)
    for step in (8, 9):
        control = TrainerControl()
        watch.on_step_end(arguments, state(step), control)
        assert control.should_save == (step == 9)
        assert control.should_evaluate == (step == 9 and judged)


def test_a_checkpoint_is_due_when_its_time_has_come(
    arguments: TrainingArguments, stop: StopOnSignal, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("san_llm.train.callbacks.time.monotonic", lambda: now)
    watch = Checkpoints(True, 300, stop)
    watch.on_train_begin(arguments, state(0), TrainerControl())
    saved = []
    for step, seconds in enumerate((100, 290, 301, 400, 600, 602), start=1):
        now = 1000.0 + seconds
        control = TrainerControl()
        watch.on_step_end(arguments, state(step), control)
        assert not control.should_evaluate
        if control.should_save:
            saved.append(step)
            watch.on_save(arguments, state(step), control)
    assert saved == [3, 6]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_and_handlers_come_back(
    arguments: TrainingArguments, number: int
) -> None:
    before = signal.getsignal(number)
    stop = StopOnSignal()
    watch = Checkpoints(True, 300, stop)
    try:
        control = TrainerControl()
        watch.on_step_end(arguments, state(1), control)
        assert not control.should_training_stop
        os.kill(os.getpid(), number)
        watch.on_step_begin(arguments, state(1), control)
        watch.on_substep_end(arguments, state(1), control)
        assert not stop.stopped  # the step is short, and goes on to its end
        watch.on_step_end(arguments, state(2), control)
        assert (stop.stopped, control.should_save, control.should_training_stop) == (True,) * 3
        assert stop.name == signal.Signals(number).name
    finally:
        stop.close()
    assert signal.getsignal(number) == before


def test_a_long_step_is_left_where_it_is(
    arguments: TrainingArguments, stop: StopOnSignal, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("san_llm.train.callbacks.time.monotonic", lambda: now)
    watch = Checkpoints(True, 300, stop)
    control = TrainerControl()
    watch.on_save(arguments, state(1), control)
    watch.on_step_begin(arguments, state(1), control)
    os.kill(os.getpid(), signal.SIGTERM)
    now = 60.0
    watch.on_substep_end(arguments, state(1), control)
    assert control.should_training_stop
    assert not control.should_save  # that of step 1 is there
    assert stop.stopped


def test_a_second_ctrl_c_stops_at_once(stop: StopOnSignal) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


# --- losses that run away ---------------------------------------------------------------------


def judge(tmp_path: Path, skip: bool = False) -> BadBatches:
    return BadBatches(skip, 100, tmp_path, lambda step: f"rows of step {step}")


@pytest.mark.parametrize(
    ("loss", "norm"),
    [
        (math.nan, 1.0),
        (math.inf, 1.0),
        (2.0, math.inf),
        (2.0, math.nan),
        (5 * math.log(100) + 0.1, 1.0),
    ],
)
def test_a_bad_batch_ends_the_run_with_all_that_is_known(
    tmp_path: Path, loss: float, norm: float
) -> None:
    begun = state(2)
    begun.log_history = [{"loss": 3.0, "step": 1}, {"loss": 2.0, "step": 2}]
    with pytest.raises(SanError) as caught:
        judge(tmp_path).is_bad(begun, loss, norm, 0.01)
    assert str(caught.value).startswith(
        f"step 3: the loss is {loss:.4g}, the gradient's norm {norm:.4g}, at a learning rate of "
        "0.01, in the batch of rows of step 3; nothing was saved; "
    )
    assert "training.bad_batches=skip" in str(caught.value)


def test_what_a_run_began_with_is_no_explosion(tmp_path: Path) -> None:
    watch = judge(tmp_path)
    begun = state(2)
    begun.log_history = [{"loss": 20.0, "step": 1}]
    assert not watch.is_bad(begun, 99.0, 1.0, 0.01)
    with pytest.raises(SanError, match="the loss is 101"):
        watch.is_bad(begun, 101.0, 1.0, 0.01)


def test_bad_batches_are_skipped_but_not_for_ever(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = judge(tmp_path, skip=True)
    for step in range(9):
        assert watch.is_bad(state(step), math.nan, 1.0, 0.01)
    assert "skipped: step 9: the loss is nan" in capsys.readouterr().err
    assert not watch.is_bad(state(9), 2.0, 1.0, 0.01)
    for step in range(10, 19):
        assert watch.is_bad(state(step), math.nan, 1.0, 0.01)
    with pytest.raises(SanError, match="that is the 10th in a row"):
        watch.is_bad(state(19), math.nan, 1.0, 0.01)


def test_a_held_out_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    watch = judge(tmp_path, skip=True)
    watch.check_held_out(state(3), 2.0, 0.01)
    with pytest.raises(SanError, match=r"step 3: the held-out loss is -inf at .* 0\.01; nothing"):
        watch.check_held_out(state(3), -math.inf, 0.01)


def test_a_second_signal_while_the_first_is_taken_in_is_not_told_again(
    stop: StopOnSignal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent = []

    def named(number: int) -> signal.Signals:
        if not sent:
            sent.append(number)
            os.kill(os.getpid(), signal.SIGTERM)
        return real(number)

    real = signal.Signals
    monkeypatch.setattr(signal, "Signals", named)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.asked
    assert sent == [signal.SIGTERM]
    assert capsys.readouterr().err.count("stopping after this step") == 1
