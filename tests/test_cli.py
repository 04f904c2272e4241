"""Manners at the prompt: exit codes, where text goes, and one plain line for a user's mistake."""

import json
import os
import pty
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import rows, save_tiny, write_recipe, write_rows

ROOT = Path(__file__).resolve().parents[1]
EIGHT = "boolq, piqa, social_i_qa, hellaswag, winogrande, ARC-Easy, ARC-Challenge, openbookqa"
NO_RUN = (
    "error: runs/latest: no run yet in this directory: `san-llm train RECIPE` makes one, "
    "or name a model or an adapter\n"
)
ANSI = "\x1b["
# What the libraries' own progress bars and notices look like.
LITTER = re.compile(r"it/s|\d%\||Loading weights|Writing model|Converting|Warning|warn", re.I)

# arguments; exit code; what stderr is, or begins with when it ends in "..."
MISTAKES = [
    (
        "train nope.yaml",
        2,
        "error: nope.yaml: no such recipe; shipped are llama13b_commonsense, ...",
    ),
    (
        "train smollm_demo",
        2,
        "error: smollm_demo: no such recipe (did you mean 'smollm2_demo'?); ...",
    ),
    ("train .", 2, "error: .: a directory; expected a recipe, a YAML file\n"),
    (
        "train",
        2,
        "error: no recipe named; `san-llm recipes list` shows those that are shipped\n",
    ),
    (
        "train broken.yaml",
        2,
        "error: broken.yaml:1: base.modle: unknown key (did you mean 'model'?)\n"
        "error: broken.yaml:3: training.learning_rate: expected a number, found 'fast'\n",
    ),
    ("train empty.yaml", 2, "error: empty.yaml: the file is empty\n"),
    ("train binary.yaml", 2, "error: binary.yaml: not UTF-8: byte 0 is not valid\n"),
    (
        "train smollm2_demo training.batchsize=4",
        2,
        "error: argument 'training.batchsize=4': training.batchsize: unknown key "
        "(did you mean 'batch_size'?)\n",
    ),
    (
        "train smollm2_demo batch",
        2,
        "error: argument 'batch': expected key=value, such as training.learning_rate=1e-3\n",
    ),
    (
        "train smollm2_demo data.train=nowhere.json",
        2,
        "error: nowhere.json: cannot be read: No such file or directory\n",
    ),
    (
        "train smollm2_demo data.train=bad.json",
        2,
        "error: bad.json: row 2: key 'output' is missing; found 'instruction', 'outptu' "
        "(did you mean 'outptu'?); data.columns says which column is which\n",
    ),
    ("train --resume", 2, NO_RUN),
    ("train . --resume", 2, "error: .: not a run: no recipe.yaml in it\n"),
    (
        "train --resume --output elsewhere",
        2,
        "error: --resume goes on in the run's own folder: no --output\n",
    ),
    (
        "train smollm2_demo --accelerate nowhere.yaml",
        2,
        "error: nowhere.yaml: no such file; `accelerate config` writes one, and shipped are ddp, "
        "deepspeed_zero2, deepspeed_zero3, fsdp2, two_nodes\n",
    ),
    ("train smollm2_demo --processes 0", 2, "Usage: san-llm train ..."),
    (
        "train smollm2_demo --learning-rate 1e-3",
        2,
        "error: --learning-rate: a recipe's key is written without dashes: training.learning_rate="
        "\n",
    ),
    ("train smollm2_demo --procesess 2", 2, "Usage: san-llm train ..."),
    ("eval", 2, NO_RUN),
    ("eval --base-only", 2, NO_RUN),
    ("eval --tasks bolq", 2, f"error: task 'bolq' is not one of {EIGHT} (did you mean 'boolq'?)\n"),
    ("eval --tasks boolq,", 2, f"error: task '' is not one of {EIGHT}\n"),
    ("eval --tasks=", 2, f"error: task '' is not one of {EIGHT}\n"),
    (
        "eval --prompt alpacca",
        2,
        "error: prompt style 'alpacca' is not one of llm-adapters, llm-adapters-aligned, alpaca, "
        "chat (did you mean 'alpaca'?)\n",
    ),
    ("eval --limit 0", 2, "Usage: san-llm eval ..."),
    ("eval --adapter nowhere", 2, "error: nowhere: not an adapter: no adapter_config.json in it\n"),
    (
        "eval --adapter nowhere --base-only",
        2,
        "error: --base-only and --adapter exclude each other\n",
    ),
    ("merge", 2, NO_RUN),
    (
        "merge --adapter nowhere",
        2,
        "error: nowhere: not an adapter: no adapter_config.json in it\n",
    ),
    (
        "merge --dtype bf16",
        2,
        "error: --dtype: 'bf16' is not one of float32, bfloat16, float16 "
        "(did you mean 'bfloat16'?)\n",
    ),
    (
        "download smollm",
        2,
        "error: smollm: neither a known name (smollm2-135m) nor a hub id such as "
        "meta-llama/Llama-2-7b-hf (did you mean 'smollm2-135m'?)\n",
    ),
    (
        "download no//body",
        2,
        "error: no//body: not a hub id; expected something like owner/name\n",
    ),
    ("download nobody/nothing", 1, "error: nobody/nothing: could not be downloaded: ..."),
    ("trian", 2, "...No such command 'trian'. Did you mean 'train'?\n"),
    ("recipes shwo", 2, "...No such command 'shwo'. Did you mean 'show'?\n"),
    ("recipes show", 2, "Usage: san-llm recipes show ..."),
]


