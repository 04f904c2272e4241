"""Write ``docs/scale.md``: memory and traffic of large bases, by the estimator of `san-llm plan`.

``tests/plan/test_run.py`` holds the page to what the estimator says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from san_llm.architectures.sizes import shape_of
from san_llm.plan.bases import KNOWN
from san_llm.plan.memory import Setting, full_batch, memory, traffic, trained_numbers
from san_llm.recipe.schema import LoraMethod, Method, SanMethod

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scale.md"
MADE = "<!-- Made by scripts/make_scale.py from the estimator: change these instead. -->"
ROWS, TOKENS = 8, 256
BASES = {
    "7B": "huggyllama/llama-7b",
    "13B": "huggyllama/llama-13b",
    "70B": "meta-llama/Llama-3.1-70B",
    "405B": "meta-llama/Llama-3.1-405B",
}
METHODS: dict[str, Method | None] = {
    "SAN": SanMethod(name="san"),
    "LoRA r32": LoraMethod(name="lora"),
    "full fine-tuning": None,
}
# How the devices work together: the base's bits, how many devices, and whether they share the base.
ENGINES: dict[str, dict[str, Any]] = {
    "DDP": {"devices": 8},
    "DDP, 4 bits": {"devices": 8, "bits": "4bit", "double_quant": True},
    "FSDP2 on 8": {"devices": 8, "sharded": True},
    "FSDP2 on 64": {"devices": 64, "sharded": True},
}


def setting_of(base: str, method: Method | None, engine: str, checkpointing: bool) -> Setting:
    """Return a step of 8 rows of 256 tokens on each GPU, in bf16."""
    plain = Setting(
        shape=shape_of(KNOWN[BASES[base]]),
        dtype="bfloat16",
        bits=None,
        double_quant=False,
        method=method,
        batch=full_batch(ROWS, TOKENS, packed=True),
        checkpointing=checkpointing,
        device="cuda",
    )
    return replace(plain, **ENGINES[engine])


def scale_page() -> str:
    """Return the page, as Markdown."""
    blocks = [
        MADE,
        "# Large models, computed",
        f"""What a training step takes on each device, as `san-llm plan` tells it: bf16, {ROWS}
packed rows of {TOKENS} tokens on each GPU, all of them learned, nothing shared between rows. No GPU
was measured. The same terms give a CPU's step, and those were held against measured peaks
(`benchmarks/plan.py`). `san-llm plan RECIPE --devices N --sharded` tells yours.""",
    ]
    for base, name in BASES.items():
        blocks += [f"## {base}", _about(base, name), _memory(base)]
    blocks += [
        "## Where it goes",
        "SAN's step, in GB on each device.",
        _parts(),
        "## Traffic",
        f"""Bytes that each device sends in an optimizer step of one micro-batch, and as many that
it receives. Gradients of what is trained go round by an all-reduce: `2 n (N - 1) / N` of n bytes on
N devices (ZeRO, arXiv:1910.02054, section 7.1). FSDP2 also gathers the base, `n (N - 1) / N` each
time: embedding and head once a micro-batch, each block twice, for its forward and its backward pass
(section 7.2); of a frozen base no gradient is scattered. Full fine-tuning scatters its own, once a
step. {_ratio()}""",
        _traffic(),
        "## What it comes from",
        """- **Weights**: 2 bytes a number in bf16. In 4 bits the Linears of the blocks take half a
  byte and 0.127 bits of doubly quantized scales; embedding, head and norms stay in bf16.
- **FSDP2** holds a share of the base, and gathers two blocks (the one at work and the next) and the
  head. SAN's vectors are whole on every device.
- **Gradients and optimizer**: fp32, AdamW's two moments; DDP's buckets double the gradients. Full
  fine-tuning in mixed precision: 16 bytes a number in all (ZeRO, section 3.1).
- **Activations**: what autograd keeps of every block, tensor by tensor; with
  `training.gradient_checkpointing` its input alone, and one block's tensors while it is worked out
  again.
- **Logits**: of a frozen head never more than 2^24 at once; a head that learns keeps all.
- **Cache**: none; a model that trains keeps no keys and values of earlier tokens.
- **Not counted**: what a GPU's allocator cannot use of what it holds.""",
    ]
    return "\n\n".join(blocks) + "\n"


def _about(base: str, name: str) -> str:
    shape = shape_of(KNOWN[name])
    numbers = shape.linear_numbers + shape.other_numbers
    trained = {
        title: sum(trained_numbers(shape, method).values())
        for title, method in METHODS.items()
        if method is not None
    }
    counts = ", ".join(f"{title} trains {count:,}" for title, count in trained.items())
    return f"{name}: {numbers:,} numbers; {counts}. Memory in GB on each device:"


def _memory(base: str) -> str:
    rows = []
    for title, method in METHODS.items():
        for checkpointing in (False, True):
            cells = [
                "" if method is None and "4 bits" in engine else f"{estimate.total / 1e9:,.1f}"
                for engine in ENGINES
                for estimate in [memory(setting_of(base, method, engine, checkpointing))]
            ]
            rows.append([f"{title}, checkpointing" if checkpointing else title, *cells])
    return _table(["", *ENGINES], rows)


def _parts() -> str:
    names = ["weights", "activations", "logits", "work", "runtime"]
    rows = []
    for base in BASES:
        for engine in ENGINES:
            estimate = memory(setting_of(base, METHODS["SAN"], engine, checkpointing=False))
            rest = estimate.adapter + estimate.gradients + estimate.optimizer
            values = [*(getattr(estimate, name) for name in names), rest, estimate.total]
            rows.append([base, engine, *(f"{value / 1e9:,.2f}" for value in values)])
    return _table(["", "", *names, "adapter, gradients, optimizer", "all"], rows, left=2)


def _traffic() -> str:
    rows = []
    for base in BASES:
        for title, method in METHODS.items():
            cells = [
                _bytes(traffic(setting_of(base, method, engine, checkpointing=False)))
                for engine in ("DDP", "FSDP2 on 8", "FSDP2 on 64")
            ]
            rows.append([base, title, *cells])
    return _table(["", "", "DDP on 8, also in 4 bits", "FSDP2 on 8", "FSDP2 on 64"], rows, left=2)


def _ratio() -> str:
    san, full = (
        traffic(setting_of("7B", METHODS[title], "DDP", checkpointing=False))
        for title in ("SAN", "full fine-tuning")
    )
    return f"Under DDP SAN sends {san / full:.2%} of what full fine-tuning does (7B)."


def _bytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    marks = ["---"] * left + ["--:"] * (len(titles) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (titles, marks, *rows))


def main() -> None:
    """Write the page."""
    PAGE.write_text(scale_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
