"""The merged model against base + adapter: the same weights and logits, or an error.

The weights are compared with the method's formula (``merge.expected``), the answers with those of
base + adapter: there the merged model is loaded by stock transformers in a fresh process that never
imports this package. Both sides compute in fp32, so that what is left is the rounding of the merged
weights; what that does is measured on a model merged in memory, and the one in the folder must
be that model.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from san_llm.architectures.lookup import is_known
from san_llm.errors import SanError
from san_llm.files import read_json
from san_llm.measure.in_files import UntranslatedError
from san_llm.merge.expected import BaseRows, check_errors, stored_rows, weight_errors
from san_llm.merge.frame import FILE, Taught, check_frame, taught
from san_llm.merge.peft import fold
from san_llm.merge.quantized import keep
from san_llm.merge.request import MergeTask, as_trained
from san_llm.merge.stock_logits import blocks, in_fp32, in_fp32_by_block, logits, place_in_fp32
from san_llm.models.adapter import base_parameters, load_adapter
from san_llm.models.load import load_base, numbers_in
from san_llm.models.locate import find_base
from san_llm.models.quantize import dequantize
from san_llm.models.scales import files_of
from san_llm.models.tokenizer import load_tokenizer
from san_llm.models.weights import DTYPES, SPELLED, read_weights
from san_llm.progress import bar
from san_llm.recipe.schema import Base
from san_llm.runs.record import VerifyResult
from san_llm.san.layer import SanLayer
from san_llm.san.model import SanModel

PROMPTS = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\nName three things that float on water.\n\n### Response:\n",
    "The capital of France is",
    "def add(a, b):\n    return",
    "1, 2, 3, 4,",
)

# What the merged model may be away from the one whose weights were merged and rounded in memory, in
# units of the logits' standard deviation: fp32 sums in another order, and a share of what rounding
# does, for the few weights that such a sum puts on the other side of a rounding. How far rounding
# itself moves logits differs from model to model, so it is measured, and no bound is guessed.
ARITHMETIC, ROUNDING_SHARE = 1e-3, 0.1


def verify(merged: Path, task: MergeTask) -> VerifyResult:
    """Return how a merged model compares with base + adapter.

    Args:
        merged: The merged model's folder.
        task: The merge that made it.

    Raises:
        SanError: when it does not load in stock transformers, or differs by more than rounding.
    """
    found, adapter = task.found, task.adapter.folder
    dtype, quantized = task.dtype, task.request.quantized
    with bar("Verifying", 4, "parts") as progress:
        tokenizer = load_tokenizer(found, adapter)
        tokens = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
        # In a process that has ended before the other model is loaded: there is one at a time.
        known = is_known(found.config.get("model_type"))
        recipe = task.request.subject.recipe
        row = taught(recipe, task.found) if recipe is not None else "no run says what was learned"
        got, new, written = _stock_answers(merged, tokens, row, by_block=known)
        progress.advance(note="merged model computed")
        place = place_in_fp32(numbers_in(found))
        held = _held_in(found.folder, place) if _only_scales(task) else "float32"
        if quantized is None:
            model: Any = load_base(found, dtype=getattr(torch, held), place=place)
        else:
            model = dequantize(load_base(found, place=place))
        adapted: Any = load_adapter(model, adapter)
        if held != "float32":
            in_fp32_by_block(model)
        wanted = _logits(adapted, tokens)
        with adapted.disable_adapter():
            plain = _logits(adapted, tokens)
        same_greedy = sum(map(partial(_shared, adapted), tokens, new)) / sum(map(len, new))
        progress.advance(note="base + adapter computed")
        errors = _weight_errors(adapted, task, merged)
        progress.advance(note="weights compared")
        # The same merge in memory, before and after its weights are rounded.
        if held != "float32":
            exact = _merged_by_block(adapted, torch.float32, tokens)
            rounded = _merged_by_block(adapted, getattr(torch, dtype), tokens)
        else:
            if quantized == "keep":
                del adapted, model
                in_memory = keep(load_adapter(load_base(found), adapter))
                in_fp32(in_memory)
            else:
                in_memory = fold(adapted, adapter)
            exact = _logits(in_memory, tokens)
            whole = _rounded(in_memory, getattr(torch, dtype), _kept(task, merged))
            rounded = _logits(whole, tokens)
        difference = _largest(got, wanted)
        spread = torch.cat(wanted).std().item()
        explained = _largest(rounded, exact) / spread
        unexplained = _worse(_largest(got, rounded), _largest(exact, wanted)) / spread
        allowed = ARITHMETIC + ROUNDING_SHARE * explained
        result = VerifyResult(
            largest_difference=difference,
            relative=difference / spread,
            bound=explained + allowed,
            adapter_moved=_largest(wanted, plain),
            same_top_word=torch.cat(
                [(a.argmax(-1) == b.argmax(-1)).float() for a, b in zip(got, wanted, strict=True)]
            )
            .mean()
            .item(),
            same_greedy=same_greedy,
            quantization_moved=None if task.trained is None else _moved(task, got, tokens),
            weight_errors=errors,
            frame=_frame(merged, row, written, tokenizer),
        )
        progress.advance(note="compared")
    # A NaN is above no bound: ask for what must be true, not for what must not.
    if not unexplained <= allowed:
        raise SanError(
            f"{merged}: differs from base + adapter by {difference:.3g}, that is "
            f"{result.relative:.3g} of the logits' spread; rounding to {dtype} explains "
            f"{explained:.3g}, and {unexplained:.3g} is unexplained where {allowed:.3g} is allowed"
        )
    if errors is not None:
        check_errors(merged, errors, dtype)
    return result


def _frame(
    merged: Path, row: Taught | str, written: Mapping[str, list[int]], tokenizer: Any
) -> str:
    """Return what the exported chat templates were held to, in words."""
    if isinstance(row, str):
        return f"not compared: {row}"
    for file, tokens in written.items():
        count = check_frame(file, row, tokens, tokenizer)
    return f"{' and '.join(written)}: the {count:,} tokens of {row.where}, as they were learned"


def _weight_errors(adapted: Any, task: MergeTask, merged: Path) -> dict[str, float] | None:
    quantized, adapter = task.request.quantized, task.adapter
    if adapter.method != "SAN" or quantized == "keep" or (quantized and adapter.measured):
        return None
    rows = _rows_in_memory(adapted) if quantized else stored_rows(task.found.folder)
    try:
        return weight_errors(rows, task.found.config, adapter, merged, task.dtype)
    except UntranslatedError:  # merged in memory
        return None


def _kept(task: MergeTask, merged: Path) -> dict[str, torch.dtype]:
    """Return the dtypes of parameters that a merge from file to file leaves in their own."""
    if task.request.quantized is not None or not task.adapter.measured:
        return {}
    stored = {tensor.name: tensor for tensor in read_weights(merged)}
    try:
        files = files_of(task.adapter, read_json(merged / "config.json"), stored.values())
    except UntranslatedError:  # merged in memory
        return {}
    return {
        name: getattr(torch, SPELLED[stored[tensor].dtype])
        for tensor, piece in files.pieces.items()
        for name in piece.parameters
        if stored[tensor].dtype in SPELLED
    }


def _rows_in_memory(adapted: Any) -> BaseRows:
    weights = base_parameters(adapted)

    def rows(name: str, first: int, last: int) -> Any:
        return weights[name][first:last].detach().cpu().numpy() if name in weights else None

    return rows


def _moved(task: MergeTask, got: list[torch.Tensor], tokens: list[list[int]]) -> float:
    """Return how far a merged model's logits are from the model that was trained."""
    trained = task.trained or task.found.base
    if trained.quantization is not None:
        found = as_trained(task.found, trained)
    else:  # stored quantized, elsewhere
        found = find_base(trained)
    model = load_adapter(load_base(found), task.adapter.folder)
    in_fp32(model)
    return _largest(got, _logits(model, tokens))


