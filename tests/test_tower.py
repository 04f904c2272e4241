"""The plan of the package, held on its real imports: rows point down, each fact has one owner.

A module may import its own folder and what lies in a lower row, inside of functions, too; folders
that share a row do not know each other. Every rule returns what breaks it, so that each is also
tried on a small tower in which something does.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "san_llm"
ROWS = (
    ("__main__",),
    ("cli",),
    ("commands",),
    ("study",),
    ("look",),
    ("train",),
    ("evaluate",),
    ("ask",),
    ("merge",),
    ("export",),
    ("plan",),
    ("data",),
    ("models",),
    ("launch",),
    ("runs",),
    ("recipe",),
    ("san",),
    ("measure",),
    ("architectures", "protocol"),
    ("ops",),
    ("files", "shown", "progress", "errors"),
)
GROUND = set(ROWS[-1])  # modules in no folder, which share the lowest row and may use each other
DOOR = "__init__"  # the package's own: public names on first use, and the version
STAGES = ("study", "train", "evaluate", "merge", "plan")
MOST_MODULES = 16  # in a folder; commands/ has a file for each command
TORCH = {"torch", "transformers", "datasets", "peft", "accelerate", "bitsandbytes", "trl"}
# The only modules that may bring torch along when they are imported. Every other one answers at
# the prompt: a help page, a wrong recipe or a finished result waits for nothing.
MAY_TORCH = {
    *("ask.answers", "ask.beam_search", "ask.likelihood", "ask.losses", "ask.packed"),
    *("ask.harness", "ask.respond", "ask.rows"),
    *("data.batches", "data.tokenized"),
    *("evaluate.identity", "evaluate.pose", "evaluate.run"),
    "launch.heartbeat",
    *("merge.in_memory", "merge.peft", "merge.quantized", "merge.stock_logits", "merge.verify"),
    *("measure.behaviour", "measure.copies", "measure.experts", "measure.folds"),
    *("measure.in_files", "measure.norms", "measure.probe", "measure.rooted"),
    *("measure.rotation", "measure.run"),
    *("models.from_gguf", "models.load", "models.quantize"),
    "models.rotary",
    *("ops.attention", "ops.causal", "ops.experts", "ops.head_loss", "ops.scale"),
    *("plan.faked", "plan.largest", "plan.measured", "plan.saved"),
    *("san.config", "san.experts", "san.layer", "san.lean", "san.merging", "san.model"),
    *("san.norms", "san.rows"),
    *("train.batches", "train.callbacks", "train.checkpoint_check", "train.loss"),
    *("train.packed_attention", "train.prepare", "train.resume", "train.run", "train.samples"),
    *("train.stop", "train.trainer", "train.view"),
}
PURE = ("architectures", "protocol", "recipe", "runs")
HEAVY = TORCH | {"numpy"}
# What only one place may know: words of the code, and the modules or folders that may hold them.
OWNERS = {
    r"base_model\.model": {"models.adapter"},
    r"results\.json": {"runs.record", "commands.eval"},  # the latter in a help text
    r"(import|from) bitsandbytes": {"models.quantize", "san.rows"},
    r"_proj\b": {"architectures", "commands.show"},  # the latter in a help text
}

Sources = dict[str, str]


def read_sources() -> Sources:
    """Return the text of every module by its name below the package: ``train.run``."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text(encoding="utf-8")
        for path in sorted(PACKAGE.rglob("*.py"))
    }


@pytest.fixture(scope="module")
def sources() -> Sources:
    return read_sources()


# --- reading imports ---


