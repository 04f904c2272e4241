"""What answering costs by the protocol: ``model.generate`` as scripts call it, and san-llm.

Both answer the same rows with the same tuned model in one process, in turn, and their texts are
compared. ``plain`` is what a script does: batches in the rows' order, padded on the left, the mask
passed. ``answers`` stops where the answer is certain. The published script passes no mask: what it
answers with one row at a time, and with several, is shown, too.

``python benchmarks/generate.py --data DIR`` (a folder in the LLM-Adapters layout; else the pocket
set)
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pairs import columns, ratios, times
from ruled import arguments, test_rows, tuned_adapter, write_answered

from san_llm.ask.answers import BEAMS, NEW_TOKENS, answers
from san_llm.data.encode import evaluation_text
from san_llm.evaluate.score import parse_answer
from san_llm.models.adapter import load_adapter
from san_llm.models.load import load_base
from san_llm.models.locate import find_base
from san_llm.models.tokenizer import load_tokenizer
from san_llm.protocol.tasks import TASKS
from san_llm.recipe.schema import Base


def plain(
    model: Any, tokenizer: Any, prompts: list[list[int]], batch: int, mask: bool
) -> list[str]:
    """Answer as scripts do."""
    texts = []
    for start in range(0, len(prompts), batch):
        group = prompts[start : start + batch]
        width = max(map(len, group))
        rows = [[tokenizer.pad_token_id] * (width - len(row)) + row for row in group]
        seen = [[0 if mask else 1] * (width - len(row)) + [1] * len(row) for row in group]
        with torch.inference_mode():
            out = model.generate(
                input_ids=torch.tensor(rows),
                attention_mask=torch.tensor(seen),
                num_beams=BEAMS,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        texts += tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return texts


def ours(
    model: Any, tokenizer: Any, prompts: list[list[int]], answer: Callable[..., Any] | None = None
) -> list[str]:
    """Answer with san-llm."""
    batches = answers(model, tokenizer, prompts, None, answer)
    texts = {number: text for batch in batches for number, text in batch}
    return [texts[number] for number in range(len(prompts))]


def measure(options: argparse.Namespace, task: str) -> dict[str, Any]:
    adapter = tuned_adapter(
        options.model, options.data, options.tasks, options.steps, Path(options.work)
    )
    base = Base(model=options.model, dtype=options.dtype)
    tokenizer = load_tokenizer(find_base(base))
    model = load_adapter(load_base(find_base(base)), adapter)
    rows = test_rows(options.data, task, options.rows)
    prompts = [evaluation_text(options.prompt, row, tokenizer)[1] for row in rows]

    def parsed(texts: list[str]) -> list[str | None]:
        return [parse_answer(TASKS[task], text) for text in texts]

    def read(_: int, text: str) -> str | None:
        return parse_answer(TASKS[task], text)

    ways: dict[str, Callable[[], list[str]]] = {
        "plain": lambda: plain(model, tokenizer, prompts, options.batch, mask=True),
        "exact": lambda: ours(model, tokenizer, prompts),
        "answers": lambda: ours(model, tokenizer, prompts, read),
    }
    timed = times(ways, options.pairs)
    expected = timed["plain"].output
    result: dict[str, Any] = {
        "task": task,
        "rows": len(rows),
        "tokens": sum(map(len, prompts)) / len(rows),
        "answered": {
            str(a): parsed(expected).count(a) for a in sorted(set(parsed(expected)), key=str)
        },
    }
    for way in ("exact", "answers"):
        output = timed[way].output
        pairs = zip(output, expected, strict=True)
        same = zip(parsed(output), parsed(expected), strict=True)
        result[way] = {
            **ratios(timed["plain"], timed[way]),
            "same_texts": sum(a == b for a, b in pairs),
            "same_answers": sum(a == b for a, b in same),
        }
    print(json.dumps(result), file=sys.stderr)
    if options.no_mask:
        for batch in (1, options.batch):
            began = time.process_time()
            texts = plain(model, tokenizer, prompts, batch, mask=False)
            result[f"no_mask_batch_{batch}"] = {
                "cpu_seconds": time.process_time() - began,
                "same_texts": sum(a == b for a, b in zip(texts, expected, strict=True)),
                "same_answers": sum(
                    a == b for a, b in zip(parsed(texts), parsed(expected), strict=True)
                ),
            }
    return result


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], peer="the plain script")
    parser.add_argument("--no-mask", action="store_true", help="the published script's way, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    for task in options.tasks:
        results.append(measure(options, task))
    print(f"| task | rows | way | {columns()} | same texts | same answers |")
    print("| --- | --: | --- | --: | --: | --: | --: | --: |")
    for result in results:
        for way in ("exact", "answers"):
            row = result[way]
            print(
                f"| {result['task']} | {result['rows']} | {way} | {columns(row)} "
                f"| {row['same_texts']} | {row['same_answers']} |"
            )
    write_answered(options, results)


if __name__ == "__main__":
    main()
