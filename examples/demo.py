"""The whole story on a laptop: get a base, tune it with SAN, judge it, merge it, ask it.

``make demo`` runs this. Every step is a command that you could type; what is there is reused.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from san_llm.recipe.read import load_recipe
from san_llm.recipe.shipped import find_recipe
from san_llm.runs.folder import recipe_of
from san_llm.shown import percent

RUN = Path("runs/demo")
RECIPE = "smollm2_demo"
BIN = Path(sys.executable).parent
console = Console(highlight=False, soft_wrap=True)


def run(*command: str, capture: bool = False) -> str:
    """Show a command and run it; end with its exit code if it fails."""
    console.print(f"\n[bold green]$[/] [bold]{shlex.join(command)}[/]")
    # Ctrl-C reaches the child as well, which ends well by itself: wait for it.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = subprocess.Popen(
        [str(BIN / command[0]), *command[1:]],
        stdout=subprocess.PIPE if capture else None,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    out, _ = child.communicate()
    signal.signal(signal.SIGINT, before)
    if child.returncode:
        sys.exit(child.returncode)
    return out or ""


def reused(path: Path) -> bool:
    """Whether an earlier demo has made this; say so."""
    if path.exists():
        console.print(f"\n[dim]{path} is there from an earlier demo: reused[/]")
    return path.exists()


def train() -> None:
    """Train, or go on with a training that was stopped, or reuse a finished one."""
    # A run of another version of the recipe is not this demo's.
    same = (RUN / "recipe.yaml").is_file() and recipe_of(RUN) == load_recipe(find_recipe(RECIPE))
    if same and not (RUN / "adapter").exists():
        run("san-llm", "train", str(RUN), "--resume")
    elif not same or not reused(RUN / "adapter"):
        again = ["--overwrite"] if RUN.exists() else []
        run("san-llm", "train", RECIPE, "--output", str(RUN), *again)


def scores(when: str, *options: str) -> dict[str, dict[str, float]]:
    """Evaluate, and return accuracy, standard error and unparseable answers by task."""
    folder = RUN / "eval" / when
    if not reused(folder / "results.json"):
        run("san-llm", "eval", str(RUN), *options, "--output", str(folder))
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    total = results["average"] | {
        "n": sum(task["n"] for task in results["tasks"]),
        "unparseable": sum(task["unparseable"] for task in results["tasks"]),
    }
    return {task["task"]: task for task in results["tasks"]} | {"average": total}


def comparison(before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]) -> Table:
    """Return the scores side by side: accuracy and standard error in percent."""
    table = Table(title="accuracy in percent, with standard errors", title_justify="left")
    for column in ("task", "rows", "base", "no answer", "base + SAN", "no answer"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task, new in after.items():
        if task == "average":
            table.add_section()
        old = before[task]
        table.add_row(
            task,
            str(new["n"]),
            f"{percent(old['accuracy'])} ± {percent(old['standard_error'])}",
            str(old["unparseable"]),
            f"{percent(new['accuracy'])} ± {percent(new['standard_error'])}",
            str(new["unparseable"]),
            style="bold" if task == "average" else "",
        )
    return table


def main() -> None:
    """Run the demo from the repository's root."""
    began = time.monotonic()
    run("san-llm", "download", "smollm2-135m")
    train()
    before = scores("before", "--base-only")
    after = scores("after")
    merged = RUN / "merged"
    if not reused(merged / "config.json"):
        run("san-llm", "merge", str(RUN), "--verify")
    row = json.loads((RUN / "eval" / "after" / "rows.jsonl").read_text().splitlines()[0])
    question = row["prompt"].split("### Instruction:\n")[1].split("\n\n### Response:")[0]
    answer = run("python", "examples/ask.py", str(merged), question, capture=True).strip()
    console.print(f"{answer}   [dim](right: {row['answer']})[/]")

    console.print()
    console.print(comparison(before, after))
    console.print(
        "The questions are the first rows of each task of the pocket set: a demonstration, "
        "not a benchmark.\n"
    )
    results = {
        "adapter": RUN / "adapter",
        "merged model": merged,
        "every answer": RUN / "eval" / "after" / "rows.jsonl",
        "training log": RUN / "log.jsonl",
    }
    for what, path in results.items():
        console.print(f"[bold]{what:13}[/] {path}")
    console.print(f"[bold]{'time':13}[/] {(time.monotonic() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