def names(source: str, lazy: bool) -> set[str]:
    """Return the full names that a module imports, ``san_llm.train.run.train``.

    Args:
        source: Its text.
        lazy: Whether those count that are imported later, inside of functions, or for types.
    """
    full, pending = set(), list(ast.parse(source).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            full |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            full |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.body if lazy else node.orelse
        elif lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending += list(ast.iter_child_nodes(node))
    return full


def roots(source: str, lazy: bool = True) -> set[str]:
    """Return the packages that a module imports."""
    return {name.split(".")[0] for name in names(source, lazy)}


def own(sources: Sources, module: str, lazy: bool = True) -> set[str]:
    """Return which of the package's modules a module imports."""
    modules = set()
    for name in names(sources[module], lazy):
        parts = name.split(".")
        if parts[0] == "san_llm":
            ends = (".".join(parts[1:end]) for end in range(len(parts), 1, -1))
            modules.add(next((end for end in ends if end in sources), DOOR))
    return modules - {DOOR}


def reached(arrows: dict[str, set[str]], module: str) -> set[str]:
    """Return the modules that a module comes to; itself only by a circle."""
    seen: set[str] = set()
    pending = list(arrows[module])
    while pending:
        other = pending.pop()
        if other not in seen:
            seen.add(other)
            pending += arrows[other]
    return seen


def room(module: str) -> str:
    """Return the folder of a module; of one that is in no folder its own name."""
    return module.split(".")[0]


def code_of(source: str) -> str:
    """Return a source without comments and docstrings, which may speak of anything."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            first.value.value = ""
    return ast.unparse(tree)


# --- the rules: each returns what breaks it ---


def pointing_up(sources: Sources) -> list[str]:
    rows = {name: number for number, rooms in enumerate(ROWS) for name in rooms}
    wrong = [f"{module} has no row" for module in sources if room(module) not in {*rows, DOOR}]
    for module in sources.keys() - {DOOR}:
        for other in own(sources, module):
            same = room(module) == room(other) or {module, other} <= GROUND
            if not same and rows.get(room(other), -1) <= rows.get(room(module), -1):
                wrong.append(f"{module} imports {other}")
    return sorted(wrong)


def circles(sources: Sources) -> list[str]:
    arrows = {module: own(sources, module) for module in sources}
    return [
        f"{module} comes back to itself" for module in arrows if module in reached(arrows, module)
    ]


def out_of_shape(sources: Sources) -> list[str]:
    wrong = [f"{module} lies too deep" for module in sources if module.count(".") > 1]
    for folder in sorted({room(module) for module in sources if "." in module}):
        body = ast.parse(sources.get(f"{folder}.__init__", "")).body
        if len(body) != 1 or not (
            isinstance(body[0], ast.Expr) and ast.get_docstring(ast.Module(body, []))
        ):
            wrong.append(f"{folder}/__init__.py is not one docstring")
        modules = [m for m in sources if m.startswith(f"{folder}.") and not m.endswith("__init__")]
        if folder != "commands" and len(modules) > MOST_MODULES:
            wrong.append(f"{folder} has {len(modules)} modules")
    return wrong


def bringing_torch(sources: Sources) -> set[str]:
    arrows = {module: own(sources, module, lazy=False) for module in sources}
    heavy = {module for module in sources if roots(sources[module], lazy=False) & TORCH}
    return {module for module in sources if ({module} | reached(arrows, module)) & heavy}


def impure(sources: Sources) -> list[str]:
    return [
        f"{module} imports {name}"
        for module, source in sources.items()
        if room(module) in PURE
        for name in sorted(roots(source) & HEAVY)
    ]


def known_elsewhere(sources: Sources) -> list[str]:
    return [
        f"{module} knows {pattern}"
        for pattern, owners in OWNERS.items()
        for module, source in sources.items()
        if not {module, room(module)} & owners and re.search(pattern, code_of(source))
    ]


def without_story(sources: Sources) -> list[str]:
    return [f"{stage} has no run.py" for stage in STAGES if f"{stage}.run" not in sources]


# --- the package keeps them ---


def test_rows_point_down_only(sources):
    assert pointing_up(sources) == []


def test_no_module_comes_back_to_itself(sources):
    assert circles(sources) == []


def test_folders_are_flat_small_and_say_what_they_are(sources):
    assert out_of_shape(sources) == []


def test_the_modules_that_bring_torch_are_those_that_may(sources):
    assert bringing_torch(sources) == MAY_TORCH


def test_what_a_model_a_task_a_recipe_and_a_run_are_needs_no_numbers(sources):
    assert impure(sources) == []


def test_each_fact_has_one_owner(sources):
    assert known_elsewhere(sources) == []


def test_every_stage_tells_its_story_in_run(sources):
    assert without_story(sources) == []


def test_the_tuner_registers_itself_where_its_own_modules_import_peft(sources):
    from san_llm.san.register import IMPORTING_PEFT

    importing = {m for m in sources if room(m) == "san" and "peft" in roots(sources[m], lazy=False)}
    assert {f"san_llm.{module}" for module in importing} == IMPORTING_PEFT


def test_the_tree_in_the_docs_says_what_the_folders_say(sources):
    page = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    tree = dict(re.findall(r"^(\w+)/ +(\S.*)$", page, re.MULTILINE))
    folders = {
        room(m): ast.get_docstring(ast.parse(sources[m]))
        for m in sources
        if m.endswith(".__init__")
    }
    assert tree == folders
    assert list(tree) == [name for rooms in ROWS for name in rooms if name in folders]


def test_every_question_of_the_first_day_is_answered_by_a_file_that_is_there():
    page = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+\?) +\| `(.+)` \|$", page, re.MULTILINE)
    assert len(rows) == 12
    for _, place in rows:
        assert (PACKAGE / place).exists(), place


# --- and each rule can fail ---


SOUND = {
    "__init__": '"""The package."""\n__version__ = "1"\n',
    "errors": "class SanError(Exception):\n    pass\n",
    "files": "from san_llm.errors import SanError\n",
    "ops.__init__": '"""Arithmetic."""\n',
    "ops.scale": "import torch\n",
    "runs.__init__": '"""Runs."""\n',
    "runs.record": "from san_llm.files import SanError\n",
    "train.__init__": '"""Training."""\n',
    "train.run": "def train():\n    import torch\n    from san_llm.runs import record\n",
}


def test_a_sound_tower_breaks_no_rule():
    for rule in (pointing_up, circles, out_of_shape, impure, known_elsewhere):
        assert rule(SOUND) == [], rule
    assert bringing_torch(SOUND) == {"ops.scale"}


@pytest.mark.parametrize(
    ("rule", "changes", "said"),
    [
        (
            pointing_up,
            {"errors": "from san_llm.runs import record\n"},
            "errors imports runs.record",
        ),
        (
            pointing_up,
            {"runs.record": "def late():\n    from san_llm.train.run import train\n"},
            "runs.record imports train.run",
        ),
        (
            pointing_up,
            {"architectures.a": "from san_llm.protocol.b import b\n", "protocol.b": ""},
            "architectures.a imports protocol.b",
        ),
        (pointing_up, {"utils": ""}, "utils has no row"),
        (
            circles,
            {
                "ops.a": "from san_llm.ops import b\n",
                "ops.b": "def late():\n    from san_llm.ops.a import a\n",
            },
            "ops.b comes back to itself",
        ),
        (out_of_shape, {"ops.deep.a": ""}, "ops.deep.a lies too deep"),
        (
            out_of_shape,
            {"ops.__init__": '"""Arithmetic."""\nfrom san_llm.ops import scale\n'},
            "ops/__init__.py is not one docstring",
        ),
        (out_of_shape, {"plan.run": ""}, "plan/__init__.py is not one docstring"),
        (out_of_shape, {f"ops.m{n}": "" for n in range(16)}, "ops has 17 modules"),
        (impure, {"runs.record": "def late():\n    import numpy\n"}, "runs.record imports numpy"),
        (
            known_elsewhere,
            {"train.run": 'PREFIX = "base_model.model."\n'},
            r"train.run knows base_model\.model",
        ),
        (
            known_elsewhere,
            {"train.run": "def late():\n    from bitsandbytes import nn\n"},
            "train.run knows (import|from) bitsandbytes",
        ),
        (known_elsewhere, {"runs.record": 'TARGET = "q_proj"\n'}, r"runs.record knows _proj\b"),
        (
            known_elsewhere,
            {"train.run": 'open("results.json")\n'},
            r"train.run knows results\.json",
        ),
        (without_story, {}, "merge has no run.py"),
    ],
)
def test_a_broken_rule_is_told(rule, changes, said):
    assert said in rule(SOUND | changes)


def test_torch_behind_another_module_is_seen_and_inside_a_function_is_not():
    behind = SOUND | {"files": "from san_llm.ops import scale\n"}
    assert bringing_torch(behind) == {"ops.scale", "files", "runs.record"}
