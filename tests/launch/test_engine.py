"""DDP, FSDP2 and two nodes: real processes over gloo, each giving the weights of one process."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import Cli
from launch.test_command import gone, reach, reference, steps
from running import start
from safetensors.torch import load_file
from tiny import rows, save_tiny, write_recipe, write_rows

from san_llm.errors import InputError
from san_llm.launch.command import _free_port, accelerate_command
from san_llm.launch.engine import engine_of, take_engine

CONFIGS = Path(__file__).parents[2] / "recipes" / "accelerate"
FEW, STEPS = 9, 14  # and where one is stopped
# 26 rows in batches of 8 end every epoch with fillers; 3 held-out rows leave processes without one.
TRAINING = {"epochs": 100.0, "batch_size": 8, "evaluate_every": 7}
LOW_RANK = {"rank": 4, "alpha": 8, "dropout": 0.0}
CASES: dict[str, dict[str, Any]] = {
    "scale": {"training": {"micro_batch_size": 1}},
    "lora": {"method": {"carrier": "lora", **LOW_RANK}},
    "lora, recomputed": {
        "method": {"carrier": "lora", **LOW_RANK},
        "training": {"gradient_checkpointing": True},
    },
    "dora": {
        "method": {"carrier": "dora", **LOW_RANK, "dropout": 0.1},
        "training": {"micro_batch_size": 1},
    },
    "dora in 4 bits": {
        "base": {"quantization": "4bit"},
        "method": {"carrier": "dora", **LOW_RANK},
    },
    "scale, tied and padded": {"training": {"packing": False}},
    "LoRA": {"method": {"name": "lora", **LOW_RANK}},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Tiny bases whose rows are whole blocks of 4 bits: by whether their embeddings are tied."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return {
        tied: save_tiny(
            tmp_path_factory.mktemp("models") / f"tied-{tied}", tie_word_embeddings=tied, **sizes
        )
        for tied in (False, True)
    }


def recipe_of(case: str, here: Path, bases: dict[bool, Path], steps: int = FEW) -> Path:
    """Write the recipe of a case."""
    sections = CASES[case]
    return write_recipe(
        here / f"{case}.yaml",
        bases["tied" in case],
        write_rows(here / "rows.json", rows(29)),
        base=sections.get("base", {}),
        method=sections.get("method", {}),
        data={"held_out": 3},
        training=TRAINING | {"max_steps": steps} | sections.get("training", {}),
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, bases: dict[bool, Path]) -> Callable[..., Path]:
    """Return the run of a case in one process, which is made once."""

    @cache
    def run(case: str, steps: int = FEW) -> Path:
        folder = tmp_path_factory.mktemp("alone")
        reference(recipe_of(case, folder, bases, steps), folder / "run")
        return folder / "run"

    return run


def relative(first: Path, second: Path) -> float:
    """Return the largest difference between two adapters' tensors, relative to their norm."""
    one, two = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (first, second))
    assert one.keys() == two.keys()
    assert one
    return max(((one[k] - two[k]).norm() / one[k].norm()).item() for k in one)


def together(command: list[str], here: Path, recipes: dict[str, Path]) -> None:
    """Train recipes in the processes of a command, each into a folder of its name."""
    plan = here / "plan.json"
    plan.write_text(json.dumps([[str(path), str(here / case)] for case, path in recipes.items()]))
    assert command[-2:] == ["-m", "san_llm"]
    script = str(Path(__file__).with_name("train_together.py"))
    done = subprocess.run(
        [*command[:-2], script, str(plan)], cwd=here, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def skip_without(config: Path) -> None:
    if engine_of(config) == "DeepSpeed" and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "processes", "cases"),
    [
        ("ddp", 4, ["scale", "lora", "dora", "dora in 4 bits"]),
        ("fsdp2", 2, ["scale", "lora, recomputed", "dora", "scale, tied and padded", "LoRA"]),
        ("deepspeed_zero2", 2, ["scale", "lora"]),
        ("deepspeed_zero3", 2, ["scale", "lora"]),
    ],
)
def test_an_engine_gives_the_weights_of_one_process(
    here: Path,
    bases: dict[bool, Path],
    alone: Callable[..., Path],
    engine: str,
    processes: int,
    cases: list[str],
) -> None:
    config = CONFIGS / f"{engine}.yaml"
    skip_without(config)
    recipes = {case: recipe_of(case, here, bases) for case in cases}
    together(accelerate_command([], processes, config), here, recipes)
    found = {}
    for case in recipes:
        one = alone(case)
        found[case] = relative(one, here / case)
        facts = json.loads((here / case / "manifest.json").read_text())
        assert (facts["engine"], facts["processes"]) == (engine_of(config), processes)
        ends = [json.loads((run / "metrics.json").read_text()) for run in (one, here / case)]
        assert ends[0]["held_out_loss"] == pytest.approx(ends[1]["held_out_loss"], rel=1e-5)
    assert max(found.values()) < 1e-5, found


def node(here: Path, rank: int, **changes: Any) -> Path:
    """Write the shipped config of two machines, as one process on each of two loopback machines."""
    values = yaml.safe_load((CONFIGS / "two_nodes.yaml").read_text())
    values |= {"num_machines": 2, "num_processes": 2, "machine_rank": rank}
    values |= {"main_process_ip": "127.0.0.2", **changes}
    config = here / f"node{rank}.yaml"
    config.write_text(yaml.safe_dump(values))
    return config


def start_nodes(here: Path, *arguments: object) -> list[subprocess.Popen[str]]:
    """Start a training on two nodes, the second in a directory of its own."""
    port = _free_port()
    (here / "second").mkdir(exist_ok=True)
    return [
        start(folder, "train", *arguments, "--accelerate", node(here, rank, main_process_port=port))
        for rank, folder in enumerate((here, here / "second"))
    ]


