"""The app: which commands there are, argv that no command has to see, and exit codes.

Stages are imported inside their command, so that help pages and refused input never load torch.
Results go to stdout, progress and errors to stderr; the exit code is 0, 1 for a run that failed,
2 for input that cannot be right, 130 for Ctrl-C, 75 for a training that SIGTERM has stopped.
"""

from __future__ import annotations

import os
import sys
import traceback
import unicodedata
from typing import Annotated, Any

import typer
import typer.core
from rich.markup import escape

from san_llm import __version__
from san_llm.commands.chat import chat_app
from san_llm.commands.compare import compare_app
from san_llm.commands.data import data_app
from san_llm.commands.diff import diff_app
from san_llm.commands.doctor import doctor_app
from san_llm.commands.download import download_app
from san_llm.commands.eval import eval_app
from san_llm.commands.generate import generate_app
from san_llm.commands.graph import graph_app
from san_llm.commands.merge import merge_app
from san_llm.commands.plan import plan_app
from san_llm.commands.push import push_app
from san_llm.commands.recipes import recipes_app
from san_llm.commands.report import report_app
from san_llm.commands.runs import runs_app
from san_llm.commands.show import show_app
from san_llm.commands.study import study_app
from san_llm.commands.train import train_app
from san_llm.errors import DEBUG, InputError, SanError, debugging, of_the_disk, unexpected
from san_llm.launch.processes import is_first
from san_llm.progress import quiet_libraries
from san_llm.shown import masked, plain


class Interrupted(BaseException):
    """Ctrl-C while a command ran."""


class _Commands(typer.core.TyperGroup):
    """The commands. Typer itself would end one that Ctrl-C has met without a word."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was typed."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted from None


app = typer.Typer(
    name="san-llm",
    cls=_Commands,
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
# In the order of the help page; a group of commands has a name of its own.
app.add_typer(download_app)
app.add_typer(train_app)
app.add_typer(eval_app)
app.add_typer(compare_app)
app.add_typer(study_app)
app.add_typer(merge_app)
app.add_typer(diff_app)
app.add_typer(runs_app, name="runs")
app.add_typer(generate_app)
app.add_typer(chat_app)
app.add_typer(doctor_app)
app.add_typer(plan_app)
app.add_typer(graph_app)
app.add_typer(push_app)
app.add_typer(show_app)
app.add_typer(report_app)
app.add_typer(recipes_app, name="recipes")
app.add_typer(data_app, name="data", callback=lambda: quiet_libraries())


LONGEST_NAME = 255  # bytes, on any file system that a model would lie on


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
        of_a_path = "generate" not in words[:2] and (word.startswith("-") or "=" not in word)
        if of_a_path and max(map(len, os.fsencode(word).split(b"/"))) > LONGEST_NAME:
            raise InputError(
                f"argument {number}: '{word[:40]}...': no file has a name of more than "
                f"{LONGEST_NAME} bytes"
            )


def _at_home(words: list[str]) -> list[str]:
    """Return paths with the home that ``~/`` stands for, where no shell has: ``--output=~/x``."""
    found = []
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        # generate's prompt is no path, nor is its input.
        path = option not in ("", "--input") or "generate" not in words[:2]
        home = path and value.startswith("~/")
        found.append(option + equals + os.path.expanduser(value) if home else word)
    return found


def _check_options(words: list[str]) -> None:
    """Refuse a recipe's key that is written as an option, such as ``train --epochs 2``."""
    takes_keys = words[:1] in (["train"], ["plan"]) or words[:2] == ["data", "inspect"]
    if not takes_keys or {"-h", "--help"} & set(words):
        return
    from san_llm.recipe.aliases import called_here
    from san_llm.recipe.schema import section_keys

    sections = section_keys()
    for word in words[1:]:
        if words[0] == "plan" and word == "--data":
            continue  # an option of its own
        key = word.removeprefix("--").partition("=")[0].replace("-", "_")
        if not word.startswith("--") or key == "name":
            continue
        for name, keys in sections.items():
            if key in keys:
                raise InputError(f"{word}: a recipe's key is written without dashes: {name}.{key}=")
        if place := called_here(key):
            raise InputError(
                f"{word}: no such option ({place}); a recipe's key is written KEY=VALUE"
            )


def main() -> None:
    """Run the command line, turning every expected error into one line and an exit code."""
    from san_llm.progress import stderr

    try:
        try:
            _check_arguments(sys.argv[1:])
            sys.argv[1:] = _at_home(sys.argv[1:])
            _check_options(sys.argv[1:])
            app(prog_name="san-llm")
        finally:
            sys.stdout.flush()  # a reader that is gone is noticed here, not at interpreter exit
    except SystemExit as end:
        if "LOCAL_RANK" in os.environ and not end.code:
            from san_llm.launch.launcher import leave

            leave()
        raise
    except SanError as error:
        if debugging():
            sys.stderr.write(masked(traceback.format_exc()))
            sys.exit(error.exit_code)
        for line in str(error).splitlines():
            stderr.print(f"[bold red]error:[/] {escape(plain(line))}", markup=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, Interrupted):  # before a command, or in it
        if is_first():
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
        problem = of_the_disk(error)
        line = escape(plain(problem or unexpected(error)))
        stderr.print(f"[bold red]error:[/] {line}", markup=True)
        if problem is None:
            stderr.print("san-llm --debug COMMAND ... shows where it happened")
        sys.exit(1)
