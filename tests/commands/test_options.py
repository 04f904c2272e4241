"""What the shell offers: asked as the shell asks, and installed into a home of the test's own."""

import subprocess
import sys

import pytest


@pytest.fixture
def offered(cli, here):
    """Return what bash is offered for the last of some words."""
    for name in ("one-1", "one-2"):
        (here / "runs" / name).mkdir(parents=True)
        (here / "runs" / name / "recipe.yaml").write_text("")
    (here / "runs" / "latest").symlink_to("one-2")
    (here / "runs" / "eval").mkdir()

    def ask(*words):
        done = cli(
            _SAN_LLM_COMPLETE="complete_bash",
            COMP_WORDS=" ".join(("san-llm", *words)),
            COMP_CWORD=str(len(words)),
        )
        assert done.stderr == ""
        return done.stdout.split()

    return ask


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("comp",), ["compare"]),
        (("train", "smol"), ["smollm2_demo"]),
        (("train", "runs/one"), ["runs/one-1", "runs/one-2"]),
        (("recipes", "show", "llama7b"), ["llama7b_commonsense", "llama7b_commonsense_4bit"]),
        (("recipes", "check", "smollm2_demo", "llama13"), ["llama13b_commonsense"]),
        (("compare", "runs/one-1", "runs/l"), ["runs/latest"]),
        (
            ("train", "mine.yaml", "training.w"),
            ["training.warmup_steps=", "training.warmup_share=", "training.weight_decay="],
        ),
        (("diff", "runs/"), ["runs/latest", "runs/one-1", "runs/one-2"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_names_of_recipes_and_runs_are_offered(offered, words, expected):
    assert offered(*words) == expected


def test_completion_installs_itself_into_the_shell_that_asks(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    command = f"'{sys.executable}' -m san_llm --install-completion; true"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True
    )
    assert "bash completion installed" in done.stdout
    (script,) = (here / ".bash_completions").iterdir()
    assert str(script) in (here / ".bashrc").read_text()
    assert "_SAN_LLM_COMPLETE=complete_bash" in script.read_text()
