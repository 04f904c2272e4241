"""An adapter and its base become one stock model folder: complete, or absent.

The adapter is merged into the base's full-precision weights in fp32, and every weight is rounded
once to the dtype asked for. A SAN adapter is streamed from file to file (``stream``) without torch;
the methods of PEFT go through a model in memory (``in_memory``), and so do merges over the base as
it was quantized in training (``quantized``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from san_llm.errors import InputError, SanError, first_line
from san_llm.export.gguf import export_gguf
from san_llm.files import sha256_of, whole_folder, write_json, write_text
from san_llm.merge.checked import check_rows
from san_llm.merge.frame import FILE as FRAME
from san_llm.merge.frame import keep_recipes_frame
from san_llm.merge.in_range import check_files, in_range
from san_llm.merge.request import (
    SHARD_SIZE,
    MergeRequest,
    MergeTask,
    check_request,
    check_whole,
)
from san_llm.merge.stream import Merged, MergedMeasured
from san_llm.merge.whole import WholeTask, copy_companions, copy_whole
from san_llm.merge.write import Output, write_weights
from san_llm.models.cards import model_card
from san_llm.models.hub import push
from san_llm.models.weights import DTYPES, SPELLED, read_weights
from san_llm.progress import bar, say
from san_llm.runs.record import (
    Checked,
    MergeManifest,
    MergeResult,
    VerifyResult,
    manifest,
    write_merge_manifest,
)


def merge(request: MergeRequest) -> MergeResult:
    """Merge an adapter into its base, save a stock model, and return what came of it.

    A model that was trained whole is copied.

    Raises:
        InputError: when the adapter or base cannot be read, do not fit, or files are in the way.
        SanError: when merged numbers are not finite, or the hub does not take the folder, which
            stays then.
    """
    whole = request.subject.whole is not None
    task = check_whole(request) if whole else check_request(request)
    output, recipe = request.output, request.subject.recipe
    with whole_folder(output, request.overwrite) as folder:
        checked = trained_over = None
        if isinstance(task, WholeTask):
            made_from, method = task.found.folder, "full"
            base = recipe.base.model if recipe else task.found.base.model
            sums, parameters = copy_whole(task, folder)
            files = sorted(made_from.glob("*.safetensors"))
            sources = {f"model {file.name}": sha256_of(file) for file in files}
        else:
            made_from, method = task.adapter.folder, task.adapter.method
            base, trained_over = task.found.base.model, task.trained_over
            sums, parameters, checked = merge_weights(task, folder)
            sources = {"adapter": sha256_of(task.adapter.weights)}
        if recipe is not None and not (made_from / FRAME).is_file():  # made before it was kept
            keep_recipes_frame(recipe, task.found, folder)
        copy_companions(task.found.folder, folder, made_from)
        result = MergeResult(
            output=str(output),
            base=base,
            adapter=str(made_from),
            dtype=task.dtype,
            parameters=parameters,
            trained_over=trained_over,
            quantized=request.quantized,
            run=str(request.subject.run) if request.subject.run else None,
            checked=checked,
            whole=whole,
        )
        if request.gguf is not None:
            file = export_gguf(folder, request.gguf)
            result = replace(result, gguf=str(output / file.name))
            sums[file.name] = sha256_of(file)
        text = task.found.vocabulary is not None  # others have theirs in a section, or none
        write_text(folder / "README.md", model_card(result, recipe, method, text))
        facts = MergeManifest(
            **manifest(),
            base=base,
            prompt=recipe.data.prompt if recipe else None,
            date=recipe.data.date if recipe else None,
            sha256={
                "base config": sha256_of(task.found.folder / "config.json"),
                **sources,
                **sums,
            },
        )
        write_merge_manifest(folder, facts)
        if request.verified and isinstance(task, MergeTask):
            result = replace(result, verified=_verified(task, folder))
    if request.push_to is not None:
        result = replace(result, pushed=push(output, request.push_to, request.private))
    return result


def merge_weights(task: MergeTask, folder: Path) -> tuple[dict[str, str], int, Checked | None]:
    """Write the merged weights and their config, and look at them.

    Returns:
        The sha256 of each file, the number of parameters, and what was compared.
    """
    adapter, dtype, shard_size = task.adapter, task.dtype, task.request.shard_size
    quantized, check = task.request.quantized, task.request.verified is None
    streamed = _streamed(task)
    if streamed is not None:
        outputs, config = streamed
        outputs = [in_range(output, SPELLED.get(output.dtype, dtype)) for output in outputs]
        if not adapter.measured:
            shard_size = shard_size or SHARD_SIZE
        with bar("Merging", sum(output.size for output in outputs), "bytes") as progress:
            sums = write_weights(folder, outputs, shard_size, progress.advance)
        write_json(folder / "config.json", config)
        checked = check_rows(task.found, adapter, folder, dtype) if check else None
        return sums, sum(math.prod(tensor.shape) for tensor in read_weights(folder)), checked
    from san_llm.merge.in_memory import merge_in_memory

    with _in_one_line(adapter.folder):
        written = merge_in_memory(
            *(quantized, task.found, adapter.folder, folder, dtype),
            shard_size or SHARD_SIZE,
            check,
        )
    check_files(folder)
    if check and written[2] is None:
        raise SanError(f"{adapter.folder}: merged, it answers with numbers that are not finite")
    return written


def _streamed(task: MergeTask) -> tuple[list[Output], dict[str, Any]] | None:
    """Return the tensors and the config of a merge from file to file, or None: it is none.

    Raises:
        InputError: when adapter and base do not fit together.
        SanError: when a number of the adapter is not finite.
    """
    adapter, asked = task.adapter, task.request.dtype
    if task.request.quantized is not None or adapter.method != "SAN":
        return None
    if not adapter.measured:
        merged = Merged(adapter, task.found)
        return merged.outputs(DTYPES[task.dtype]), merged.merged_config(task.dtype)
    from san_llm.measure.in_files import UntranslatedError

    kind = None if asked is None else DTYPES[asked]
    try:
        measured = MergedMeasured(adapter, task.found)
        return measured.outputs(kind), measured.merged_config(kind)
    except UntranslatedError as error:
        from san_llm.models.load import load_config

        try:
            load_config(task.found)
        except InputError:  # no model for text, which recipes and commands do not load
            raise InputError(
                f"{adapter.folder}: cannot be merged from file to file: {error}; in Python, "
                "merge_and_unload() merges it in memory"
            ) from error
        say(f"merged in memory, not from file to file: {error}")
        return None


def _verified(task: MergeTask, folder: Path) -> VerifyResult:
    from san_llm.merge.verify import verify

    return verify(folder, task)


@contextmanager
def _in_one_line(adapter: Path) -> Iterator[None]:
    try:
        yield
    except SanError:
        raise
    except ValueError as error:  # PEFT's word for numbers that are not finite
        raise SanError(f"{adapter}: cannot be merged: {first_line(error)}") from error


def full_precision_note(result: MergeResult) -> str | None:
    """Return what a merge after quantized training changes, or None where it changes nothing."""
    if result.trained_over is None or result.quantized is not None:
        return None
    return (
        f"trained over a {result.trained_over} base, merged into the full-precision "
        f"{result.base}: outputs differ from training's by the base's quantization error"
    )
