"""Where a run goes on: from its last whole checkpoint, with the rows and base of its beginning."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path

from san_llm.errors import InputError
from san_llm.files import folder_sha256, sha256_of
from san_llm.launch.engine import Engine
from san_llm.launch.processes import world_size
from san_llm.progress import say
from san_llm.recipe.schema import Recipe
from san_llm.runs.record import (
    ADAPTER_WEIGHTS,
    Hashes,
    RunManifest,
    manifest,
    read_run_manifest,
    write_run_manifest,
)
from san_llm.train.checkpoint import last_checkpoint
from san_llm.train.checkpoint_check import check_content
from san_llm.train.prepare import Prepared


def facts_of(recipe: Recipe, prepared: Prepared) -> RunManifest:
    """Return what a run's manifest says: versions, seed, device, the sha256 of base and rows."""
    engine, device = prepared.engine, prepared.arguments.device
    say(
        f"{recipe.method.kind}: {prepared.trained_numbers:,} trained numbers on "
        f"{recipe.base.model} ({device}, {_processes(engine)})"
    )
    base, before = folder_sha256(prepared.found.folder), prepared.before
    if before is not None:
        say(f"goes on from {before}")
        base |= {f"adapter's {ADAPTER_WEIGHTS}": sha256_of(before / ADAPTER_WEIGHTS)}
    return RunManifest(
        **manifest(),
        recipe=recipe.name,
        seed=recipe.training.seed,
        device=str(device),
        processes=world_size(),
        engine=engine if world_size() > 1 else None,
        sha256=Hashes(base=base, data=prepared.data.sha256),
    )


def resume_point(run: Path, prepared: Prepared, facts: RunManifest) -> Path | None:
    """Return the checkpoint to go on from, or None for a run that begins, and write its manifest.

    Raises:
        InputError: when a checkpoint, the rows or the base are not what the run began with, or no
            checkpoint is whole.
    """
    checkpoint = last_checkpoint(run / "checkpoints", _warn)
    if checkpoint is None:
        if any(run.glob("checkpoints/checkpoint-*")):
            raise InputError(
                f"{run}/checkpoints: none is whole, so there is nothing to go on from; "
                "--output with --overwrite begins again"
            )
        write_run_manifest(run, facts)  # a resumed run's is written when it ends
        return None
    check_content(checkpoint, prepared.model, prepared.engine)
    refuse_other_data(run, facts.sha256)
    say(f"going on from {checkpoint}")
    return checkpoint


def refuse_other_data(run: Path, now: Hashes, renamed: bool = False) -> None:
    """Refuse to go on with other rows or another base than a run began with, whatever their names.

    Args:
        run: The run's folder.
        now: What the base and the rows are now.
        renamed: They lie elsewhere, so that the run's manifest has to tell.

    Raises:
        InputError: naming the file that has changed.
    """
    try:
        before = read_run_manifest(run).sha256
    except InputError:
        before = Hashes()
    if not {"base", "data"} <= before.model_fields_set:  # no manifest that could tell
        if not renamed:
            return
        raise InputError(
            f"{run}: its manifest does not say what it began with, so it goes on only with the "
            "base and rows that its recipe.yaml names"
        )
    base = [
        (f"the base's {name}", before.base.get(name), now.base.get(name))
        for name in sorted(before.base.keys() | now.base.keys())
    ]
    rows = zip_longest(before.data.values(), now.data.items(), fillvalue=None)
    data = [
        (pair[0], was, pair[1]) if pair else ("a file of rows", was, None) for was, pair in rows
    ]
    for name, was, is_now in base + data:
        if was != is_now:
            told = f"{_short(was)} then, {_short(is_now)} now"
            raise InputError(
                f"{run}: {name} has changed since the run began (sha256: {told}); it goes on only "
                "as it began: bring the file back, or start a new run"
            )


def _short(digest: str | None) -> str:
    return "none" if digest is None else f"{digest[:12]}..."


def _processes(engine: Engine) -> str:
    count = world_size()
    if count == 1:
        return "1 process"
    return f"{count} processes" + ("" if engine == "DDP" else f", {engine}")


def _warn(message: str) -> None:
    say(f"warning: {message}")
