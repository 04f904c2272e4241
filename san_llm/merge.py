"""An adapter and its base become one stock checkpoint: complete, or absent.

The adapter is folded into the base's full-precision weights in fp32, and every weight is rounded
once to the dtype asked for. A SAN adapter is streamed from file to file (``streamed``) without
torch; the methods of PEFT go through a model in memory (``peft_merge``).
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from san_llm import __version__
from san_llm.data.rows import sha256_of
from san_llm.errors import InputError, SanError
from san_llm.locate import base_folder, locate
from san_llm.progress import bar
from san_llm.recipe import Recipe
from san_llm.record import manifest, whole_folder, write_json, write_text
from san_llm.san.graph import check_family
from san_llm.shards import DTYPES, Numbers, Output, read_checkpoint, read_rows, write_checkpoint
from san_llm.streamed import Folded
from san_llm.subject import Subject

if TYPE_CHECKING:
    from san_llm.verify import VerifyResult

SHARD_SIZE = 5 * 10**9  # bytes; as transformers' files had for years
LARGEST = {"float32": 3.4028235e38, "bfloat16": 3.3895314e38, "float16": 65504.0}
COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("*.model", "chat_template*", "generation_config.json", "LICENSE*", "NOTICE*"),
)


@dataclass(frozen=True)
class MergeResult:
    """What a merge made.

    Attributes:
        output: The checkpoint's folder.
        base: The full-precision base that was used.
        adapter: The adapter.
        dtype: Of the merged weights.
        parameters: Numbers in the merged model.
        trained_over: How the base was quantized in training, or None.
        verified: How it compares with base + adapter, or None if that was not asked.
    """

    output: str
    base: str
    adapter: str
    dtype: str
    parameters: int
    trained_over: str | None
    verified: VerifyResult | None = None


def merge(
    subject: Subject,
    output: Path,
    dtype: str | None = None,
    overwrite: bool = False,
    verified: bool = False,
    shard_size: int = SHARD_SIZE,
) -> MergeResult:
    """Merge an adapter into its full-precision base and save a stock checkpoint.

    Args:
        subject: An adapter, of any method that PEFT can merge, and its base, whose quantization
            is ignored.
        output: The folder to make.
        dtype: ``float32``, ``bfloat16`` or ``float16``; default: the one the base is stored in.
        overwrite: Replace what is in ``output``.
        verified: Compare with base + adapter before the folder gets its name.
        shard_size: Bytes that one file of weights may hold.

    Raises:
        InputError: when the adapter or base cannot be read, do not fit, or files are in the way.
        SanError: when merged numbers are not finite.
    """
    base, adapter = subject.base, subject.adapter
    if adapter is None:
        raise InputError("there is no adapter to merge")
    options = read_json(adapter / "adapter_config.json")
    if not (adapter / "adapter_model.safetensors").is_file():
        raise InputError(f"{adapter}: not an adapter: no adapter_model.safetensors in it")
    method = str(options.get("peft_type"))
    source = base_folder(base)
    config = read_json(source / "config.json")
    check_family(config.get("model_type"))
    if config.get("quantization_config"):
        raise InputError(
            f"{base.model}: a quantized checkpoint has no full-precision weights; name the model "
            "that it was made from"
        )
    if "auto_map" in config:
        raise InputError(f"{base.model}: its config needs code of its own: not a stock model")
    stored = config.get("dtype") or config.get("torch_dtype") or "float32"
    target = dtype or stored
    if target not in DTYPES:
        raise InputError(f"{base.model}: is stored as {target}; say which --dtype to save")
    result = MergeResult(
        output=str(output),
        base=base.model,
        adapter=str(adapter),
        dtype=target,
        parameters=0,
        trained_over=subject.recipe.base.quantization if subject.recipe else None,
    )
    with whole_folder(output, overwrite) as folder:
        if method == "SAN":
            folded = Folded(source, config, adapter, options)
            outputs = [_in_range(output, target) for output in folded.outputs(DTYPES[target])]
            with bar("Merging", sum(output.size for output in outputs), "bytes") as progress:
                sums = write_checkpoint(folder, outputs, shard_size, progress.advance)
            write_json(folder / "config.json", folded.merged_config(target))
        else:
            # PEFT's own methods fold in the model itself.
            from san_llm.peft_merge import merge_in_memory

            try:
                sums = merge_in_memory(base, adapter, folder, target, shard_size)
            except SanError:
                raise
            except ValueError as error:  # PEFT's word for numbers that are not finite
                first = (str(error).splitlines() or [type(error).__name__])[0]
                raise SanError(f"{adapter}: cannot be merged: {first}") from error
            for tensor in read_checkpoint(folder):
                _check_range(tensor.name, target, read_rows(tensor))
        parameters = sum(math.prod(tensor.shape) for tensor in read_checkpoint(folder))
        result = replace(result, parameters=parameters)
        _copy_companions(source, folder)
        write_text(folder / "README.md", model_card(result, subject.recipe, method))
        facts = manifest(
            base=base.model,
            sha256={
                "base config": sha256_of(source / "config.json"),
                "adapter": sha256_of(adapter / "adapter_model.safetensors"),
                **sums,
            },
        )
        write_json(folder / "merge_manifest.json", facts)
        if verified:
            from san_llm.verify import verify

            result = replace(result, verified=verify(folder, adapter, base, target))
    return result


def _in_range(output: Output, dtype: str) -> Output:
    """Return the output with its computed rows watched, see :func:`_check_range`."""
    rows = output.rows
    if rows is None:
        return output

    def watched(first: int, last: int) -> Numbers:
        with np.errstate(over="ignore", invalid="ignore"):  # told below, by name
            block = rows(first, last)
        _check_range(output.name, dtype, block)
        return block

    return replace(output, rows=watched)


def _check_range(name: str, dtype: str, numbers: Numbers) -> None:
    """Refuse numbers that would be stored as an infinity; a NaN is in no range."""
    if not (np.abs(numbers) <= LARGEST[dtype]).all():
        raise SanError(f"{name}: merged, it has numbers that {dtype} cannot hold")


def _copy_companions(source: Path, folder: Path) -> None:
    """Copy the tokenizer, its chat template, the generation config and the licence."""
    for pattern in COMPANIONS:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: when the file is missing, not JSON or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not valid JSON") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value


def model_card(result: MergeResult, recipe: Recipe | None, method: str) -> str:
    """Return the README of a merged checkpoint."""
    base_card = result.base if "/" in result.base and not Path(result.base).exists() else None
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    head += [f"base_model: {base_card}"] if base_card else []
    head += ["tags:", "- san-llm", f"- {method.lower()}", "---"]
    lines = [
        *head,
        "",
        f"# {Path(result.base).name} tuned with {method}",
        "",
        f"[{result.base}]({_link(result.base)}) with a {method} adapter merged into its weights "
        f"by san-llm {__version__}. It is a stock checkpoint: `transformers` loads it as it is.",
        "",
        f"- Parameters: {result.parameters:,}, stored as {result.dtype}.",
        f"- Adapter: sha256 `{sha256_of(Path(result.adapter) / 'adapter_model.safetensors')}`.",
    ]
    if result.trained_over:
        lines.append(
            f"- The adapter was trained over the base in {result.trained_over}, and merged into "
            "the full-precision base: outputs differ from those seen in training by the base's "
            "quantization error."
        )
    if recipe is not None:
        data = (
            recipe.data.train
            if isinstance(recipe.data.train, str)
            else ", ".join(recipe.data.train)
        )
        lines += [
            f"- Data: {data}; prompt style `{recipe.data.prompt}`.",
            "",
            "The recipe:",
            "",
            "```yaml",
            recipe.to_yaml().rstrip(),
            "```",
        ]
    return "\n".join(lines) + "\n"


def _link(base: str) -> str:
    return base if Path(base).exists() else f"https://huggingface.co/{base}"


def full_precision_note(result: MergeResult) -> str | None:
    """Return what a merge after quantized training changes, or None where it changes nothing."""
    if result.trained_over is None:
        return None
    return (
        f"trained over a {result.trained_over} base, merged into the full-precision "
        f"{locate(result.base)}: outputs differ from training's by the base's quantization error"
    )