def _rounded(model: Any, dtype: torch.dtype, kept: Mapping[str, torch.dtype] | None = None) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if getattr(parameter, "quant_state", None) is None:
                parameter.copy_(parameter.to((kept or {}).get(name, dtype)))
    return model


def _held_in(folder: Path, place: torch.device) -> str:
    """Return the dtype to hold a model in that computes in fp32: on a CPU the one of its files."""
    stored = {tensor.dtype for tensor in read_weights(folder)}
    names = (name for name, code in DTYPES.items() if place.type == "cpu" and stored == {code})
    return next(names, "float32")


def _only_scales(task: MergeTask) -> bool:
    """Return whether a merge is of scales and shifts: low ranks read the weights of other blocks.

    Whole modules are in fp32, which a base in 16 bits would round.
    """
    parts = {name.rpartition(".")[2] for name in task.adapter.tensors}
    known = task.request.quantized is None and not task.adapter.measured
    return known and parts <= {"san_gamma", "san_beta"}


def _merged_by_block(
    adapted: Any, dtype: torch.dtype, tokens: list[list[int]]
) -> list[torch.Tensor]:
    """Return the logits of a merge in memory, rounded to a dtype, of one block at a time."""

    def merge(block: Any, _: object) -> None:
        for layer in _adapted_layers(block):
            layer.merge()
        for name, parameter in block.named_parameters():
            if SanModel.prefix not in name:
                # Not in place: a bias that was merged into nothing is the shift itself.
                parameter.data = parameter.data.to(dtype).float()

    def unmerge(block: Any, *_: object) -> None:
        for layer in _adapted_layers(block):
            layer.unmerge()

    hooks: list[Any] = []
    for block in blocks(adapted.get_base_model()):
        hooks.append(block.register_forward_pre_hook(merge))
        hooks.append(block.register_forward_hook(unmerge, prepend=True))
    merged = _logits(adapted, tokens)
    for hook in hooks:
        hook.remove()
    return merged


