"""An adapter and its base become one stock checkpoint: complete, or absent.

The base is loaded in full precision, the adapter is folded into its weights in fp32, and every
weight is rounded once to the dtype asked for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from san_llm import __version__
from san_llm.data.rows import sha256_of
from san_llm.errors import InputError
from san_llm.model import load_adapter, load_base, load_config, load_tokenizer, locate
from san_llm.progress import bar
from san_llm.quantize import refuse_quantized
from san_llm.recipe import Recipe
from san_llm.record import whole_folder, write_text
from san_llm.subject import Subject
from san_llm.verify import VerifyResult, verify

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


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
) -> MergeResult:
    """Merge an adapter into its full-precision base and save a stock checkpoint.

    Args:
        subject: An adapter, of any method that PEFT can merge, and its base, whose quantization
            is ignored.
        output: The folder to make.
        dtype: ``float32``, ``bfloat16`` or ``float16``; default: the one the base is stored in.
        overwrite: Replace what is in ``output``.
        verified: Compare with base + adapter before the folder gets its name.

    Raises:
        InputError: when the adapter or base cannot be read, do not fit, or files are in the way.
        SanError: when merged numbers are not finite.
    """
    base, adapter = subject.base, subject.adapter
    if adapter is None:
        raise InputError("there is no adapter to merge")
    config = load_config(base)
    refuse_quantized(config, base.model)
    stored = config.dtype or torch.float32
    target = getattr(torch, dtype) if dtype else stored
    method = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"]
    # SAN's layers fold in fp32 and round once themselves, so the base may be loaded as it will be
    # saved, at half the memory. PEFT's own methods round twice in half precision.
    working = target if method == "SAN" and target == stored else torch.float32
    with bar("Merging", 4, "parts") as progress, whole_folder(output, overwrite) as folder:
        model = load_base(base, dtype=working)
        tokenizer = load_tokenizer(base)
        progress.advance(note="base loaded")
        adapted = load_adapter(model, adapter)
        progress.advance(note="adapter loaded")
        merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
        if working != target:
            merged = merged.to(target)
        merged.config.dtype = target
        progress.advance(note="folded")
        result = MergeResult(
            output=str(output),
            base=base.model,
            adapter=str(adapter),
            dtype=str(target).removeprefix("torch."),
            parameters=sum(p.numel() for p in merged.parameters()),
            trained_over=subject.recipe.base.quantization if subject.recipe else None,
        )
        _save(merged, tokenizer, folder)
        write_text(folder / "README.md", model_card(result, subject.recipe, method))
        progress.advance(note="written")
        if verified:
            del model, adapted, merged  # one model in memory at a time
            result = replace(result, verified=verify(folder, adapter, base, result.dtype))
    return result


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Stock transformers must be able to load it, and nothing of PEFT's may be left in the files.
    saved: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "auto_map" in saved or "quantization_config" in saved:
        raise InputError(f"the base's config needs code or a quantizer of its own: {sorted(saved)}")


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
