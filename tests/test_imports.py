"""Imports point down only, and what answers at the prompt loads no torch."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "san_llm"
HEAVY = {"torch", "transformers", "datasets", "peft", "accelerate", "bitsandbytes", "trl"}
# These answer a wrong recipe, --help or a finished result: nothing of them waits for torch.
LIGHT = [
    "__init__",
    "__main__",
    "adapter_card",
    "allocator",
    "checkpoint",
    "cli",
    "commands.complete",
    "commands.doctor",
    "commands.options",
    "commands.plan",
    "commands.push",
    "commands.recipes",
    "commands.report",
    "commands.runs",
    "commands.show",
    "commands.talk",
    "data.build",
    "data.commands",
    "data.prompts",
    "data.raw",
    "data.render",
    "data.rows",
    "data.tasks",
    "diff",
    "direct_file",
    "doctor",
    "download",
    "engine",
    "errors",
    "estimate",
    "evaluate.compare",
    "evaluate.compare_tables",
    "evaluate.fingerprint",
    "evaluate.protocol",
    "evaluate.published",
    "evaluate.questions",
    "evaluate.report",
    "evaluate.score",
    "evaluate.store",
    "fold_columns",
    "gguf_export",
    "launch",
    "locate",
    "lock",
    "merge",
    "model_diff",
    "page.drawings",
    "page.facts",
    "page.judged",
    "page.part",
    "page.render",
    "page.repeat",
    "page.side_by_side",
    "peft_hook",
    "plan",
    "plots",
    "processes",
    "progress",
    "push",
    "recipe",
    "record",
    "run_numbers",
    "runs",
    "san.carriers",
    "san.graph",
    "shards",
    "size",
    "sketch",
    "streamed",
    "subject",
    "weight_check",
]
# What a module may import of the package, as far down as it may look.
ORDER = [
    {"errors", "progress", "san.carriers", "evaluate.published", "peft_hook", "direct_file"},
    {"data.prompts", "data.tasks", "san.graph", "lock", "push", "size"},
    {"recipe", "data.rows", "shards", "evaluate.protocol"},
    {
        "record",
        "engine",
        "evaluate.score",
        "evaluate.questions",
        "streamed",
        "fold_columns",
        "weight_check",
    },
    {"subject", "launch", "model_diff", "evaluate.report", "download", "gguf_export", "checkpoint"},
    {"locate", "processes", "evaluate.fingerprint", "adapter_card", "evaluate.questions"},
    {"merge", "evaluate.store"},
    {"evaluate.compare"},
    {"evaluate.compare_tables"},
    {"diff"},
    {"run_numbers"},
    {"plots", "sketch"},
]
COMMANDS = ["", "download", "train", "eval", "merge", "diff", "compare", "recipes"]
COMMANDS += ["generate", "chat", "doctor", "report", "plan"]
COMMANDS += ["data", "data build", "data inspect"]
COMMANDS += ["recipes list", "recipes show", "recipes copy"]
COMMANDS += ["recipes check", "recipes schema", "runs", "runs rm", "push", "show"]


def path_of(module: str) -> Path:
    return PACKAGE / f"{module.replace('.', '/')}.py"


def imported(module: str) -> set[str]:
    """Return the full names that a module's source imports when it is imported itself."""
    found = set()
    pending = list(ast.parse(path_of(module).read_text(encoding="utf-8")).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            pending += list(ast.iter_child_nodes(node))
    return found


def own(module: str) -> set[str]:
    """Return which of the package's modules a module imports at its top."""
    modules = set()
    for name in imported(module):
        parts = name.split(".")
        if parts[0] != "san_llm":
            continue
        here = [".".join(parts[1:end]) for end in range(len(parts), 1, -1)]
        modules |= {next((part for part in here if path_of(part).is_file()), "__init__")}
    return modules


def everything(module: str) -> set[str]:
    """Return all modules of the package that importing one brings in."""
    seen, pending = set(), [module]
    while pending:
        for name in own(pending.pop()) - seen:
            seen.add(name)
            pending.append(name)
    return seen


def all_modules() -> list[str]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return [".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in paths]


def test_the_reading_of_sources_sees_what_is_there():
    assert "torch" in imported("data.encode")
    assert "datasets.Dataset" not in imported("data.encode")  # for types only
    assert "data.rows" in own("data.encode")
    assert "record" in everything("data.encode")
    assert set(LIGHT) <= set(all_modules())


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_module_imports_nothing_heavy(module):
    for name in {module, *everything(module)}:
        roots = {full.split(".")[0] for full in imported(name)}
        assert not roots & HEAVY, f"{module} comes to {name}"


@pytest.mark.parametrize("module", all_modules())
def test_no_module_imports_one_that_imports_it(module):
    assert module == "__init__" or module not in everything(module)


def test_imports_below_the_line_point_down():
    rank = {name: number for number, names in enumerate(ORDER) for name in names}
    for module in rank:
        for other in own(module) - {"__init__"}:
            assert other in rank, f"{module} imports {other}"
            assert rank[other] < rank[module], f"{module} imports {other}"


@pytest.mark.parametrize("module", [name for name in all_modules() if name.startswith("san.")])
def test_the_tuner_imports_only_itself_and_errors(module):
    outside = {name for name in everything(module) if not name.startswith("san.")}
    assert outside <= {"__init__", "errors"}


def test_nothing_imports_the_command_line_but_its_door():
    for module in set(all_modules()) - {"__main__"}:
        assert "cli" not in own(module), module


def test_only_one_file_knows_bitsandbytes():
    users = {
        module
        for module in all_modules()
        if any(
            name.split(".")[0] == "bitsandbytes"
            for node in ast.walk(ast.parse(path_of(module).read_text(encoding="utf-8")))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in ([a.name for a in node.names] + [getattr(node, "module", "") or ""])
        )
    }
    assert users == {"quantize", "san.weight_rows"}


# What a command has loaded is written to stderr when it ends, whatever it ends with.
SPY = (
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