@pytest.fixture
def files(here):
    (here / "broken.yaml").write_text(
        "base: {model: a, modle: b}\nmethod: {name: san}\n"
        "training: {learning_rate: fast}\ndata: {train: pocket, loss: all}\n"
    )
    (here / "empty.yaml").write_text("")
    (here / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (here / "bad.json").write_text(
        json.dumps([{"instruction": "a", "output": "b"}, {"instruction": "a", "outptu": "b"}])
    )
    return here


@pytest.mark.parametrize(("arguments", "code", "message"), MISTAKES, ids=[m[0] for m in MISTAKES])
@pytest.mark.usefixtures("files")
def test_a_mistake_is_told_on_stderr_alone_with_its_exit_code(cli, here, arguments, code, message):
    before = sorted(path for path in here.rglob("*") if path.is_file())
    done = cli(*arguments.split(), timeout=60)
    assert (done.returncode, done.stdout) == (code, "")
    if message.endswith("..."):
        assert done.stderr.startswith(message.removesuffix("..."))
    elif message.startswith("..."):
        assert done.stderr.endswith(message.removeprefix("..."))
    else:
        assert done.stderr == message
    assert "Traceback" not in done.stderr
    assert ANSI not in done.stderr
    after = sorted(path for path in here.rglob("*") if path.is_file())
    assert after == before, "nothing was started"


@pytest.mark.parametrize("debug", ["option", "variable"])
def test_debug_shows_the_traceback_and_keeps_the_exit_code(cli, debug):
    arguments = ["train", "nope.yaml"]
    environment = {"SAN_LLM_DEBUG": "1"} if debug == "variable" else {}
    done = cli(*(["--debug"] if debug == "option" else []), *arguments, **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback (most recent call last)" in done.stderr
    assert "InputError: nope.yaml: no such recipe" in done.stderr


def test_a_disk_that_is_full_is_told_in_one_line_and_nothing_half_is_left(command, here):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))  # bytes
    try:
        done = command("recipes", "copy", "smollm2_demo", "mine.yaml")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.returncode == 1
    assert done.stderr == "error: mine.yaml: cannot be written: File too large; make room\n"
    assert list(here.iterdir()) == []


def test_no_arguments_show_the_help_and_the_version_is_one_line(cli):
    assert "Commands:" in cli("--help").stdout
    assert re.fullmatch(r"san-llm \d+\.\d+\.\d+\n", cli("--version").stdout)
    assert cli().returncode == 2


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("san_llm.cli._check_options", "runs"),  # before the command
        ("san_llm.runs.listing.list_runs", "runs"),
        ("san_llm.plan.doctor.diagnose", "doctor"),
        ("san_llm.recipe.shipped.shipped_recipes", "recipes list"),
    ],
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_ctrl_c_ends_a_command_with_one_line(command, monkeypatch, where, words, rank):
    def pressed(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(where, pressed)
    monkeypatch.setenv("RANK", rank)  # of several processes one speaks
    done = command(*words.split())
    said = "interrupted\n" if rank == "0" else ""
    assert (done.returncode, done.stdout, done.stderr) == (130, "", said)


# --- terminals and pipes ---


def in_terminal(here, *arguments, **environment) -> str:
    """Run a command with a terminal of its own for stdout and stderr; return what it shows."""
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "san_llm", *arguments],
        cwd=here,
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm-256color", **environment},
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux says so when the other end is closed
            break
        if not part:
            break
        shown += part
    child.wait(timeout=60)
    os.close(ours)
    return shown.decode()


COLOUR = re.compile(r"\x1b\[(?:[0-9]+;)*(?:3[0-7]|4[0-7]|9[0-7]|38|48)[;m]")


