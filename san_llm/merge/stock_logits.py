"""What a model folder answers and writes in stock transformers: a script that imports none of ours.

``python -P stock_logits.py FOLDER ASKED.json OUT.safetensors [DEVICE [DTYPE]]``
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS = 32


def main(folder: str, asked: str, out: str, device: str = "cpu", dtype: str = "float32") -> None:
    """Write the fp32 logits (tokens, vocabulary) of each of the ``prompts``, named by its number.

    Beside them, as ``new.NUMBER``, the likeliest next tokens, and as ``written.FILE`` those of a
    ``conversation`` in the chat template of each file. The weights are held in ``dtype``.
    """
    model, problems = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        use_safetensors=True,
        output_loading_info=True,
        device_map=None if device == "cpu" else {"": device},
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if problems.get(kind):
            sys.exit(f"{kind.replace('_', ' ')}: {sorted(map(str, problems[kind]))[:3]}")
    in_fp32(model) if dtype == "float32" else in_fp32_by_block(model)
    if getattr(model.config, "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")  # as SDPA leaves the scores uncapped
    with open(asked, encoding="utf-8") as file:
        request = json.load(file)
    tokens = request["prompts"]
    tensors = {str(number): logits(model, ids).contiguous() for number, ids in enumerate(tokens)}
    tensors |= {f"new.{n}": torch.tensor(new) for n, new in enumerate(greedy(model, tokens))}
    if request["conversation"] is not None:
        for name, ids in written(folder, **request["conversation"]).items():
            tensors[f"written.{name}"] = torch.tensor(ids)
    save_file(tensors, out)
    if "san_llm" in sys.modules:
        sys.exit("san_llm was imported: this was not a stock load")


def written(
    folder: str, files: list[str], turns: list[dict[str, Any]], tools: list[Any] | None
) -> dict[str, list[int]]:
    """Return the tokens of a conversation in the chat template of each file of a model folder.

    Args:
        folder: With its tokenizer.
        files: ``.gguf`` files, which say theirs in their metadata; any other name is the folder's.
        turns: The conversation.
        tools: Those that may be called.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    templates: dict[str, str | None] = {}
    for file in files:
        templates[file] = None
        if file.endswith(".gguf"):
            from gguf import GGUFReader

            field = GGUFReader(f"{folder}/{file}").fields["tokenizer.chat_template"]
            templates[file] = field.contents()
    return {
        file: tokenizer.apply_chat_template(
            turns, tools=tools, chat_template=template, return_dict=False
        )
        for file, template in templates.items()
    }


def place_in_fp32(numbers: int) -> torch.device:
    """Return where a model of so many numbers is held in fp32: on a GPU with room, else the CPU."""
    if torch.cuda.is_available():
        # Beside the weights: a block's copies, the answers, and the context.
        free, needed = torch.cuda.mem_get_info()[0], 4 * numbers * 1.1 + 2e9
        if needed < free:
            return torch.device("cuda", 0)
    return torch.device("cpu")


def in_fp32(model: Any) -> None:
    """Let a model, in eval mode, compute in fp32; bitsandbytes' 4-bit layers do not by themselves.

    They round weights to the dtype that they were quantized from, and on some CPUs repack them for
    arithmetic in bf16.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and getattr(parameter, "quant_state", None) is None:
            parameter.data = parameter.data.float()
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            state.dtype = module.compute_dtype = torch.float32
            module.support_avx512bf16_for_cpu = False
    model.eval()


def blocks(model: Any) -> list[Any]:
    """Return a model's blocks, and what stands beside them: embedding, last norm, head."""
    inner = model.model
    parts = (*inner.layers, *inner.children(), *model.children())
    return [part for part in parts if part not in (inner, inner.layers)]


def in_fp32_by_block(model: Any) -> None:
    """Let a model of 16-bit weights, on a CPU, compute in fp32 without being held in it.

    A block is copied while it computes. Every number is that of :func:`in_fp32`.
    """
    # Copies are written into again: pages that are new each time cost as much as the arithmetic.
    copies: defaultdict[torch.Size, list[torch.Tensor]] = defaultdict(list)

    def widen(block: Any, _: object) -> None:
        block.narrow = [(p, p.data) for p in block.parameters() if p.dtype != torch.float32]
        for parameter, data in block.narrow:
            spare = copies[data.shape]
            wide = spare.pop() if spare else torch.empty(data.shape, dtype=torch.float32)
            parameter.data = wide.copy_(data)

    def narrow(block: Any, *_: object) -> None:
        for parameter, data in block.narrow:
            copies[data.shape].append(parameter.data)
            parameter.data = data

    for block in blocks(model):
        block.register_forward_pre_hook(widen)
        block.register_forward_hook(narrow)
    for module in model.modules():
        if hasattr(module, "scalar_embed_scale"):  # Gemma's: it was rounded as the model was loaded
            module.embed_scale = torch.tensor(module.scalar_embed_scale)
    model.eval()


@torch.no_grad()
def logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """Return the logits (tokens, vocabulary) of one prompt, in fp32 on the CPU."""
    values: torch.Tensor = model(torch.tensor([tokens], device=model.device)).logits[0]
    return values.float().cpu()


@torch.no_grad()
def greedy(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Return the tokens that follow each prompt when the likeliest is taken each time.

    All prompts go in one batch: a step reads every weight once. By hand: ``generate`` would add
    habits that a model's own files set, a penalty say.
    """
    width = max(map(len, prompts))
    padded = [[0] * (width - len(ids)) + ids for ids in prompts]
    tokens = torch.tensor(padded, device=model.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    mask = mask.to(model.device)
    cache = None
    for _ in range(NEW_TOKENS):
        last = tokens if cache is None else tokens[:, -1:]
        places = (mask.cumsum(-1) - 1).clamp(min=0)[:, -last.shape[1] :]
        out = model(
            input_ids=last,
            attention_mask=mask,
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
        )
        cache = getattr(out, "past_key_values", None)  # Mamba calls otherwise what it keeps
        new = out.logits[:, -1:].argmax(-1)
        tokens, mask = torch.cat([tokens, new], dim=1), torch.cat([mask, torch.ones_like(new)], 1)
    chosen: list[list[int]] = tokens[:, width:].tolist()
    return chosen


if __name__ == "__main__":
    main(*sys.argv[1:])
