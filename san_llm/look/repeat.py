"""How a run can be made again: the exact commands, from the versions to this page."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass

from san_llm.look.evaluations import Evaluated
from san_llm.look.facts import Facts
from san_llm.models.download import PINNED
from san_llm.runs.record import PACKAGES

AGAIN = "runs/again"


@dataclass(frozen=True)
class Step:
    """One thing to do: what it is for, and the command."""

    about: str
    command: str


def steps(facts: Facts, evaluated: Iterable[Evaluated]) -> list[Step]:
    """Return what makes a run and its evaluations again, in ``runs/again``."""
    recipe, manifest = facts.recipe, facts.manifest
    all_steps = []
    versions = manifest.versions
    # The part behind a "+" names a build for one kind of device: no index has it under that name.
    pins = [
        f"{package}=={versions[package].partition('+')[0]}"
        for package in PACKAGES
        if versions.get(package, "absent") != "absent"
    ]
    if pins:
        about = f"With san-llm {versions.get('san-llm')} and Python {versions.get('python')}:"
        all_steps.append(Step(about, shlex.join(["pip", "install", *pins])))
    base = recipe.base.model
    if base.lower() in PINNED:
        all_steps.append(Step("The base:", shlex.join(["san-llm", "download", base])))
    if recipe.data.train != "pocket":
        for file, digest in manifest.sha256.data.items():
            line = shlex.quote(f"{digest}  {file}")
            all_steps.append(Step("The same data:", f"echo {line} | sha256sum --check"))
    train = ["san-llm", "train", "recipe.yaml", "--output", AGAIN]
    about = "Training, with the recipe above saved as recipe.yaml:"
    if manifest.processes > 1:
        train += ["--processes", str(manifest.processes)]
    if manifest.engine == "FSDP2":
        train += ["--accelerate", "fsdp2"]
    elif manifest.engine == "DeepSpeed":
        train += ["--accelerate", "CONFIG.yaml"]
        about = (
            "Training, with the recipe above as recipe.yaml, and the DeepSpeed config it ran with:"
        )
    all_steps.append(Step(about, shlex.join(train)))
    commands = {
        evaluation.command: evaluation.of
        for evaluation in evaluated
        if evaluation.of != "another model"
    }
    all_steps += [Step(f"Evaluation of the {of}:", command) for command, of in commands.items()]
    return [*all_steps, Step("This page:", shlex.join(["san-llm", "report", AGAIN]))]