@pytest.mark.slow
def test_two_nodes_give_the_weights_of_one_process(
    here: Path, bases: dict[bool, Path], alone: Callable[..., Path]
) -> None:
    path = recipe_of("scale", here, bases)
    nodes = start_nodes(here, path, "--output", "two")
    said = [process.communicate(timeout=120) for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0], said
    assert said[0][0].count("held-out loss") == 1
    assert said[1][0] == ""  # the first alone speaks and writes
    assert not list((here / "second").iterdir())
    assert relative(alone("scale"), here / "two") < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_node_that_dies_ends_the_other(here: Path, bases: dict[bool, Path], lost: int) -> None:
    path = recipe_of("scale", here, bases)
    nodes = start_nodes(here, path, "training.max_steps=4000", "--output", "run")
    reach(here / "run", 4, nodes[0])
    for process in [*psutil.Process(nodes[lost].pid).children(recursive=True), nodes[lost]]:
        process.kill()
    nodes[lost].communicate()
    _, errors = nodes[1 - lost].communicate(timeout=60)
    assert nodes[1 - lost].returncode == 1, errors
    assert errors.count("error:") == 1, errors
    assert "Traceback" not in errors
    gone(path)
    assert not (here / "run" / "adapter").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "case"),
    [("fsdp2", "dora"), ("deepspeed_zero2", "lora"), ("deepspeed_zero3", "scale")],
)
def test_a_sharded_run_is_stopped_and_goes_on(
    cli: Cli,
    here: Path,
    bases: dict[bool, Path],
    alone: Callable[..., Path],
    engine: str,
    case: str,
) -> None:
    config = CONFIGS / f"{engine}.yaml"
    skip_without(config)
    path = recipe_of(case, here, bases, STEPS)
    how = ("--accelerate", config, "--processes", 2)
    process = start(here, "train", path, "--output", "two", *how)
    reach(here / "two", 5, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert f"2 processes, {engine_of(config)}" in errors
    assert steps(here / "two")[-1] < STEPS
    done = cli("train", "two", "--resume", *how)
    assert done.returncode == 0, done.stderr
    assert steps(here / "two") == list(range(1, STEPS + 1))
    assert relative(alone(case, STEPS), here / "two") < 1e-5


# --- what is refused --------------------------------------------------------------------------


def fsdp(path: Path, **settings: Any) -> Path:
    """Write the shipped config of FSDP2 with other settings."""
    values = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text())
    values["fsdp_config"] |= settings
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_config_starts_its_engine(config: Path) -> None:
    command = accelerate_command(["train"], None, config)
    flag = {"DDP": "--multi_gpu", "FSDP2": "--use_fsdp", "DeepSpeed": "--use_deepspeed"}
    assert flag[engine_of(config)] in command
    assert command[-3:] == ["-m", "san_llm", "train"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fsdp_version": 1}, "fsdp_version 1: FSDP1 would shard SAN's vectors; set it to 2"),
        ({"fsdp_auto_wrap_policy": "SIZE_BASED_WRAP"}, "a block is what is sharded"),
        ({"fsdp_reshard_after_forward": False}, "which is DDP: MULTI_GPU"),
        ({"fsdp_offload_params": True}, "fsdp_offload_params true: not supported"),
        ({"fsdp_activation_checkpointing": True}, "the recipe's training.gradient_checkpointing"),
        ({"fsdp_ignored_modules": ".*gamma"}, "fsdp_ignored_modules .*gamma: not supported"),
    ],
)
def test_settings_of_fsdp_that_would_be_left_out_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    config = fsdp(tmp_path / "c.yaml", **settings)
    with pytest.raises(InputError) as caught:
        accelerate_command([], None, config)
    assert str(caught.value).startswith(f"{config}: ")
    assert message in str(caught.value)
    # The same from `accelerate launch` itself, which has no other way to its workers.
    for key, value in {"ACCELERATE_USE_FSDP": "true", "fsdp_version": 2, **settings}.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        monkeypatch.setenv(key.upper(), text)
    with pytest.raises(InputError, match="accelerate launch: ") as caught:
        take_engine()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("engine", "override", "message"),
    [
        ("fsdp2", "base.quantization=4bit", "base.quantization 4bit: FSDP2 cannot shard"),
        ("fsdp2", "method.name=dora", "SAN with method.carrier=dora"),
        ("fsdp2", "method.name=full", "method.name full: not tried with FSDP2; use DDP"),
        ("fsdp2", "method={name: peft, config: {peft_type: VERA}}", "VERA: not tried over a base"),
        ("deepspeed_zero2", "method.name=full", "method.name full: not tried with DeepSpeed"),
        ("deepspeed_zero2", "training.bad_batches=skip", "DeepSpeed moves the weights before"),
        ("deepspeed_zero3", "base.quantization=8bit", "8bit: not tried with DeepSpeed"),
        ("deepspeed_zero3", "training.seed=1", "DeepSpeed is not installed"),
        ("ddp", "training.batch_size=12", "12 is not a multiple of 8 processes"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_before_anything_is_loaded(
    command: Cli,
    here: Path,
    bases: dict[bool, Path],
    engine: str,
    override: str,
    message: str,
) -> None:
    if message.endswith("not installed") and find_spec("deepspeed"):
        pytest.skip("DeepSpeed is installed")
    recipe = recipe_of("scale", here, bases)
    done = command("train", recipe, override, "--accelerate", engine)  # a shipped one, by name
    assert done.returncode == 2, done.stderr
    assert message in " ".join(done.stderr.split())
    assert not (here / "runs").exists()
