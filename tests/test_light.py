"""What answers at the prompt loads no torch, whatever it is asked."""

import json
import subprocess
import sys

import pytest
from tiny import rows, write_recipe, write_rows

HEAVY = {"torch", "transformers", "datasets", "peft", "accelerate", "bitsandbytes", "trl"}
COMMANDS = ["", "download", "train", "eval", "merge", "diff", "compare", "recipes"]
COMMANDS += ["generate", "chat", "doctor", "report", "plan"]
COMMANDS += ["data", "data build", "data inspect"]
COMMANDS += ["recipes list", "recipes show", "recipes copy"]
COMMANDS += ["recipes check", "recipes schema", "runs", "runs rm", "push", "show"]


# What a command has loaded is written to stderr when it ends, whatever it ends with.
SPY = (
    "# forked from: light\n"
    "import atexit, json, sys\n"
    "def tell():\n"
    "    print('MODULES', json.dumps(sorted({m.split('.')[0] for m in sys.modules})), "
    "file=sys.stderr)\n"
    "atexit.register(tell)\n"
    "from san_llm.cli import main\n"
    "main()\n"
)


def spied(*arguments: str) -> tuple[int, str, set[str]]:
    """Run a command; return its exit code, its output, and the packages that it loaded."""
    done = subprocess.run(
        [sys.executable, "-c", SPY, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said, modules = done.stderr.rsplit("MODULES ", 1)
    return done.returncode, done.stdout + said, set(json.loads(modules))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_loads_no_torch_and_shows_examples(here, command):
    code, text, modules = spied(*command.split(), "--help")
    assert code == 0
    assert not modules & HEAVY
    assert f"san-llm {command}".strip() in text.split("Options:")[1]
    assert "Example" in text or command == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["recipes", "list"],
        ["recipes", "show", "smollm2_demo"],
        ["train", "no_such_recipe"],
        ["train", "smollm2_demo", "training.learning_rat=1"],
        ["train", "smollm2_demo", "data.train=nowhere.json"],
        ["train", "--resume"],
        ["eval"],
        ["eval", "--tasks", "bolq"],
        ["eval", "--prompt", "alpacca"],
        ["eval", "--protocol", "loglike"],
        ["compare", "here", "there"],
        ["merge"],
        ["diff"],
        ["report"],
        ["runs"],
        ["runs", "rm", "nothing"],
        ["show", "nothing"],
        ["plan", "llama7b_commonsense"],
        ["merge", "--dtype", "fp16"],
        ["download", "smollm"],
    ],
    ids=" ".join,
)
def test_what_needs_no_model_loads_no_torch(here, arguments):
    code, text, modules = spied(*arguments)
    assert code in (0, 2)
    assert text
    assert not modules & HEAVY


def test_rows_are_inspected_without_torch(here, tiny_base):
    write_recipe(here / "r.yaml", tiny_base, write_rows(here / "rows.json", rows(8)))
    code, text, modules = spied("data", "inspect", "r.yaml")
    assert code == 0
    assert "learned" in text
    assert "tokenizers" in modules
    assert "torch" not in modules


def test_the_package_itself_costs_no_torch_until_a_name_is_used():
    script = (
        "import sys, san_llm\n"
        "assert san_llm.__version__ and 'SanConfig' in san_llm.__all__\n"
        "assert 'torch' not in sys.modules and 'peft' not in sys.modules\n"
        "san_llm.propagation_graph\n"
        "assert 'torch' not in sys.modules\n"
        "try:\n    san_llm.nothing\n"
        "except AttributeError as error:\n    assert 'nothing' in str(error)\n"
        "else:\n    raise SystemExit('no AttributeError')\n"
        "from san_llm import SanConfig\n"
        "assert 'peft' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, capture_output=True)
