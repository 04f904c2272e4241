"""An adapter and its base become one stock checkpoint: complete, or absent.

The adapter is folded into the base's full-precision weights in fp32, and every weight is rounded
once to the dtype asked for. A SAN adapter is streamed from file to file (``streamed``) without
torch; the methods of PEFT go through a model in memory (``peft_merge``), and so do merges over the
base as it was quantized in training (``merge_4bit``).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from san_llm import __version__
from san_llm.adapter_card import asking_section, hub_id, recipe_section, trained_on
from san_llm.data.rows import sha256_of
from san_llm.errors import InputError, SanError, first_line
from san_llm.gguf_export import check_exportable, export_gguf
from san_llm.locate import base_folder, locate, stored_bits, trained_bits
from san_llm.progress import bar
from san_llm.push import check_push, push
from san_llm.recipe import Base, Recipe
from san_llm.record import manifest, read_json, refuse_link, whole_folder, write_json, write_text
from san_llm.san.graph import check_family
from san_llm.shards import DTYPES, Numbers, Output, read_checkpoint, read_rows, write_checkpoint
from san_llm.streamed import Folded
from san_llm.subject import MERGE_MANIFEST, Subject

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
        base: The base that was used.
        adapter: The adapter.
        dtype: Of the merged weights.
        parameters: Numbers in the merged model.
        trained_over: How the base was quantized in training, or None.
        quantized: How its quantization was merged over, ``dequantize`` or ``keep``; None: the base
            is the full-precision one.
        gguf: The ``.gguf`` file that was written too, or None.
        pushed: Where it is on the hub, or None.
        verified: How it compares with base + adapter, or None if that was not asked.
    """

    output: str
    base: str
    adapter: str
    dtype: str
    parameters: int
    trained_over: str | None
    quantized: str | None = None
    gguf: str | None = None
    pushed: str | None = None
    verified: VerifyResult | None = None


