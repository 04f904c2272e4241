"""What does preparing a training set cost beside the tokenizer alone?

Preparing is the rows' prompt texts, tokens, labels, cutoff and the cache on disk. Beside it stand
the fast tokenizer's own two calls on the same texts, with as many threads: ``tokenizer(texts)``,
which a script would write, and ``encode_batch_fast``, which knows no offsets and is the least that
it can cost. They take turns in processes of their own. Then the same rows are prepared once more,
from the cache, and read from their file, as every start does.

``python benchmarks/prepare.py --model models/smollm2-135m`` prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measured import alone, write_results

WAYS = ("encode_batch_fast", "tokenizer", "prepare", "again", "read")


def swapped(source: Path, count: int) -> Iterator[dict[str, str]]:
    """Give ``count`` rows: those of a file over and over, each with two words swapped."""
    rows = json.loads(source.read_text())
    draw = random.Random(0)
    for number in range(count):
        row = rows[number % len(rows)]
        words = row["instruction"].split(" ")
        first, second = draw.randrange(len(words)), draw.randrange(len(words))
        words[first], words[second] = words[second], words[first]
        yield row | {"instruction": " ".join(words)}


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Do one way in this process; return seconds, CPU seconds and what came of it."""
    from transformers import AutoTokenizer

    from san_llm.data.encode import Encoding
    from san_llm.data.sources import read_rows
    from san_llm.data.tokenized import Rows, encode_rows
    from san_llm.protocol.prompts import training_prompt

    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    rows = read_rows(options.rows_file) if options.way != "read" else []
    texts = [training_prompt("llm-adapters", r.instruction, r.context) + r.output for r in rows]
    tokenizer(texts[:100] or ["x"])
    tokens = 0
    cpu, wall = time.process_time(), time.perf_counter()
    if options.way == "read":
        read_rows(options.rows_file)
    elif options.way in ("prepare", "again"):
        settings = ("llm-adapters", "response", 256, options.threads)
        encoded = encode_rows(rows, Encoding(tokenizer, *settings))
        tokens = sum(Rows(encoded).lengths)
    elif options.way == "tokenizer":
        for start in range(0, len(texts), 4096):
            tokens += sum(map(len, tokenizer(texts[start : start + 4096])["input_ids"]))
    else:
        backend = tokenizer.backend_tokenizer
        for start in range(0, len(texts), 4096):
            tokens += sum(
                len(e.ids) for e in backend.encode_batch_fast(texts[start : start + 4096])
            )
    return {
        "seconds": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "tokens": tokens,
    }


def compare(options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Measure every way in turn, ``rounds`` times."""
    by_way: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "rows.json"
        path.write_text(json.dumps(list(swapped(options.source, options.rows))))
        for turn in range(options.rounds):
            for way in WAYS:
                command = [__file__, "--way", way, "--rows-file", str(path)]
                command += ["--model", options.model, "--threads", str(options.threads)]
                environment = {
                    "SAN_LLM_CACHE": f"{temporary}/cache{turn}",
                    "TOKENIZERS_PARALLELISM": "true",
                    "RAYON_NUM_THREADS": str(options.threads),
                }
                by_way[way].append(alone(command, way, options.threads, **environment))
                print(f"round {turn + 1}: {way} {by_way[way][-1]}", file=sys.stderr)
    return by_way


def table(by_way: dict[str, list[dict[str, float]]]) -> str:
    """Return a row a way; ratios are of the runs of one round, by the clock and by CPU seconds."""
    peers = ("tokenizer", "encode_batch_fast")
    heads = ["way", "s (spread)", "CPU s (spread)"]
    heads += [f"{unit} / {peer} (spread)" for peer in peers for unit in ("s", "CPU s")]
    lines = [f"| {' | '.join(heads)} |", f"| ---{' | --:' * (len(heads) - 1)} |"]
    for way, runs in by_way.items():
        cells = [way]
        cells += [_middle([run[key] for run in runs]) for key in ("seconds", "cpu")]
        cells += [
            _middle(
                [mine[key] / theirs[key] for mine, theirs in zip(runs, by_way[peer], strict=True)]
            )
            for peer in peers
            for key in ("seconds", "cpu")
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _middle(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({max(values) - min(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/smollm2-135m", help="whose tokenizer")
    parser.add_argument(
        "--source",
        type=Path,
        default=Path("san_llm/data/pocket/train.json"),
        help="rows to make the others of",
    )
    parser.add_argument("--rows", type=int, default=170_420)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--rows-file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options)))
        return
    by_way = compare(options)
    print(table(by_way))
    write_results(options, ("model", "rows", "threads"), runs=by_way)


if __name__ == "__main__":
    main()
