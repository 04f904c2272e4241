"""What is watched: the log after a resume, whole checkpoints, stops, and numbers gone astray."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from san_llm.callbacks import Checkpoints, Log, StopAtNan, StopOnSignal, last_checkpoint
from san_llm.errors import SanError
from san_llm.progress import bar


@pytest.fixture
def arguments(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path / "checkpoints"), report_to="none")


def state(step: int, last: int = 9) -> TrainerState:
    return TrainerState(global_step=step, max_steps=last, is_world_process_zero=True)


def checkpoint(folder: Path, step: int, whole: bool) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if whole:
        (path / "complete").touch()
    return path


def test_the_log_forgets_what_came_after_the_checkpoint(
    tmp_path: Path, arguments: TrainingArguments
) -> None:
    path = tmp_path / "log.jsonl"
    lines = [f'{{"step": {step}, "loss": 1.0}}\n' for step in (1, 2, 2, 3, 4)]
    path.write_text("".join(lines) + '{"step": 5, "lo')
    with bar("Training", 1, quiet=True) as progress:
        log = Log(path, progress)
        log.on_train_begin(arguments, state(2), TrainerControl())
        assert path.read_text() == "".join(lines[:3])
        log.on_log(arguments, state(3), TrainerControl(), {"loss": float("inf"), "grad_norm": 2.0})
        log.on_log(arguments, state(9), TrainerControl(), {"train_runtime": 1.0})
    added = path.read_text().splitlines()[3:]
    assert [json.loads(line) for line in added] == [{"step": 3, "loss": None, "grad_norm": 2.0}]
    assert (progress.total, progress.done) == (9, 3)


def test_the_last_checkpoint_is_the_whole_one_of_the_largest_step(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "absent") is None
    checkpoint(tmp_path, 100, whole=False)
    assert last_checkpoint(tmp_path) is None
    checkpoint(tmp_path, 9, whole=True)
    expected = checkpoint(tmp_path, 10, whole=True)  # by number, not by letters
    assert last_checkpoint(tmp_path) == expected


def test_a_checkpoint_is_marked_and_the_best_is_found_where_the_run_is_now(
    tmp_path: Path, arguments: TrainingArguments
) -> None:
    folder = checkpoint(tmp_path / "checkpoints", 3, whole=False)
    watch = Checkpoints(judged=True)
    watch.on_save(arguments, state(3), TrainerControl())
    assert last_checkpoint(tmp_path / "checkpoints") == folder
    resumed = state(3)
    resumed.best_model_checkpoint = "/elsewhere/checkpoints/checkpoint-3"
    watch.on_train_begin(arguments, resumed, TrainerControl())
    assert resumed.best_model_checkpoint == str(folder)


@pytest.mark.parametrize("judged", [True, False])
def test_the_last_step_is_saved_and_judged(arguments: TrainingArguments, judged: bool) -> None:
    watch = Checkpoints(judged)
    for step in (8, 9):
        control = TrainerControl()
        watch.on_step_end(arguments, state(step), control)
        assert control.should_save == (step == 9)
        assert control.should_evaluate == (step == 9 and judged)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_and_handlers_come_back(
    arguments: TrainingArguments, number: int
) -> None:
    before = signal.getsignal(number)
    stop = StopOnSignal()
    try:
        control = TrainerControl()
        stop.on_step_end(arguments, state(1), control)
        assert not control.should_training_stop
        os.kill(os.getpid(), number)
        assert not stop.stopped  # the step goes on to its end
        stop.on_step_end(arguments, state(2), control)
        assert (stop.stopped, control.should_save, control.should_training_stop) == (True,) * 3
    finally:
        stop.close()
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_stops_at_once() -> None:
    stop = StopOnSignal()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        stop.close()


@pytest.mark.parametrize(
    ("logs", "message"),
    [
        ({"loss": float("nan")}, "step 3: the loss is nan at a learning rate of 0.01; nothing"),
        ({"loss": 1.0, "grad_norm": float("inf")}, "step 3: the gradient's norm is inf"),
        ({"eval_loss": float("-inf")}, "step 3: the held-out loss is -inf"),
    ],
)
def test_numbers_that_are_not_finite_end_the_run(
    arguments: TrainingArguments, logs: dict[str, float], message: str
) -> None:
    watch = StopAtNan()
    watch.on_log(arguments, state(2), TrainerControl(), {"loss": 1.0, "learning_rate": 0.01})
    with pytest.raises(SanError) as caught:
        watch.on_log(arguments, state(3), TrainerControl(), logs)
    assert str(caught.value).startswith(message)
    assert "a learning rate of 0.01" in str(caught.value)
