"""Trackers that get the log of a run, too: TensorBoard, Weights & Biases, MLflow.

Trainer's own callbacks write to them (``report_to``), in the first process only. Here is what they
leave to the environment: where the files go, and that a resumed run goes on where it was.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from san_llm.errors import InputError
from san_llm.recipe.schema import Recipe

OFFLINE = ("offline", "dryrun", "disabled")  # values of WANDB_MODE that need no account


def check_trackers(recipe: Recipe) -> None:
    """Refuse a tracker that is not installed, or would ask for a password.

    Raises:
        InputError: naming the package to install, or what to set.
    """
    for name in recipe.training.report_to:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name is found, too
            raise InputError(
                f"training.report_to: {name} is not installed: `pip install {name}`, or leave it "
                "out"
            )
    if "wandb" in recipe.training.report_to and os.environ.get("WANDB_MODE") not in OFFLINE:
        import wandb

        if not wandb.login(prompt=False, verify=False):
            raise InputError(
                "training.report_to: wandb has no key: sign in with `wandb login`, or set "
                "WANDB_MODE=offline"
            )


@contextmanager
def reported(recipe: Recipe, run: Path) -> Iterator[None]:
    """Let the trackers write as the recipe says for as long as the block runs; then close them.

    Args:
        recipe: The run's recipe.
        run: The run's folder, which gets W&B's files.
    """
    names = recipe.training.report_to
    before = dict(os.environ)
    if "wandb" in names:
        os.environ.setdefault("WANDB_PROJECT", "san-llm")
        os.environ["WANDB_DIR"] = str(run)
        os.environ["WANDB_RUN_ID"], os.environ["WANDB_RESUME"] = _wandb_id(run), "allow"
        os.environ["WANDB_CONSOLE"], os.environ["WANDB_SILENT"] = "off", "true"
    failed = True
    try:
        yield
        failed = False
    finally:
        if "wandb" in names:
            import wandb

            wandb.finish(exit_code=int(failed))
        if "mlflow" in names:
            import mlflow

            if mlflow.active_run() is not None:
                mlflow.end_run("FAILED" if failed else "FINISHED")
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _wandb_id(run: Path) -> str:
    """Return the id of a run's W&B run, the same after each stop."""
    file = run / "wandb" / "id"
    if not file.is_file():
        file.parent.mkdir(exist_ok=True)
        file.write_text(uuid.uuid4().hex[:8])
    return file.read_text()


def go_on_in_tensorboard(trainer: Any, folder: Path, step: int) -> None:
    """Let Trainer's TensorBoard callback write into ``folder``, and forget what lies behind a step.

    Args:
        trainer: Made with ``report_to`` tensorboard.
        folder: Where the event files lie.
        step: The step of the checkpoint that the run goes on from, or 0.
    """
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    trainer.remove_callback(TensorBoardCallback)
    writer = SummaryWriter(str(folder), purge_step=step + 1)
    trainer.add_callback(TensorBoardCallback(writer))