def merge(
    subject: Subject,
    output: Path,
    dtype: str | None = None,
    overwrite: bool = False,
    verified: bool = False,
    shard_size: int = SHARD_SIZE,
    quantized: str | None = None,
    gguf: str | None = None,
    push_to: str | None = None,
    private: bool = False,
) -> MergeResult:
    """Merge an adapter into its base and save a stock checkpoint.

    Args:
        subject: An adapter, of any method that PEFT can merge, and its base.
        output: The folder to make.
        dtype: ``float32``, ``bfloat16`` or ``float16``; default: the one the base is stored in,
            bfloat16 for a dequantized one. Of a model in 4 bits, what is not.
        overwrite: Replace what is in ``output``.
        verified: Compare with base + adapter before the folder gets its name.
        shard_size: Bytes that one file of weights may hold.
        quantized: None merges into the full-precision base. ``dequantize`` merges into the numbers
            that the base had when it was quantized in training, ``keep`` leaves those in 4 bits.
        gguf: Write ``model.gguf`` beside the checkpoint, as ``f16``, ``bf16`` or ``q8_0``.
        push_to: The hub id to upload the folder to, when it is whole.
        private: Whether a repository that is made for it is seen by its owner alone.

    Raises:
        InputError: when the adapter or base cannot be read, do not fit, or files are in the way.
        SanError: when merged numbers are not finite, or the hub does not take the folder, which
            stays then.
    """
    base, adapter = subject.base, subject.adapter
    if adapter is None:
        raise InputError("there is no adapter to merge")
    if push_to is not None:
        check_push(push_to)
    options = read_json(adapter / "adapter_config.json")
    if not (adapter / "adapter_model.safetensors").is_file():
        raise InputError(f"{adapter}: not an adapter: no adapter_model.safetensors in it")
    method = str(options.get("peft_type"))
    if quantized == "keep" and method != "SAN":
        raise InputError(
            f"{adapter}: a {method} adapter changes weights within their 4-bit blocks; only SAN's "
            "scales can keep them: use --quantized dequantize"
        )
    source = base_folder(base)
    config = read_json(source / "config.json")
    check_family(config.get("model_type"))
    if "auto_map" in config:
        raise InputError(f"{base.model}: its config needs code of its own: not a stock model")
    stored = stored_bits(base.model, config)
    trained = subject.recipe.base if subject.recipe else base
    trained_over = stored or trained_bits(trained)
    if quantized is not None:
        base = _as_trained(base, trained, stored)
        if quantized == "keep" and trained_over == "8bit":
            raise InputError(
                f"{base.model}: only weights in 4 bits can be kept, these are in 8: use "
                "--quantized dequantize"
            )
    elif stored:
        raise InputError(
            f"{base.model}: a quantized checkpoint has no full-precision weights; name the model "
            "that it was made from, or say how to merge over this one: --quantized dequantize or "
            "--quantized keep"
        )
    if gguf is not None:
        if quantized == "keep":
            raise InputError("--gguf: 4-bit weights of bitsandbytes are not written; dequantize")
        check_exportable(source, config)
        if options.get("shift"):
            raise InputError("--gguf: a shift merges into biases, which readers pass over")
    own = config.get("dtype") or config.get("torch_dtype") or "float32"
    if quantized == "keep" and base.quantization is not None:
        own = base.dtype  # its codes are those of weights in this dtype
    target = dtype or ("bfloat16" if quantized == "dequantize" else own)
    if target not in DTYPES:
        raise InputError(f"{base.model}: is stored as {target}; say which --dtype to save")
    result = MergeResult(
        output=str(output),
        base=base.model,
        adapter=str(adapter),
        dtype=target,
        parameters=0,
        trained_over=trained_over,
        quantized=quantized,
    )
    with whole_folder(output, overwrite) as folder:
        if quantized is not None:
            from san_llm.merge_4bit import merge_quantized

            with _in_one_line(adapter):
                sums, parameters = merge_quantized(
                    quantized, base, adapter, folder, target, shard_size
                )
            _check_files(folder)
        elif method == "SAN":
            folded = Folded(source, config, adapter, options)
            outputs = [_in_range(output, target) for output in folded.outputs(DTYPES[target])]
            with bar("Merging", sum(output.size for output in outputs), "bytes") as progress:
                sums = write_checkpoint(folder, outputs, shard_size, progress.advance)
            write_json(folder / "config.json", folded.merged_config(target))
        else:
            # PEFT's own methods fold in the model itself.
            from san_llm.peft_merge import merge_in_memory

            with _in_one_line(adapter):
                sums = merge_in_memory(base, adapter, folder, target, shard_size)
            _check_files(folder)
        if quantized is None:
            parameters = sum(math.prod(tensor.shape) for tensor in read_checkpoint(folder))
        result = replace(result, parameters=parameters)
        _copy_companions(source, folder)
        if gguf is not None:
            file = export_gguf(folder, gguf)
            result = replace(result, gguf=str(output / file.name))
            sums[file.name] = sha256_of(file)
        write_text(folder / "README.md", model_card(result, subject.recipe, method))
        facts = manifest(
            base=base.model,
            prompt=subject.recipe.data.prompt if subject.recipe else None,
            sha256={
                "base config": sha256_of(source / "config.json"),
                "adapter": sha256_of(adapter / "adapter_model.safetensors"),
                **sums,
            },
        )
        write_json(folder / MERGE_MANIFEST, facts)
        if verified:
            from san_llm.verify import verify

            other = None if quantized or not trained_over else trained
            if other is not None and other.quantization is not None:
                other = _as_trained(base, other, None)
            check = verify(folder, adapter, base, target, quantized, other)
            result = replace(result, verified=check)
    if push_to is not None:
        result = replace(result, pushed=push(output, push_to, private))
    return result


def _as_trained(base: Base, trained: Base, stored: str | None) -> Base:
    """Return the base with the quantization that an adapter was trained over.

    Args:
        base: The base to merge into.
        trained: The one in the recipe of the adapter's run.
        stored: The bits that ``base`` is stored in, or None.

    Raises:
        InputError: when nothing says that there was one.
    """
    if stored is not None:
        return base.model_copy(update={"quantization": None})
    if trained.quantization is None:
        raise InputError(
            f"{base.model}: not quantized, and the adapter's run did not quantize it: merge "
            "without --quantized, or name the quantized base with --model"
        )
    return trained.model_copy(update={"model": base.model, "revision": base.revision})


