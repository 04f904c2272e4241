"""``san-llm eval``: accuracy by the protocol."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from san_llm.commands.options import Date, Json, Overwrite, Run, results, stdout
from san_llm.progress import quiet_libraries

eval_app = typer.Typer(rich_markup_mode=None)


@eval_app.command(
    name="eval",
    epilog="""Examples:

    san-llm eval --tasks boolq,piqa

    san-llm eval --tasks boolq,my_task.yaml

    san-llm eval runs/mine --tasks boolq --forgetting

    san-llm eval runs/mine --base-only --limit 20

    san-llm eval --model runs/latest/merged --data path/to/dataset --processes 8

    san-llm eval --protocol loglik --json --output scores

    san-llm eval --protocol lm-eval --tasks gsm8k,mmlu""",
)
def evaluate(
    run: Run = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks and task files of your own, joined by commas; with --protocol lm-eval any "
            "that it knows. Default: the recipe's, or all eight."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Evaluate this model: a folder or hub id.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Evaluate this adapter. Default: the last run's.")
    ] = None,
    base_only: Annotated[
        bool, typer.Option("--base-only", help="Evaluate the base without the adapter.")
    ] = False,
    data: Annotated[
        str | None, typer.Option(help="'pocket', or a folder with <task>/test.json.")
    ] = None,
    protocol: Annotated[
        str,
        typer.Option(
            metavar="generate|loglik|lm-eval",
            help="Read answers from generated text; or take each row's most likely answer; or "
            "let lm-evaluation-harness take it.",
        ),
    ] = "generate",
    prompt: Annotated[
        str | None,
        typer.Option(
            help="llm-adapters, llm-adapters-aligned, alpaca or chat; of lm_eval's own tasks none, "
            "too. Default: as it was trained."
        ),
    ] = None,
    date: Date = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first rows of each task.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows at once. Default: as memory allows.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. Default: the run's.")
    ] = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Compute each row alone: the same answer in any batch."),
    ] = False,
    answers_only: Annotated[
        bool,
        typer.Option("--answers-only", help="Generate no further than the answer is certain."),
    ] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine, one for each GPU.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Answer every row, also those answered before.")
    ] = False,
    forgetting: Annotated[
        bool | None,
        typer.Option(
            "--forgetting/--no-forgetting",
            help="Tell besides how much less well than its base it says a neutral text. Default: "
            "the recipe's.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for rows.jsonl and results.json.")
    ] = None,
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Measure accuracy on commonsense tasks, by the protocol of LLM-Adapters, DoRA and SAN."""
    quiet_libraries()
    from san_llm.evaluate.request import EvalRequest
    from san_llm.evaluate.start import start
    from san_llm.evaluate.table import remarks, tables

    ended = start(
        EvalRequest(
            tasks=None if tasks is None else tasks.split(","),
            model=model,
            adapter=adapter,
            run=run,
            base_only=base_only,
            data=data,
            protocol=protocol,
            prompt=prompt,
            date=date,
            limit=limit,
            batch_size=batch_size,
            dtype=dtype,
            strict=strict,
            answers_only=answers_only,
            processes=processes,
            fresh=fresh,
            output=output,
            overwrite=overwrite,
            forgetting=forgetting,
        )
    )
    result = ended.result
    if result is not None and as_json:
        print(json.dumps(result.to_json()))
    elif result is not None:
        for table in tables(result):
            stdout.print(table)
        for line in remarks(result):
            results(line)
        results(f"rows: {result.rows}")
    raise typer.Exit(ended.code)
