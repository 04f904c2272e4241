"""Learning: rates that fall, an early end, losses apart, an adapter that training goes on from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import save_tiny, tiny_model, write_recipe

from san_llm.errors import InputError
from san_llm.recipe.read import load_recipe, to_yaml
from san_llm.recipe.schema import Recipe
from san_llm.recipe.steps import rates_of
from san_llm.runs.folder import new_run
from san_llm.runs.record import read_metrics
from san_llm.train.run import train

ADAPTER = "adapter_model.safetensors"


def rows(path: Path, *numbers: int) -> Path:
    made = [{"instruction": f"{n}?", "input": "", "output": f"It is {n}."} for n in numbers]
    path.write_text(json.dumps(made))
    return path


@pytest.fixture
def base(here: Path) -> Path:
    return save_tiny(here / "base")


def recipe(here: Path, base: Path, *overrides: str, **data: Any) -> Recipe:
    train_rows = rows(here / "rows.json", *range(8))
    path = write_recipe(here / "r.yaml", base, train_rows, data={"held_out": 0} | data)
    return load_recipe(path, overrides)


def trained(made: Recipe, name: str = "run") -> Path:
    run = new_run(made, Path(name), overwrite=True)
    train(made, run)
    return run


def logged(run: Path, key: str) -> list[float]:
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


# --- rates ---


@pytest.mark.parametrize(
    ("said", "rates"),
    [
        # 10 steps, the first of them to rise in; Trainer logs the rate of the step that was made.
        (("schedule=warmup_stable_decay", "decay_share=0.4", "rate_floor=0.5"), (1, 1, 0.5)),
        (("schedule=warmup_stable_decay",), (1, 1, 0.45)),  # the half of the last two steps
        (("schedule=cosine", "rate_floor=0.1"), (1, None, 0.1)),
        (("schedule=cosine",), (1, None, 0)),
    ],
)
def test_a_rate_stays_and_falls_as_told(here, base, said, rates):
    how = ("max_steps=10", "epochs=10", "batch_size=8", "warmup_steps=1", "learning_rate=1e-3")
    run = trained(recipe(here, base, *(f"training.{key}" for key in (*how, *said))))
    seen = [rate / 1e-3 for rate in logged(run, "learning_rate")]
    first, later, last = rates
    assert seen[1] == pytest.approx(first)
    if later is not None:  # the stable steps
        assert seen[1:6] == pytest.approx([later] * 5)
    assert seen == sorted(seen[:1]) + sorted(seen[1:], reverse=True)
    assert last < seen[-1] < last + 0.1  # at the last step, before it has come to the end
    assert seen[-2] > seen[-1]


def test_all_steps_may_fall(here, base):
    made = recipe(here, base, "training.schedule=warmup_stable_decay", "training.decay_share=0.9")
    assert rates_of(made.training, 10)[1]["num_decay_steps"] == 9
    short = recipe(
        here,
        base,
        *("training.schedule=warmup_stable_decay", "training.decay_share=1"),
        "training.warmup_steps=4",
    )
    assert rates_of(short.training, 10)[1]["num_decay_steps"] == 6


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("training.rate_floor=0.1", "rate_floor: only of schedule cosine and warmup_stable_decay"),
        ("training.decay_share=0.1", "decay_share: only of schedule warmup_stable_decay"),
    ],
)
def test_a_schedule_that_has_no_such_part_is_told(here, base, said, why):
    with pytest.raises(InputError, match=why):
        recipe(here, base, said)


# --- the end ---


def test_a_run_ends_when_nothing_is_gained(here, base, capsys):
    # Answers of the held-out rows go against all that is learned.
    rows(here / "other.json", 100, 101)
    how = ["max_steps=40", "epochs=40", "batch_size=8", "evaluate_every=2", "patience=2"]
    how += ["learning_rate=0.3", "warmup_steps=0"]
    made = recipe(here, base, *(f"training.{key}" for key in how), held_out="other.json")
    run = trained(made)
    losses, metrics = logged(run, "eval_loss"), read_metrics(run)
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < 20
    assert metrics is not None
    assert (metrics.steps, metrics.best_step) == (2 * len(losses), 2 * (best + 1))
    assert (run / "adapter" / ADAPTER).is_file()
    told = f"step {metrics.steps}: 2 held-out losses, none below the best: ends"
    assert told in " ".join(capsys.readouterr().err.split())


def test_waiting_needs_something_to_wait_for(here, base):
    with pytest.raises(InputError, match=r"training.patience: there are no held-out rows to wait"):
        trained(recipe(here, base, "training.patience=1"))


# --- losses apart ---


def test_each_held_out_file_has_its_loss(here, base):
    rows(here / "one.json", 11, 12, 13)
    rows(here / "two.json", 21)
    made = recipe(here, base, held_out=["one.json", "two.json"])
    run = trained(made)
    metrics = read_metrics(run)
    assert metrics is not None
    each = metrics.held_out_losses
    assert list(each) == ["one.json", "two.json"]
    assert logged(run, "eval_loss_two.json")[-1] == each["two.json"]
    # All rows have as many tokens: the loss of all is their mean.
    assert (3 * each["one.json"] + each["two.json"]) / 4 == pytest.approx(metrics.held_out_loss)


def test_rows_held_out_of_several_sources_have_a_loss_each(here, base):
    rows(here / "one.json", *range(6))
    rows(here / "two.json", *range(6, 12))
    made = recipe(here, base, "data.train=[one.json, two.json]", held_out=6)
    metrics = read_metrics(trained(made))
    assert metrics is not None
    assert set(metrics.held_out_losses) == {"one.json", "two.json"}


# --- an adapter gone on from ---


def without_method(here: Path, made: Recipe, adapter: Path, *overrides: str) -> Recipe:
    lines = to_yaml(made).splitlines()
    begin = lines.index("method:")
    end = next(n for n in range(begin + 1, len(lines)) if not lines[n].startswith(" "))
    (here / "on.yaml").write_text("\n".join(lines[:begin] + lines[end:]))
    return load_recipe(here / "on.yaml", [f"base.adapter={adapter}", *overrides])


@pytest.mark.parametrize(
    "method",
    [
        {"name": "san"},
        {"name": "san", "carrier": "dora", "rank": 4, "mode": "neuron", "dropout": 0.0},
        {"name": "san", "links": "free", "shift": True, "adapt_embedding": True},
        {"name": "lora", "rank": 4, "alpha": 4.0, "dropout": 0.0, "target_modules": ["q_proj"]},
        {"name": "ia3"},
        {"name": "peft", "config": {"peft_type": "LOHA", "r": 2, "target_modules": ["v_proj"]}},
    ],
    ids=lambda method: "-".join(map(str, method.values()))[:20],
)
def test_training_goes_on_with_an_adapters_numbers_and_method(here, base, method):
    said = [f"method={json.dumps(method)}"]
    first = trained(recipe(here, base, *said), "first")
    before = load_file(first / "adapter" / ADAPTER)
    still = recipe(here, base, *said, "training.learning_rate=1e-30")
    made = without_method(here, still, first, "training.max_steps=1")
    kept = load_file(trained(made, "second") / "adapter" / ADAPTER)
    assert kept.keys() == before.keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.items())
    own = [json.loads((here / run / "adapter" / "adapter_config.json").read_text()) for run in
           ("first", "second")]  # fmt: skip
    assert {key for key in own[0] if _set(own[0][key]) != _set(own[1].get(key))} <= {"revision"}
    moved = without_method(here, still, first, "training.learning_rate=1e-2")
    after = load_file(trained(moved, "third") / "adapter" / ADAPTER)
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())


def _set(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def test_a_loss_begins_where_the_last_one_ended(here, base):
    first = trained(recipe(here, base, held_out=2), "first")
    ended = logged(first, "eval_loss")[-1]
    on = without_method(here, recipe(here, base, "training.learning_rate=1e-30", held_out=2), first)
    assert logged(trained(on, "second"), "eval_loss")[0] == pytest.approx(ended, rel=1e-6)


def test_another_method_is_refused_and_a_missing_adapter_told(here, base):
    first = trained(recipe(here, base), "first")
    with pytest.raises(InputError, match=r"method.mode: 'neuron', but first.adapter was made with"):
        trained(recipe(here, base, f"base.adapter={first}", "method.mode=neuron"), "second")
    assert not (here / "second" / "adapter").exists()
    made = recipe(here, base)
    with pytest.raises(InputError, match=r"base.adapter: none: not an adapter: no adapter_config"):
        without_method(here, made, Path("none"))
    shutil.rmtree(first / "adapter")
    with pytest.raises(InputError, match=r"first/adapter: not an adapter"):
        without_method(here, made, first)


def test_a_lora_of_peft_alone_goes_on(here, base):
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["v_proj", "q_proj"]))
    model.save_pretrained(here / "theirs")
    made = without_method(here, recipe(here, base), here / "theirs")
    assert made.method.name == "lora"
    before, after = (
        load_file(folder / ADAPTER)
        for folder in (here / "theirs", trained(made, "second") / "adapter")
    )
    assert before.keys() == after.keys()
    grown = [name for name in before if not torch.equal(before[name], after[name])]
    assert grown
    assert all("lora_" in name for name in grown)
