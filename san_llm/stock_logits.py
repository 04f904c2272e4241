"""Logits of a checkpoint as stock transformers computes them: a script that imports none of ours.

``python -P stock_logits.py CHECKPOINT PROMPTS.json OUT.safetensors``
"""

from __future__ import annotations

import json
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def main(checkpoint: str, prompts: str, out: str) -> None:
    """Write the fp32 logits (tokens, vocabulary) of each prompt, named by its number."""
    model, problems = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if problems.get(kind):
            sys.exit(f"{kind.replace('_', ' ')}: {sorted(map(str, problems[kind]))[:3]}")
    model.eval()
    with open(prompts, encoding="utf-8") as file:
        tokens = json.load(file)
    with torch.no_grad():
        logits = {
            str(number): model(torch.tensor([ids])).logits[0].contiguous()
            for number, ids in enumerate(tokens)
        }
    save_file(logits, out)
    if "san_llm" in sys.modules:
        sys.exit("san_llm was imported: this was not a stock load")


if __name__ == "__main__":
    main(*sys.argv[1:])
