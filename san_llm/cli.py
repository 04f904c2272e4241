"""Every command: options -> one function -> one printed result. No logic of its own.

Stages are imported inside their command, so that help pages and refused input never load torch.
Results go to stdout, progress and errors to stderr; the exit code is 0, 1 for a run that failed,
2 for input that cannot be right, 130 for Ctrl-C, 75 for a training that SIGTERM has stopped.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
import unicodedata
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from san_llm import __version__
from san_llm.commands.complete import recipes_and_runs, run_folders
from san_llm.commands.doctor import doctor_app
from san_llm.commands.options import Json, Overrides, Overwrite
from san_llm.commands.plan import plan_app
from san_llm.commands.push import push_app
from san_llm.commands.recipes import recipes_app
from san_llm.commands.report import report_app
from san_llm.commands.runs import runs_app
from san_llm.commands.show import show_app
from san_llm.commands.talk import talk_app
from san_llm.data.commands import data_app
from san_llm.errors import (
    DEBUG,
    STOPPED,
    InputError,
    SanError,
    check_one_of,
    debugging,
    masked,
    of_the_disk,
    plain,
    unexpected,
)
from san_llm.progress import quiet_libraries

stdout = Console(highlight=False, soft_wrap=True)

app = typer.Typer(
    name="san-llm",
    help="Instruction-tune LLaMA-family models with SAN: train, evaluate, merge.",
    epilog="""A first run, on any laptop:

    san-llm download smollm2-135m

    san-llm train smollm2_demo

    san-llm eval --limit 10

    san-llm merge --verify""",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.add_typer(runs_app, name="runs")
app.add_typer(talk_app)
app.add_typer(doctor_app)
app.add_typer(plan_app)
app.add_typer(push_app)
app.add_typer(show_app)
app.add_typer(report_app)
app.add_typer(recipes_app, name="recipes")
app.add_typer(data_app, name="data", callback=lambda: quiet_libraries())


def _version(wanted: bool) -> None:
    if wanted:
        print(f"san-llm {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if debug:
        os.environ[DEBUG] = "1"


@app.command(
    epilog="""Examples:

    san-llm download smollm2-135m

    san-llm download meta-llama/Meta-Llama-3-8B --output models/llama3"""
)
def download(
    name: Annotated[str, typer.Argument(help="smollm2-135m, or a hub id: owner/name.")],
    output: Annotated[
        Path | None, typer.Option(help="Where to keep it. Default: models/NAME.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Get a base model, as safetensors, and print its folder."""
    from san_llm.download import download as run
    from san_llm.download import model_folder

    # From the hub come gigabytes: its own bars show them. A named model is converted under ours.
    quiet_libraries(bars=model_folder(name) is None)
    stdout.print(str(run(name, output, overwrite)), markup=False)


