"""The documentation: it builds, its reference is the program's, and every command line runs.

A page is read as a session, in a folder of its own: its ``sh`` blocks are run in their order,
blocks with a ``title`` are files to write first, ``python`` blocks are executed. What a reader has
at the start is there, tiny (`start`); options after a line make it small (`SMALL`).
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from tiny import rows, save_tiny, write_rows
from tiny_gguf import gguf_model, write_gguf

from san_llm.architectures.entry import Carry
from san_llm.cli import app
from san_llm.data.sources import POCKET
from san_llm.data.split import held_out_count
from san_llm.models.from_gguf import convert_gguf
from san_llm.recipe.aliases import ALIASES, NONE
from san_llm.recipe.read import parse_recipe
from san_llm.recipe.schema import LoraMethod, Recipe, section_keys
from san_llm.recipe.steps import warmup_of
from san_llm.san.formulas import carried, merged_weight

ROOT = Path(__file__).resolve().parents[1]
GENERATED = {"commands.md", "recipe.md"}
PAGES = [
    *("README.md", "SECURITY.md", "recipes/README.md", "benchmarks/README.md"),
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
]
# What cannot run here: the test that runs the same thing in small, or what it would need.
WORKERS = "tests/launch/test_command.py::test_two_processes_give_the_weights_of_one"
LAUNCHERS = "tests/launch/test_command.py::test_a_launcher_of_the_users_own_trains_as_one"
ENGINES = "tests/launch/test_engine.py::test_an_engine_gives_the_weights_of_one_process"
HARNESS = (
    "tests/evaluate/test_harness.py::test_a_run_is_asked_in_its_frame_and_compared_with_its_base"
)
NOT_HERE = {
    "python -m pip install pip-audit": "asks a package index",
    'pip install "transformers[serving]"': "asks a package index",
    "transformers serve merged --port 8000": "needs transformers[serving], and stays",
    "llama-server -m merged/model.gguf --port 8000": "needs llama.cpp, and stays",
    "ollama create mine -f merged/Modelfile": "needs Ollama",
    'ollama run mine "Is ice frozen water?"': "needs Ollama",
    'curl localhost:8000/v1/completions -H "Content-Type: application/json" -d @ask.json': (
        "needs one of the two servers"
    ),
    "pip-audit --no-deps --disable-pip -r constraints.txt": "asks a database of weaknesses",
    "san-llm download smollm2-135m": "asks a package index",
    "san-llm data build commonsense --from hub": (
        "tests/data/test_build.py::test_the_hubs_parquet_files_give_the_same_rows"
    ),
    "san-llm eval --protocol lm-eval --tasks gsm8k,mmlu": HARNESS,
    "san-llm eval --protocol lm-eval --tasks my_harness_task.yaml --base-only": HARNESS,
    "san-llm train mine.yaml --processes 8": WORKERS,
    "san-llm train mine.yaml --accelerate fsdp2": ENGINES,
    "san-llm train mine.yaml --accelerate config.yaml": ENGINES,
    "accelerate launch --config_file config.yaml -m san_llm train mine.yaml": LAUNCHERS,
    "torchrun --nproc_per_node 8 -m san_llm train mine.yaml": LAUNCHERS,
    "python scripts/make_package_rows.py benchmarks/study/rows": "asks Debian's mirrors",
    "san-llm study benchmarks/study/packages.yaml --processes 2": "takes hours",
    "san-llm study recipes/study_example.yaml --processes 2": (
        "tests/study/test_study.py::test_what_it_came_to_is_what_runs_and_evaluations_have_written"
    ),
    "make demo": "tests/test_end_to_end.py::test_train_eval_merge_and_a_stock_answer",
    "make test": "this is it",
    "make setup": "it made the environment of this test",
    "make check": "make test runs it before this test",
    "make pytest": "this is it",
    "make lowest": "it makes an environment of its own, after this one",
    "make gpu": "needs a GPU; benchmarks/gpu.py runs anywhere by --device cpu",
}
# What a reader of the page has done before.
BEFORE = dict.fromkeys(("docs/asking.md", "docs/evaluation.md"), "san-llm train smollm2_demo")
# Options after a command line that make it small, or give it a base that is here.
TINY = (
    *("base.model=models/smollm2-135m", "base.dtype=float32", "data.cutoff=2048"),
    *("data.held_out=2", "data.limit=12", "training.max_steps=2", "training.batch_size=4"),
    *("training.evaluate_every=2", "evaluation.limit=1"),
)
SMALL = {
    "train": TINY,
    "data inspect": TINY[:3],
    "eval": ("--limit", "1"),
    "generate": ("--max-new-tokens", "4"),
}
PROGRAMS = (
    r"(?:san-llm|pip|pip-audit|python3?|make|torchrun|accelerate|transformers|llama-\w+|curl|hf"
    r"|pytest|sbatch|git)"
)
SHELL = ("$EDITOR", "cat", "ls")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    title: str | None
    text: str

    def commands(self) -> list[str]:
        """Return its command lines, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        said = [re.sub(r"(^|\s)#.*", "", line).strip() for line in lines]
        return [" ".join(line.split()) for line in said if line]


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page."""
    found = []
    text = (ROOT / page).read_text(encoding="utf-8")
    for match in re.finditer(r"^( *)```(\w*)(.*)\n((?:.*\n)*?)\1```$", text, re.MULTILINE):
        indent, language, about, inside = match.groups()
        inside = re.sub(rf"^{indent}", "", inside, flags=re.MULTILINE)
        title = re.search(r'title="([^"]+)"', about)
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(page, line, language, title and title[1], inside))
    return found


def session(page: str) -> list[str]:
    return [
        command
        for block in blocks(page)
        if block.language in ("sh", "console")
        for command in block.commands()
    ]


SESSIONS = {page: session(page) for page in PAGES}


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(module)
    return module


# --- the site ---


def test_the_site_builds_with_every_link_alive_and_needs_no_network(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(PAGES)
    fetched = re.compile(r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"'](?:https?:)?//")
    linked = re.compile(
        r"<link[^>]*rel=[\"'](?:stylesheet|preload|icon)[\"'][^>]*href=[\"']https?:"
    )
    for page in pages:
        html = page.read_text(encoding="utf-8")
        assert not fetched.search(html), page
        assert not linked.search(html), page


@pytest.mark.parametrize("page", sorted(GENERATED))
def test_the_reference_is_what_the_program_says(page):
    made = getattr(script("make_reference"), f"{page.removesuffix('.md')}_page")()
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == made, (
        f"python scripts/make_reference.py writes docs/{page} anew"
    )


def test_every_key_of_a_recipe_says_what_it_means():
    table = re.findall(
        r"^\| `(\w+\.\w+)` .*\| (.*?) ?\|$", script("make_reference").recipe_page(), re.M
    )
    assert len(table) > 50
    assert {key for key, meaning in table if not meaning} == {"method.name"}


# --- command lines ---


def test_blocks_are_found_with_their_commands_and_titles():
    (readme,) = [block for block in blocks("README.md") if "merge --verify" in block.text]
    assert readme.commands()[-1] == "san-llm merge --verify"
    assert sum(map(len, SESSIONS.values())) > 30


@pytest.mark.parametrize("page", [p for p in PAGES if Path(p).name not in GENERATED])
def test_command_lines_stand_in_blocks_that_are_run(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in blocks(page):
        if block.language in ("", "text"):
            assert not re.search(rf"^(\$ )?{PROGRAMS} ", block.text, re.M), (page, block.line)
    indented = re.findall(rf"^(?: {{4,}}|\t)(?:\$ )?{PROGRAMS} .*$", text, re.M)
    inside = {line.strip() for block in blocks(page) for line in block.text.splitlines()}
    assert not [line for line in indented if line.strip() not in inside]


def test_what_is_said_not_to_run_stands_somewhere_and_names_a_test_that_exists():
    every = {command for commands in SESSIONS.values() for command in commands}
    assert set(NOT_HERE) <= every
    for why in NOT_HERE.values():
        if "::" in why:
            file, name = why.split("::")
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8")


def check(words: list[str]) -> None:
    """Hold the words of a line against the commands and options that there are."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"no such command: {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    known = {"--help"}.union(*((*one.opts, *one.secondary_opts) for one in command.params))
    options = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    assert options <= known, f"no such options: {options - known}"


MENTIONED = re.compile(r"`(san-llm [^`]+)`")


def mentioned() -> list[str]:
    """Return the lines of help pages, of prose and of `NOT_HERE`: they have to be possible."""
    lines = [
        line
        for block in blocks("docs/commands.md")
        for line in block.text.splitlines()
        if block.language == "text"
    ]
    lines += [line.split(" -m ")[-1] for line in NOT_HERE if re.search(r"san[-_]llm", line)]
    for page in PAGES:
        lines += MENTIONED.findall((ROOT / page).read_text(encoding="utf-8").replace("\n", " "))
    return sorted({" ".join(re.split(r" [<>|] ", line)[0].split()) for line in lines})


@pytest.mark.parametrize("line", mentioned())
def test_a_command_that_help_or_prose_mentions_exists_with_its_options(line):
    check(shlex.split(line)[1:])


def test_the_reading_of_a_command_line_sees_mistakes():
    check(["eval", "--limit", "3"])
    for wrong in (["evla"], ["eval", "--limits", "3"], ["eval", "-x"], ["recipes", "chek"]):
        with pytest.raises(AssertionError, match="no such"):
            check(wrong)


# --- pictures ---


def drawn(picture: str) -> dict[str, np.ndarray]:
    """Return the numbers of each grid in one of the pictures of the method, by its id."""
    root = ElementTree.parse(ROOT / "docs" / "pictures" / f"san-{picture}.svg").getroot()
    svg = "{http://www.w3.org/2000/svg}"
    grids = {}
    for group in root.iter(f"{svg}g"):
        texts = [
            (float(text.attrib["y"]), float(str(text.text).replace("\N{MINUS SIGN}", "-")))
            for text in group.iter(f"{svg}text")
        ]
        rows = sorted({y for y, _ in texts})
        grids[group.attrib["id"]] = np.array([[n for y, n in texts if y == row] for row in rows])
    return grids


def test_the_numbers_in_the_pictures_are_those_of_the_method():
    neuron, synapse, merge = drawn("neuron"), drawn("synapse"), drawn("merge")
    wx = neuron["W"] @ neuron["x"]
    assert np.array_equal(neuron["Wx"], wx)
    assert np.array_equal(neuron["y"], neuron["gamma"] * wx)

    gamma, v = synapse["gamma"], synapse["V"]
    assert np.array_equal(gamma, neuron["gamma"])
    assert np.array_equal(synapse["s"], gamma.T)
    assert np.array_equal(synapse["Vs"], v * gamma.T)
    assert np.array_equal(synapse["z"].T, synapse["Vs"] @ neuron["y"])
    assert np.array_equal(synapse["base"].T, v @ wx)

    assert np.array_equal(merge["s"], gamma.T)
    assert np.array_equal(merge["V"], v)
    # The merge's own arithmetic, on the numbers of the picture.
    merged = merged_weight(v, merge["gamma"][:, 0], None, merge["s"][0])
    assert np.array_equal(merge["merged"], merged)

    four_times = Carry(0, 3, groups=1, head_dim=0, tile=4)
    assert np.array_equal(drawn("swin")["tile"][0], carried(gamma[:, 0], four_times))


# --- recipes translated from other programs ---


def translated() -> tuple[dict[str, Any], Recipe, dict[str, Any], Recipe]:
    """Return what the page of the move shows: a command line and a YAML, each with its recipe."""
    page = blocks("docs/moving.md")
    (line,) = [block.text for block in page if "finetune.py" in block.text]
    flags = dict(re.findall(r"--(\w+) '?([^'\s]+)", line))
    named = {block.title: block.text for block in page if block.title}
    return (
        {key: yaml.safe_load(value) for key, value in flags.items()},
        parse_recipe(named["math.yaml"], "math.yaml"),
        yaml.safe_load(named["llama3_lora_sft.yaml"]),
        parse_recipe(named["alpaca.yaml"], "alpaca.yaml"),
    )


def test_a_translated_command_line_of_llm_adapters_says_the_same():
    flags, recipe, _, _ = translated()
    training, data, method = recipe.training, recipe.data, recipe.method
    assert flags == {
        "base_model": recipe.base.model,
        "data_path": data.train,
        "output_dir": "./trained_models/llama-lora",
        "batch_size": training.batch_size,
        "micro_batch_size": training.micro_batch_size,
        "num_epochs": training.epochs,
        "learning_rate": f"{training.learning_rate * 1e4:g}e-4",  # text, by YAML 1.1
        "cutoff_len": data.cutoff,
        "val_set_size": held_out_count(data, 170_000),
        "adapter_name": method.name,
    }
    # Defaults of its script that are not ours.
    assert isinstance(method, LoraMethod)
    assert (method.rank, method.alpha, method.dropout) == (8, 16, 0.05)
    assert (training.warmup_steps, training.schedule, data.loss) == (100, "linear", "all")


def test_the_tables_of_the_move_are_what_a_recipe_with_a_key_of_others_is_told():
    text = (ROOT / "docs" / "moving.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]*) \| (.*) \|$", text, re.MULTILINE)
    told = {
        name: what
        for names, what in rows
        for name in re.findall(r"`-{0,2}(\w+)", names)
        if name != "finetune"
    }
    ours = {key for keys in section_keys().values() for key in keys}
    assert set(ALIASES) <= told.keys()
    # The rest is called so here, too, or is no key but a command.
    commands = {"WORLD_SIZE", "llamafactory", "chat", "export"}
    assert told.keys() - set(ALIASES) - ours <= commands | {"dora"}
    for name, place in ALIASES.items():
        key = re.split("[:,]", place)[0].rpartition(".")[2]
        assert key in told[name] or (place.startswith(NONE) and "(" in told[name]), name


def test_every_key_that_another_program_has_is_called_something_that_a_recipe_has():
    keys = {f"{section}.{key}" for section, keys in section_keys().items() for key in keys}
    for place in ALIASES.values():
        named = re.split("[:,]", place)[0]
        assert named in keys or re.match(r"none$|--\w+|san-llm ", named), place


def test_a_translated_file_of_llama_factory_says_the_same():
    _, _, told, recipe = translated()
    training, data, method = recipe.training, recipe.data, recipe.method
    assert told["model_name_or_path"] == recipe.base.model
    assert told["trust_remote_code"] == recipe.base.trust_remote_code
    assert isinstance(method, LoraMethod)
    assert (told["lora_rank"], 2 * told["lora_rank"]) == (method.rank, method.alpha)
    assert method.dropout == 0
    names = tuple(f"data/{name}.json" for name in told["dataset"].split(","))
    assert (names, told["cutoff_len"]) == (data.train, data.cutoff)
    assert told["preprocessing_num_workers"] == data.workers
    rows = told["per_device_train_batch_size"] * told["gradient_accumulation_steps"]
    assert (rows, told["per_device_train_batch_size"]) == (
        training.batch_size,
        training.micro_batch_size,
    )
    assert told["learning_rate"] == training.learning_rate
    assert told["num_train_epochs"] == training.epochs
    assert told["lr_scheduler_type"] == training.schedule
    assert told["save_steps"] == training.evaluate_every
    steps = training.epochs * math.ceil((91 + told["max_samples"]) / rows)
    assert warmup_of(training, steps) == math.ceil(told["warmup_ratio"] * steps)


# --- sessions ---


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "tiny", max_position_embeddings=4096)