def _adapted_layers(block: Any) -> list[SanLayer]:
    return [module for module in block.modules() if isinstance(module, SanLayer)]


def _logits(model: Any, tokens: list[list[int]]) -> list[torch.Tensor]:
    return [logits(model, ids) for ids in tokens]


def _largest(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    # Not Python's max(): a NaN is to be kept, not passed over.
    return torch.stack([(x - y).abs().max() for x, y in zip(a, b, strict=True)]).max().item()


def _worse(a: float, b: float) -> float:
    """Return the larger, or a NaN where one is: max() would pass over it."""
    return a if a != a or a > b else b


def _shared(model: Any, prompt: list[int], new: list[int]) -> int:
    """Return how many words of a greedy text this model would begin its own with."""
    # Up to the first difference both have read the same: one forward shows all its choices.
    own = logits(model, prompt + new)[len(prompt) - 1 : -1].argmax(-1).tolist()
    return next((i for i, (x, y) in enumerate(zip(own, new, strict=True)) if x != y), len(new))


def _stock_answers(
    merged: Path, tokens: list[list[int]], row: Taught | str, by_block: bool = True
) -> tuple[list[torch.Tensor], list[list[int]], dict[str, list[int]]]:
    """Return what a process of its own makes of a merged model.

    Args:
        merged: The merged model's folder.
        tokens: Of each prompt.
        row: What the chat templates in it write; words: nothing.
        by_block: Hold 16-bit weights as they are, and widen a block while it computes.

    Returns:
        The logits of each prompt, the words after it, and the row's tokens in the template of each
        file that has one.
    """
    from safetensors.torch import load_file

    script, conversation = Path(__file__).with_name("stock_logits.py"), None
    if isinstance(row, Taught):
        conversation = {
            "files": [FILE, *(file.name for file in merged.glob("*.gguf"))],
            "turns": row.turns,
            "tools": json.loads(row.tools) if row.tools else None,
        }
    with tempfile.TemporaryDirectory() as temporary:
        asked, out = Path(temporary) / "asked.json", Path(temporary) / "answers.safetensors"
        asked.write_text(json.dumps({"prompts": tokens, "conversation": conversation}), "utf-8")
        # -P keeps the script's folder, which is this package, out of the import path.
        device = place_in_fp32(numbers_in(find_base(Base(model=str(merged), dtype="float32"))))
        command = [sys.executable, "-P", str(script), str(merged), str(asked), str(out)]
        command += [str(device), _held_in(merged, device) if by_block else "float32"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise SanError(f"{merged}: stock transformers cannot load it: {last}")
        tensors = load_file(out)
    numbers, prefix = range(len(tokens)), "written."
    written = {
        name.removeprefix(prefix): tensor.tolist()
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    new = [tensors[f"new.{number}"].tolist() for number in numbers]
    return [tensors[str(number)] for number in numbers], new, written