@app.command(
    epilog="""Examples:

    san-llm train recipes/smollm2_demo.yaml

    san-llm train smollm2_demo training.epochs=2 method.mode=neuron

    san-llm train llama7b_commonsense --processes 8

    san-llm train --resume"""
)
def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            autocompletion=recipes_and_runs,
            help="A recipe file or the name of a shipped one; with --resume a run's folder "
            "(default: the last run).",
        ),
    ] = None,
    overrides: Overrides = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine, one for each GPU.")
    ] = None,
    accelerate: Annotated[
        Path | None,
        typer.Option(
            metavar="CONFIG.yaml",
            help="Launch as this file of Accelerate's says, or a shipped one: ddp, fsdp2, ...",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The run's folder. Default: runs/NAME-DATE-TIME.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of a run.")
    ] = False,
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Train an adapter as a recipe says; the run's folder holds all that it leaves behind."""
    quiet_libraries()
    from san_llm.data.rows import read_rows, training_files
    from san_llm.engine import check_engine, engine_of, find_config, read_config
    from san_llm.launch import accelerate_command, machine_rank, run_launched
    from san_llm.lock import refuse_busy
    from san_llm.processes import agree, is_first
    from san_llm.progress import stderr
    from san_llm.recipe import find_recipe, harmful_changes, load_recipe
    from san_llm.record import begun, last_run, new_run, recipe_of, write_text
    from san_llm.trackers import check_trackers

    launched, accelerate = "WORLD_SIZE" in os.environ, find_config(accelerate)
    # On several machines, as in several processes, the first alone knows the run.
    if not is_first() or (not launched and machine_rank(accelerate)):
        _join_training(None if launched else accelerate_command(["train"], processes, accelerate))
        return
    if resume and recipe is not None and "=" in recipe and not Path(recipe).exists():
        overrides, recipe = [recipe, *(overrides or [])], None
    if resume and output:
        raise InputError("--resume goes on in the run's own folder: no --output")
    run: Path | None = None
    if resume and (recipe is None or Path(recipe).is_dir()):
        run = last_run() if recipe is None else Path(recipe)
        recipe_of(run)
        chosen = load_recipe(run / "recipe.yaml", overrides or [])
    elif recipe is None:
        raise InputError("no recipe named; `san-llm recipes list` shows those that are shipped")
    else:
        chosen = load_recipe(find_recipe(recipe), overrides or [])
        if resume:
            run = last_run()
    if run is not None and (run / "adapter").is_dir():
        raise InputError(f"{run}: is finished; there is nothing to go on with")
    if run is not None:
        changes = harmful_changes(recipe_of(run), chosen)
        if changes:
            raise InputError(
                f"{run}: goes on only with what it began with; changed are "
                f"{', '.join(changes)}: change them back, or start a new run"
            )
    if busy := run or output:
        refuse_busy(busy)
    check_trackers(chosen)
    command = None
    if ((processes or 1) > 1 or accelerate) and not launched:
        command = accelerate_command([], processes, accelerate)
        if accelerate is not None:
            check_engine(engine_of(accelerate), chosen)
            processes = processes or read_config(accelerate)["num_processes"]
        rows = chosen.training.batch_size
        if rows % (processes or 1):
            raise InputError(
                f"training.batch_size: {rows} is not a multiple of {processes} processes"
            )
    if not (launched and resume):
        for file in training_files(chosen.data.train):
            read_rows(file)  # a wrong row is found before torch is loaded or a folder is made
        stderr.print(chosen.to_yaml(), markup=False)
        if run is None:
            from san_llm.model import load_config

            load_config(chosen.base)  # and so is a base that is not there

    if run is not None and recipe_of(run) != chosen:
        write_text(run / "recipe.yaml", chosen.to_yaml())
    made = run is None
    if command is not None:
        run = run or new_run(chosen, output, overwrite)
        child = ["train", str(run), "--resume", *(["--json"] if as_json else [])]
        with begun(run, made):
            code = run_launched([*command, *(["--debug"] if debugging() else []), *child])
        raise typer.Exit(code if code in (0, *STOPPED.values()) else 1)

    from san_llm.train import train as start

    if not launched:
        signal.signal(signal.SIGTERM, _stop_at_once)
    run, chosen = agree((run or new_run(chosen, output, overwrite), chosen))
    with begun(run, made):
        stderr.print(f"run: {run}", markup=False)
        result = start(chosen, run)
    if as_json:
        print(json.dumps(asdict(result)))
    elif result.finished:
        stdout.print(_train_table(asdict(result)))
        stderr.print('next: `san-llm generate "..." --compare`, `eval`, `merge --verify`, `report`')
    if not result.finished:
        stderr.print(
            f"stopped after step {result.steps} of {result.max_steps}; "
            f"`san-llm train {run} --resume` goes on",
            markup=False,
        )
        # A launcher takes anything but 0 for a crash.
        raise typer.Exit(0 if launched else STOPPED[result.stopped_by or "SIGINT"])


def _join_training(command: list[str] | None) -> None:
    """Train with the first process, which tells the run; through a launcher's command, if given."""
    from san_llm.launch import run_launched

    if command is not None:
        code = run_launched(command)
        raise typer.Exit(code if code in (0, *STOPPED.values()) else 1)
    from san_llm.processes import agree
    from san_llm.train import train as start

    told: Any = agree(None)
    start(told[1], told[0])


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    """Before the first step, and after the last, there is nothing to save that is not saved."""
    from san_llm.progress import stderr

    stderr.print("stopped by SIGTERM; `san-llm train --resume` goes on")
    sys.exit(STOPPED["SIGTERM"])


def _train_table(result: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    loss = result["held_out_loss"]
    rows = [
        ("trained numbers", f"{result['trained_numbers']:,}"),
        (
            "rows",
            f"{result['rows']:,} ({result['dropped_rows']:,} dropped, {result['cut_rows']:,} cut)",
        ),
        ("steps", f"{result['steps']:,}; the checkpoint of step {result['best_step']:,} is kept"),
        ("held-out loss", "-" if loss is None else f"{loss:.4f} a token"),
        ("time", f"{result['seconds']:.0f} s"),
        ("adapter", f"{result['run']}/adapter"),
    ]
    for name, value in rows:
        table.add_row(f"[bold]{name}[/]", escape(plain(value)))
    return table


@app.command(
    name="eval",
    epilog="""Examples:

    san-llm eval --tasks boolq,piqa

    san-llm eval --base-only --limit 20

    san-llm eval --model runs/latest/merged --data path/to/dataset --processes 8

    san-llm eval --protocol loglik --json --output scores""",
)
def evaluate(
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks, joined by commas. Default: the recipe's, or all eight."),
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
            help="llm-adapters, llm-adapters-aligned, alpaca or chat. Default: as it was trained."
        ),
    ] = None,
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
    output: Annotated[
        Path | None, typer.Option(help="Folder for rows.jsonl and results.json.")
    ] = None,
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Measure accuracy on commonsense tasks, by the protocol of LLM-Adapters, DoRA and SAN."""
    quiet_libraries()
    from san_llm.data.prompts import prompt_style
    from san_llm.data.tasks import TASKS, find_tasks
    from san_llm.evaluate.protocol import Settings, find_protocol
    from san_llm.evaluate.questions import read_questions
    from san_llm.launch import accelerate_command, run_launched
    from san_llm.processes import agree, is_first, world_size
    from san_llm.progress import stderr
    from san_llm.recipe import Evaluation
    from san_llm.record import new_eval_folder, refuse_files
    from san_llm.subject import find_subject

    named = find_tasks(tasks.split(",")) if tasks is not None else None
    style = prompt_style(prompt) if prompt is not None else None
    way = find_protocol(protocol)
    if answers_only and way != "generate":
        raise InputError(f"--answers-only: protocol {way} generates nothing")
    subject = find_subject(model, adapter, base_only, dtype)
    recipe = subject.recipe
    defaults = recipe.evaluation if recipe else Evaluation()
    chosen = named or [TASKS[name] for name in defaults.tasks]
    data = data or defaults.data
    limit = limit or defaults.limit
    style = style or defaults.prompt or subject.prompt or "llm-adapters"
    settings = Settings(way, style, batch_size, strict, answers_only)
    launched = "WORLD_SIZE" in os.environ
    if is_first():
        alone = "base" if subject.run else "model"
        output = output or new_eval_folder(subject.run, "adapter" if subject.adapter else alone)
        refuse_files(output, overwrite)

    questions = read_questions(chosen, data, limit)
    try:
        if (processes or 1) > 1 and not launched:
            command = accelerate_command(sys.argv[1:], processes, None)
            raise typer.Exit(1 if run_launched([*command, "--output", str(output)]) else 0)
        from san_llm.evaluate.report import remarks, table
        from san_llm.evaluate.run import evaluate as start

        output = agree(output) or Path()
        about = {
            "title": f"{subject} on {data}",
            "model": subject.base.model,
            "adapter": str(subject.adapter) if subject.adapter else None,
            "data": data,
            "limit": limit,
        }
        result = start(subject, questions, settings, about, output, overwrite, fresh)
    except KeyboardInterrupt:
        if is_first() and not (launched and world_size() > 1):
            stderr.print("the same command goes on with the rows that are not answered yet")
        raise
    if result is None:
        return
    if subject.adapter and subject.recipe:
        from san_llm.adapter_card import add_scores

        try:
            add_scores(subject.adapter, subject.recipe.name, result.to_json())
        except InputError as error:  # a card of somebody's own; the evaluation stands
            stderr.print(f"scores are not put into the card: {plain(str(error))}", markup=False)
    if as_json:
        print(json.dumps(result.to_json()))
        return
    stdout.print(table(result))
    for line in remarks(result):
        stdout.print(line, markup=False)
    stdout.print(f"rows: {output / 'rows.jsonl'}", markup=False)


@app.command(
    epilog="""Examples:

    san-llm compare runs/one runs/two

    san-llm compare scores/base scores/tuned --published

    san-llm compare scores/a scores/b --latex > table.tex"""
)
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN RUN ...",
            autocompletion=run_folders,
            help="Folders of evaluations, or runs whose adapter was evaluated once.",
        ),
    ],
    metric: Annotated[
        str, typer.Option(metavar="acc|acc_norm", help="What is compared; acc_norm: by likelihood.")
    ] = "acc",
    across: Annotated[
        bool, typer.Option("--across", help="Compare other protocols and prompt styles, too.")
    ] = False,
    published: Annotated[
        bool, typer.Option("--published", help="Show published averages, marked as quoted.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="Print LaTeX tables (booktabs).")] = False,
    as_json: Json = False,
) -> None:
    """Compare evaluations row by row with the first: differences, intervals, exact tests."""
    from san_llm.evaluate import compare_tables as tables
    from san_llm.evaluate.compare import METRICS
    from san_llm.evaluate.compare import compare as start

    check_one_of("--metric", metric, METRICS)
    if markdown + latex + as_json > 1:
        raise InputError("--markdown, --latex and --json exclude each other")
    result = start(runs, metric, across, published)
    if as_json:
        print(json.dumps(asdict(result)))
    elif markdown or latex:
        print((tables.markdown if markdown else tables.latex)(result))
    else:
        for line in tables.legend(result):
            stdout.print(line, markup=False)
        for grid in tables.grids(result):
            Console(highlight=False).print(tables.drawn(grid))
        for line in tables.remarks(result):
            stdout.print(line, markup=False)


@app.command(
    epilog="""Examples:

    san-llm merge --verify

    san-llm merge --adapter runs/mine/adapter --output llama-mine --dtype bfloat16

    san-llm merge --quantized keep --output llama-mine-4bit

    san-llm merge --shard-size 2GB --gguf q8_0 --overwrite

    san-llm merge --push owner/llama-mine --private"""
)
def merge(
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
        str, typer.Option(metavar="SIZE", help="What one file may hold: 500MB, 2GB.")
    ] = "5GB",
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
        bool,
        typer.Option(
            "--verify", help="Compare the result with base + adapter, in a fresh process."
        ),
    ] = False,
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Fold an adapter into its base: a stock checkpoint that needs nothing of san-llm."""
    quiet_libraries()
    from san_llm.merge import full_precision_note, stored_as
    from san_llm.merge import merge as start
    from san_llm.progress import stderr
    from san_llm.recipe import DTYPES
    from san_llm.record import adapter_of, last_run, refuse_files
    from san_llm.size import parse_size
    from san_llm.subject import find_subject

    for option, found, known in (
        ("--dtype", dtype, DTYPES),
        ("--quantized", quantized, ("dequantize", "keep")),
        ("--gguf", gguf, ("f16", "bf16", "q8_0")),
    ):
        if found is not None:
            check_one_of(option, found, known)
    if private and push is None:
        raise InputError("--private: says how to --push, which is not asked for")
    shard_bytes = parse_size(shard_size)
    subject = find_subject(model, adapter or adapter_of(last_run()))
    if output is None:
        if subject.run is None:
            raise InputError(f"{adapter}: not in a run's folder; say where to save with --output")
        output = subject.run / "merged"
    refuse_files(output, overwrite)
    result = start(
        *(subject, output, dtype, overwrite, verify, shard_bytes, quantized, gguf, push, private)
    )
    note = full_precision_note(result)
    if note:
        stderr.print(note, markup=False)
    if as_json:
        print(json.dumps(asdict(result)))
        return
    rows = [
        ("merged", result.output),
        ("base", result.base),
        ("weights", f"{result.parameters:,} in {stored_as(result)}"),
    ]
    if result.gguf is not None:
        rows.append(("gguf", f"{result.gguf} ({gguf})"))
    if result.pushed is not None:
        rows.append(("pushed", result.pushed))
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
        ]
        if check.quantization_moved is not None:
            about = f"merged and trained model ({result.trained_over} base) differ by"
            rows.append(("quantization", f"{about} {check.quantization_moved:.3g} at most"))
        if check.largest_weight_error is not None:
            name, error = check.largest_weight_error
            rows.append(("weight error", f"{error:.2g} of a row's largest at most away ({name})"))
            kinds = ", ".join(f"{kind} {worst:.2g}" for kind, worst in check.errors_by_kind.items())
            rows.append(("by module", kinds))
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows:
        table.add_row(f"[bold]{name}[/]", escape(plain(value)))
    stdout.print(table)


