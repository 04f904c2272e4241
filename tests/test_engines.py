"""DDP, FSDP2 and two nodes: real processes over gloo, each giving the weights of one process."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from test_launch import reference
from tiny import rows, save_tiny, write_recipe, write_rows

from san_llm.launch import accelerate_command

CONFIGS = Path(__file__).parents[1] / "recipes" / "accelerate"
STEPS = 20
# 26 rows in batches of 8 end every epoch with fillers; 3 held-out rows leave processes without one.
TRAINING = {"max_steps": STEPS, "epochs": 100.0, "batch_size": 8, "evaluate_every": 7}
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


def recipe_of(case: str, here: Path, bases: dict[bool, Path]) -> Path:
    """Write the recipe of a case."""
    sections = CASES[case]
    return write_recipe(
        here / f"{case}.yaml",
        bases["tied" in case],
        write_rows(here / "rows.json", rows(29)),
        base=sections.get("base", {}),
        method=sections.get("method", {}),
        data={"held_out": 3},
        training=TRAINING | sections.get("training", {}),
    )


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "processes", "cases"),
    [
        ("ddp", 4, ["scale", "lora", "dora", "dora in 4 bits"]),
        ("fsdp2", 2, ["scale", "lora, recomputed", "dora", "scale, tied and padded", "LoRA"]),
    ],
)
def test_an_engine_gives_the_weights_of_one_process(
    here: Path, bases: dict[bool, Path], engine: str, processes: int, cases: list[str]
) -> None:
    recipes = {case: recipe_of(case, here, bases) for case in cases}
    together(accelerate_command([], processes, CONFIGS / f"{engine}.yaml"), here, recipes)
    found = {}
    for case, recipe in recipes.items():
        reference(recipe, here / f"one {case}")
        found[case] = relative(here / f"one {case}", here / case)
        facts = json.loads((here / case / "manifest.json").read_text())
        assert (facts["engine"], facts["processes"]) == (engine.upper(), processes)
        ends = [
            json.loads((here / run / "metrics.json").read_text()) for run in (f"one {case}", case)
        ]
        assert ends[0]["held_out_loss"] == pytest.approx(ends[1]["held_out_loss"], rel=1e-5)
    assert max(found.values()) < 1e-5, found
