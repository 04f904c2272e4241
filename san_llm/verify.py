"""The merged checkpoint against base + adapter: the same logits, up to rounding, or an error.

The checkpoint is loaded by stock transformers in a fresh process that never imports this package.
Both sides compute in fp32, so that what is left is the rounding of the merged weights; what that
does is measured on a model merged in memory, and the checkpoint must be that model.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from san_llm.errors import SanError
from san_llm.model import load_adapter, load_base, load_tokenizer
from san_llm.progress import bar
from san_llm.recipe import Base

PROMPTS = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\nName three things that float on water.\n\n### Response:\n",
    "The capital of France is",
    "def add(a, b):\n    return",
    "1, 2, 3, 4,",
)

# What the checkpoint may be away from the model whose weights were merged and rounded in memory, in
# units of the logits' standard deviation: fp32 sums in another order, and a share of what rounding
# does, for the few weights that such a sum puts on the other side of a rounding. How far rounding
# itself moves logits differs from model to model, so it is measured, and no bound is guessed.
ARITHMETIC, ROUNDING_SHARE = 1e-3, 0.1


@dataclass(frozen=True)
class VerifyResult:
    """How far the merged model is from base + adapter.

    Attributes:
        largest_difference: Of a logit, over all prompts, tokens and words.
        relative: The same in standard deviations of the logits.
        bound: What ``relative`` may be: what rounding the merged weights explains, and a margin.
        adapter_moved: Largest difference that the adapter made to the base, as a measure.
        same_top_word: Share of positions where both find the same word likeliest.
    """

    largest_difference: float
    relative: float
    bound: float
    adapter_moved: float
    same_top_word: float


def verify(merged: Path, adapter: Path, base: Base, dtype: str) -> VerifyResult:
    """Compare a merged checkpoint with base + adapter.

    Args:
        merged: The checkpoint.
        adapter: The adapter that was merged.
        base: Its full-precision base.
        dtype: The checkpoint's dtype.

    Raises:
        SanError: when it does not load in stock transformers, or differs by more than rounding.
    """
    with bar("Verifying", 3, "parts") as progress:
        tokenizer = load_tokenizer(base)
        tokens = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
        adapted = load_adapter(load_base(base, dtype=torch.float32), adapter)
        wanted = _logits(adapted, tokens)
        with adapted.disable_adapter():
            plain = _logits(adapted, tokens)
        rounded = _logits(_rounded(adapted.merge_and_unload(), getattr(torch, dtype)), tokens)
        del adapted
        progress.advance(note="base + adapter computed")
        got = _stock_logits(merged, tokens)
        progress.advance(note="merged model computed")
        difference = _largest(got, wanted)
        spread = torch.cat(wanted).std().item()
        explained = _largest(rounded, wanted) / spread
        unexplained = _largest(got, rounded) / spread
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
        )
        progress.advance(note="compared")
    # A NaN is above no bound: ask for what must be true, not for what must not.
    if not unexplained <= allowed:
        raise SanError(
            f"{merged}: differs from base + adapter by {difference:.3g}, that is "
            f"{result.relative:.3g} of the logits' spread; rounding to {dtype} explains "
            f"{explained:.3g}, and {unexplained:.3g} is unexplained where {allowed:.3g} is allowed"
        )
    return result


def _rounded(model: Any, dtype: torch.dtype) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    return model


def _logits(model: Any, tokens: list[list[int]]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0].float() for ids in tokens]


def _largest(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def _stock_logits(merged: Path, tokens: list[list[int]]) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    script = Path(__file__).with_name("stock_logits.py")
    with tempfile.TemporaryDirectory() as temporary:
        prompts, out = Path(temporary) / "prompts.json", Path(temporary) / "logits.safetensors"
        prompts.write_text(json.dumps(tokens), encoding="utf-8")
        # -P keeps the script's folder, which is this package, out of the import path.
        command = [sys.executable, "-P", str(script), str(merged), str(prompts), str(out)]
        done = subprocess.run(
            command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise SanError(f"{merged}: stock transformers cannot load it: {last}")
        logits = load_file(out)
        return [logits[str(number)] for number in range(len(tokens))]