@app.command(
    epilog="""Examples:

    san-llm diff

    san-llm diff runs/mine --json

    san-llm diff path/to/adapter models/llama3

    san-llm diff path/to/merged models/llama3"""
)
def diff(
    adapter: Annotated[
        Path | None,
        typer.Argument(
            metavar="ADAPTER|RUN|MODEL",
            autocompletion=run_folders,
            help="Default: the last run's adapter.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Argument(
            metavar="BASE", help="The model it was trained on. Default: the one it names."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what training changed: channels potentiated (gamma > 1) and depressed (gamma < 1)."""
    from san_llm.diff import diff as start
    from san_llm.diff import tables

    result = start(adapter, base)
    if as_json:
        print(json.dumps(asdict(result)))
        return
    for table in tables(result):
        stdout.print(table)
        stdout.print()


def _check_arguments(words: list[str]) -> None:
    """Refuse what no name or value has, before it can be shown or written anywhere."""
    for number, word in enumerate(words, start=1):
        lines = "\n\t" if "generate" in words[:2] else ""  # which a prompt may have
        wrong = next(
            (c for c in word if unicodedata.category(c) in ("Cc", "Cs") and c not in lines), None
        )
        if wrong is not None:
            kind = "a byte that is not UTF-8" if wrong > "\ud7ff" else "a control character"
            raise InputError(f"argument {number}: {word!r}: has {kind}")


def _check_options(words: list[str]) -> None:
    """Refuse a recipe's key that is written as an option, such as ``train --epochs 2``."""
    if words[:1] not in (["train"], ["plan"]) or {"-h", "--help"} & set(words):
        return
    from san_llm.recipe import section_keys

    sections = section_keys()
    for word in words[1:]:
        if words[0] == "plan" and word == "--data":
            continue  # an option of its own
        key = word.removeprefix("--").partition("=")[0].replace("-", "_")
        for name in ("training", "data", "evaluation"):
            if word.startswith("--") and key in sections[name]:
                raise InputError(f"{word}: a recipe's key is written without dashes: {name}.{key}=")


def main() -> None:
    """Run the command line, turning every expected error into one line and an exit code."""
    from san_llm.progress import stderr

    try:
        try:
            _check_arguments(sys.argv[1:])
            _check_options(sys.argv[1:])
            app(prog_name="san-llm")
        finally:
            sys.stdout.flush()  # a reader that is gone is noticed here, not at interpreter exit
    except SystemExit as end:
        if "LOCAL_RANK" in os.environ and not end.code:
            from san_llm.launch import leave

            leave()
        raise
    except SanError as error:
        if debugging():
            sys.stderr.write(masked(traceback.format_exc()))
            sys.exit(error.exit_code)
        for line in str(error).splitlines():
            stderr.print(f"[bold red]error:[/] {escape(plain(line))}", markup=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        stderr.print("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of stdout (head, say) has seen enough. As typer and rich, where they notice it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if debugging():
            sys.stderr.write(masked(traceback.format_exc()))
            sys.exit(1)
        told = of_the_disk(error)
        line = escape(plain(told or unexpected(error)))
        stderr.print(f"[bold red]error:[/] {line}", markup=True)
        if told is None:
            stderr.print("san-llm --debug COMMAND ... shows where it happened")
        sys.exit(1)