def start(page: str, base: Path, command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make what a reader of the page has: a base, rows, the protocol's data, perhaps a run."""
    if page in ("docs/four-bit.md", "docs/serving.md"):  # which write GGUF: a tokenizer of bytes
        model = gguf_model(hidden_size=64, intermediate_size=128, max_position_embeddings=4096)
        convert_gguf(write_gguf(Path("tiny.gguf"), model), Path("models/smollm2-135m"))
    else:
        shutil.copytree(base, "models/smollm2-135m")
    write_rows(Path("my_rows.json"), rows(20))
    if page == "docs/data.md":  # which is about where the protocol's data come from
        turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
        Path("rows.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 3, encoding="utf-8")
        raw = {"question": "is it raining", "passage": "It rains.", "answer": True}
        Path("downloads/BoolQ").mkdir(parents=True)
        for split in ("train", "dev"):
            Path(f"downloads/BoolQ/{split}.jsonl").write_text(f"{json.dumps(raw)}\n" * 4)
    else:
        shutil.copytree(POCKET, "data/commonsense")
        Path("data/commonsense/train.json").rename("data/commonsense/commonsense_170k.json")
    if page == "docs/study.md":
        shutil.copytree(ROOT / "recipes", "recipes")
    if page in BEFORE:
        run(BEFORE[page], page, command, monkeypatch)


def smaller(words: list[str]) -> list[str]:
    for start, more in SMALL.items():
        if words[: len(start.split())] == start.split() and "--resume" not in words:
            return [*words, *more]
    return words


@pytest.mark.parametrize("page", [page for page, commands in SESSIONS.items() if commands])
def test_a_page_is_a_session_that_works(page, here, base, command, monkeypatch):
    start(page, base, command, monkeypatch)
    monkeypatch.setenv("EDITOR", "true")
    for block in blocks(page):
        if block.title is not None:
            assert not Path(block.title).is_absolute()
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            Path(block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.text, f"{page}:{block.line}", "exec"), {"__name__": "__page__"})
        elif block.language in ("sh", "console"):
            for line in block.commands():
                if line not in NOT_HERE:
                    run(line, f"{page}:{block.line}: {line}", command, monkeypatch)


def run(line: str, where: str, command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a line: our own commands and scripts in this process, others in a shell."""
    line, _, target = line.partition(" > ")
    words = shlex.split(line)
    if words[0] == "san-llm":
        done = command(*smaller(words[1:]))
        assert done.returncode == 0, f"{where}\n{done.stderr}"
        if target:
            Path(target).write_text(done.stdout, encoding="utf-8")
    elif words[0] == "python" and words[1].startswith("examples/"):
        monkeypatch.setattr(sys, "argv", words[1:])
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    else:
        assert words[0] in SHELL, f"{where}: neither run nor in NOT_HERE"
        subprocess.run(["bash", "-euc", line], check=True, timeout=60)
