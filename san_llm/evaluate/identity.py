"""What makes it the same evaluation: all that its answers depend on, by content."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch

from san_llm.ask.answers import BEAMS, NEW_TOKENS
from san_llm.evaluate.harness import HarnessTask
from san_llm.evaluate.pose import SCORED
from san_llm.evaluate.questions import rows_asked
from san_llm.evaluate.request import EvalTask
from san_llm.evaluate.score import ANSWER_TEXT
from san_llm.files import code_sha256, folder_sha256
from san_llm.launch.processes import world_size
from san_llm.models.locate import FoundBase
from san_llm.recipe.task_file import OwnTask
from san_llm.runs.record import versions

FORMAT = 1  # part of the key: raise it when the same inputs give other rows


def identity(task: EvalTask, found: FoundBase, over: FoundBase | None = None) -> dict[str, Any]:
    """Return all that the answers depend on, by content: what makes it the same evaluation.

    The batch size and the processes are part of it where an answer's last bits may depend on which
    rows share a batch: not with ``strict``, nor in texts generated in fp32.

    Args:
        task: The evaluation.
        found: The model.
        over: What it was merged over, where that is asked, too.
    """
    subject, questions, settings = task.subject, task.questions, task.settings
    base, fresh = subject.base, task.fresh
    by_lm_eval, generated = (settings.protocol == name for name in ("lm-eval", "generate"))
    wide = base.dtype == "float32" and base.quantization != "8bit"
    scored = any(isinstance(t, OwnTask) and t.says.judge in SCORED for t in questions.rows)
    exact = settings.strict or (wide and generated and not scored)
    shared: dict[str, Any] = {} if exact else {"batch_size": settings.batch_size}
    if not exact and settings.protocol != "loglik":
        shared["processes"] = world_size()
    protocol: dict[str, Any] = {"name": settings.protocol, "prompt": settings.prompt}
    if settings.date is not None:
        protocol["date"] = settings.date
    if generated:
        protocol |= {
            "beams": BEAMS,
            "new_tokens": NEW_TOKENS,
            "answers_only": settings.answers_only,
        }
    elif not any(isinstance(t, HarnessTask) for t in questions.rows):
        protocol["choices"] = ANSWER_TEXT
    return {
        "format": FORMAT,
        "model": folder_sha256(found.folder, fresh),
        **({"base": folder_sha256(over.folder, fresh)} if over else {}),
        "load": base.model_dump(mode="json", exclude={"model", "revision"}),
        "adapter": folder_sha256(subject.adapter, fresh) if subject.adapter else None,
        "data": rows_asked(questions),
        "protocol": protocol | {"strict": settings.strict},
        **shared,
        "device": _device(),
        "versions": versions() | ({"lm_eval": version("lm_eval")} if by_lm_eval else {}),
        "code": code_sha256(),
    }


def _device() -> str:
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"
