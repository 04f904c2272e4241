"""What saving a checkpoint costs, as a part of the five minutes that lie between two.

    python benchmarks/checkpoint.py

Writes what a SAN run on LLaMA-7B writes: 1,359,872 scales, AdamW's two moments, and the log of
31,000 steps, sealed and flushed to the disk as `san-llm train` does.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import TrainerState

from san_llm.train.checkpoint import remove_old, whole_checkpoint

SCALES, TENSORS, STEPS, TIMES, MINUTES = 1_359_872, 224, 31_000, 9, 5


def main() -> None:
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.ones(SCALES // TENSORS)) for _ in range(TENSORS)]
    optimizer = torch.optim.AdamW(weights)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    numbers = {"loss": 0.123456789, "grad_norm": 0.98765, "learning_rate": 1e-4, "epoch": 0.5}
    state = TrainerState(log_history=[numbers | {"step": step} for step in range(STEPS)])
    seconds = []
    with tempfile.TemporaryDirectory(prefix="san-llm-checkpoint-", dir=".") as name:
        folder = Path(name)
        for step in range(1, TIMES + 1):
            began = time.perf_counter()
            with whole_checkpoint(folder, step, None, True, lambda: None) as temporary:
                save_file(
                    {str(number): weight.data for number, weight in enumerate(weights)},
                    temporary / "adapter_model.safetensors",
                )
                torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
                state.save_to_json(str(temporary / "trainer_state.json"))
            remove_old(folder, keep=2)
            seconds.append(time.perf_counter() - began)
        size = sum(path.stat().st_size for path in (folder / f"checkpoint-{TIMES}").iterdir())
    middle = statistics.median(seconds)
    print(
        json.dumps(
            {
                "seconds": round(middle, 3),
                "slowest": round(max(seconds), 3),
                "MB": round(size / 1e6, 1),
                "percent of the time": round(100 * middle / (MINUTES * 60), 3),
            }
        )
    )


if __name__ == "__main__":
    main()