@contextmanager
def _in_one_line(adapter: Path) -> Iterator[None]:
    try:
        yield
    except SanError:
        raise
    except ValueError as error:  # PEFT's word for numbers that are not finite
        first = first_line(error)
        raise SanError(f"{adapter}: cannot be merged: {first}") from error


def _check_files(folder: Path) -> None:
    """Refuse a checkpoint that was written with infinities."""
    names = {stored: name for name, stored in DTYPES.items()}
    for tensor in read_checkpoint(folder):
        if tensor.dtype in names:  # codes of fewer bits are all in range
            _check_range(tensor.name, names[tensor.dtype], read_rows(tensor))


def _in_range(output: Output, dtype: str) -> Output:
    """Return the output with its computed rows watched, see :func:`_check_range`."""
    fold = output.fold
    if fold is None and output.source is not None and output.source.dtype == output.dtype:
        return output

    def watched(rows: Numbers, first: int, last: int) -> Numbers:
        if fold is not None:
            with np.errstate(over="ignore", invalid="ignore"):  # told below, by name
                rows = fold(rows, first, last)
        _check_range(output.name, dtype, rows)
        return rows

    return replace(output, fold=watched)


def _check_range(name: str, dtype: str, numbers: Numbers) -> None:
    """Refuse numbers that would be stored as an infinity; a NaN is in no range."""
    largest = LARGEST[dtype]
    if numbers.size and not (numbers.max() <= largest and numbers.min() >= -largest):
        raise SanError(f"{name}: merged, it has numbers that {dtype} cannot hold")


def _copy_companions(source: Path, folder: Path) -> None:
    """Copy the tokenizer, its chat template, the generation config and the licence."""
    for pattern in COMPANIONS:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and not (folder / file.name).exists():
                refuse_link(file)
                shutil.copyfile(file, folder / file.name)


LOAD = [  # a merged checkpoint, in the words of its card
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "",
    'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")',
    'tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")',
]


def model_card(result: MergeResult, recipe: Recipe | None, method: str) -> str:
    """Return the README of a merged checkpoint."""
    name = Path(result.base).name
    base_card = hub_id(result.base)
    base = f"[{base_card}](https://huggingface.co/{base_card})" if base_card else name
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    head += [f"base_model: {base_card}"] if base_card else []
    head += ["tags:", "- san-llm", f"- {method.lower()}", "---"]
    lines = [
        *head,
        "",
        f"# {name} tuned with {method}",
        "",
        f"{base} with a {method} adapter merged into its weights "
        f"by san-llm {__version__}. It is a stock checkpoint: `transformers` loads it as it is.",
        "",
        f"- Parameters: {result.parameters:,}, stored as {stored_as(result)}.",
        f"- Adapter: sha256 `{sha256_of(Path(result.adapter) / 'adapter_model.safetensors')}`.",
    ]
    if result.quantized:
        lines.append(
            f"- The adapter was trained over the base in {result.trained_over}, and merged into "
            "those weights: outputs are those seen in training"
            f"{', but for the rounding of activations' if result.trained_over == '8bit' else ''}."
        )
    elif result.trained_over:
        lines.append(
            f"- The adapter was trained over the base in {result.trained_over}, and merged into "
            "the full-precision base: outputs differ from those seen in training by the base's "
            "quantization error."
        )
    if recipe is not None:
        lines += [
            f"- Data: {trained_on(recipe)}; prompt style `{recipe.data.prompt}`.",
            "",
            *asking_section(recipe.data.prompt, LOAD),
            "",
            *recipe_section(recipe),
        ]
    return "\n".join(lines) + "\n"


def stored_as(result: MergeResult) -> str:
    """Return how the weights are stored, in words."""
    return f"4 bits and {result.dtype}" if result.quantized == "keep" else result.dtype


def full_precision_note(result: MergeResult) -> str | None:
    """Return what a merge after quantized training changes, or None where it changes nothing."""
    if result.trained_over is None or result.quantized is not None:
        return None
    return (
        f"trained over a {result.trained_over} base, merged into the full-precision "
        f"{locate(result.base)}: outputs differ from training's by the base's quantization error"
    )