@pytest.mark.parametrize("arguments", [("train", "nope"), ("recipes", "show", "smollm2_demo")])
def test_a_terminal_gets_colour_and_no_color_is_honoured(here, monkeypatch, arguments):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert COLOUR.search(in_terminal(here, *arguments))
    assert not COLOUR.search(in_terminal(here, *arguments, NO_COLOR="1"))


@pytest.mark.parametrize(
    "arguments",
    ["recipes list", "recipes list --json", "recipes show smollm2_demo", "--help", "train --help"],
)
def test_a_reader_that_stops_early_is_no_error_to_talk_about(here, arguments):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "san_llm", *arguments.split()],
        cwd=here,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


# --- models that are not there ---


@pytest.fixture
def recipe(here):
    write_rows(here / "rows.json", rows(12))
    return write_recipe(here / "mine.yaml", here / "model", here / "rows.json")


def last_line(done) -> str:
    assert done.returncode in (1, 2)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert sum(line.startswith("error:") for line in lines) == 1
    return lines[-1]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nowhere", "error: ./nowhere: no such folder"),
        ("smollm2-135m", "error: smollm2-135m: not here yet: `san-llm download smollm2-135m` gets"),
        ("rows.json", "error: rows.json: a file; expected a folder, a .gguf file or a hub id"),
        ("nobody/nothing", "error: nobody/nothing: no such folder, and not in the hub"),
        ("empty", "error: empty: no config.json in it, so it is not a model"),
    ],
)
@pytest.mark.slow
def test_a_base_that_is_not_there_is_told_before_a_run_is_made(cli, here, recipe, model, message):
    (here / "empty").mkdir()
    assert last_line(cli("train", recipe, f"base.model={model}")).startswith(message)
    assert not (here / "runs").exists()


@pytest.mark.slow
def test_a_base_that_is_not_there_is_told_before_processes_are_started(cli, here, recipe):
    done = cli("train", recipe, "base.model=nobody/nothing", "--processes", 2)
    assert last_line(done).startswith("error: nobody/nothing: no such folder, and not in the hub")
    assert not (here / "runs").exists()


@pytest.mark.slow
def test_a_family_that_is_not_supported_is_told_before_a_run_is_made(cli, here, recipe):
    (here / "model").mkdir()
    (here / "model" / "config.json").write_text(json.dumps({"model_type": "gpt9"}))
    assert "'gpt9': transformers has no such model" in last_line(cli("train", recipe))
    assert not (here / "runs").exists()


def test_a_download_from_a_hub_that_cannot_be_reached_is_one_line(cli, here):
    # Port 9 discards: nothing listens there, and the connection is refused at once.
    done = cli(
        "download",
        "nobody/nothing",
        HF_HUB_OFFLINE="0",
        HF_ENDPOINT="http://127.0.0.1:9",
        timeout=120,
    )
    assert last_line(done).startswith("error: nobody/nothing: could not be downloaded: ")
    assert "cannot be reached" in done.stderr
    assert not any(path.is_file() for path in (here / "models").rglob("*"))


# --- a whole run ---


@pytest.mark.fresh
@pytest.mark.slow
def test_results_go_to_stdout_as_json_and_no_library_litters_stderr(cli, command, here, recipe):
    save_tiny(here / "model")
    trained = cli("train", recipe, "training.max_steps=2", "--json")
    assert trained.returncode == 0, trained.stderr
    result = json.loads(trained.stdout)
    assert (result["finished"], result["steps"]) == (True, 2)
    # The resolved recipe is shown first, the method's name first in its section.
    assert trained.stderr.startswith("name: mine\nbase:\n")
    assert "\nmethod:\n  name: san\n" in trained.stderr

    data = write_rows(here / "data" / "boolq" / "test.json", rows(2)).parents[1]
    scored = cli("eval", "--tasks", "boolq", "--data", data, "--json")
    assert scored.returncode == 0, scored.stderr
    assert [task["task"] for task in json.loads(scored.stdout)["tasks"]] == ["boolq"]

    merged = cli("merge", "--verify", "--json")
    assert merged.returncode == 0, merged.stderr
    assert json.loads(merged.stdout)["output"] == str(Path(result["run"]) / "merged")

    for done in (trained, scored, merged):
        assert not LITTER.search(done.stderr), done.stderr
        assert ANSI not in done.stdout + done.stderr
        assert len(done.stdout.splitlines()) == 1

    shown = command("eval", "--tasks", "boolq", "--data", data, "--limit", 1)
    assert shown.returncode == 0, shown.stderr
    assert "boolq" in shown.stdout
    assert ANSI not in shown.stdout
    again = command("train", result["run"], "--resume")
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == f"error: {result['run']}: is finished; there is nothing to go on with\n"
