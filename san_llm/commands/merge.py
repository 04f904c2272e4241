"""``san-llm merge``: an adapter and its base as one stock checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from san_llm.commands.options import Json, Overwrite, Run, pairs, stdout
from san_llm.progress import quiet_libraries, say
from san_llm.runs.record import MergeResult
from san_llm.shown import parse_size

merge_app = typer.Typer(rich_markup_mode=None)


@merge_app.command(
    epilog="""Examples:

    san-llm merge --verify

    san-llm merge runs/mine --output llama-mine

    san-llm merge --adapter runs/mine/adapter --output llama-mine --dtype bfloat16

    san-llm merge --quantized keep --output llama-mine-4bit

    san-llm merge --shard-size 2GB --gguf q8_0 --overwrite

    san-llm merge --push owner/llama-mine --private"""
)
def merge(
    run: Run = None,
    adapter: Annotated[
        Path | None, typer.Option(help="The adapter. Default: the last run's.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Its base. Default: the one it names.")] = None,
    quantized: Annotated[
        str | None,
        typer.Option(
            metavar="dequantize|keep",
            help="Merge over the base as it was quantized in training: into the numbers that it "
            "stands for, or leaving its weights in 4 bits. Default: into the full-precision base.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Where to save. Default: merged/ in the run's folder.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. Default: the base's.")
    ] = None,
    shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="What one file may hold: 500MB, 2GB. Default: 5GB, or of a measured model what "
            "one of its base's does.",
        ),
    ] = None,
    gguf: Annotated[
        str | None,
        typer.Option(metavar="f16|bf16|q8_0", help="Also write model.gguf, for llama.cpp."),
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="HUB_ID", help="Upload the folder to the hub, too.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push: make a new repository private.")
    ] = False,
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify",
            show_default=False,
            help="Compare the result with base + adapter, in a fresh process. Default: some rows, "
            "or the answers to some tokens, which costs next to nothing.",
        ),
    ] = None,
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Fold an adapter into its base: a stock checkpoint that needs nothing of san-llm.

    Of a run of method full, its tuned model is copied.
    """
    quiet_libraries()
    from san_llm.merge.request import merge_request
    from san_llm.merge.run import full_precision_note
    from san_llm.merge.run import merge as start

    result = start(
        merge_request(
            model,
            adapter,
            output,
            run,
            dtype=dtype,
            overwrite=overwrite,
            verified=verify,
            shard_size=None if shard_size is None else parse_size(shard_size),
            quantized=quantized,
            gguf=gguf,
            push_to=push,
            private=private,
        )
    )
    note = full_precision_note(result)
    if note:
        say(note)
    if as_json:
        print(json.dumps(asdict(result)))
        return
    stdout.print(_table(result, gguf))


def _table(result: MergeResult, gguf: str | None) -> Table:
    rows = [
        ("copied" if result.whole else "merged", result.output),
        *([("run", result.run)] if result.run else []),
        ("base", result.base),
        ("model" if result.whole else "adapter", result.adapter),
        ("weights", f"{result.parameters:,} in {result.stored_as}"),
    ]
    if result.gguf is not None:
        rows.append(("gguf", f"{result.gguf} ({gguf})"))
    if result.pushed is not None:
        rows.append(("pushed", result.pushed))
    if result.checked is not None:
        apart = f"{result.checked.apart:.2g} apart at most"
        rows.append(("checked", f"{result.checked.what}: {apart}"))
    if result.verified is not None:
        check = result.verified
        rows += [
            (
                "verified",
                f"logits differ from base + adapter by {check.largest_difference:.2g} at most "
                f"({check.relative:.2g} of their spread; {result.dtype} allows {check.bound:g})",
            ),
            ("adapter moved", f"logits by {check.adapter_moved:.3g} at most"),
            ("same top word", f"in {100 * check.same_top_word:.1f} % of positions"),
            ("same greedy text", f"{100 * check.same_greedy:.1f} % of the words written"),
            *([("frame", check.frame)] if check.frame else []),
        ]
        if check.quantization_moved is not None:
            about = f"merged and trained model ({result.trained_over} base) differ by"
            rows.append(("quantization", f"{about} {check.quantization_moved:.3g} at most"))
        if check.largest_weight_error is not None:
            name, error = check.largest_weight_error
            rows.append(("weight error", f"{error:.2g} of a row's largest at most away ({name})"))
            kinds = ", ".join(f"{kind} {worst:.2g}" for kind, worst in check.errors_by_kind.items())
            rows.append(("by module", kinds))
    return pairs(rows)
