"""Training in this process: what the weights depend on, and what a run leaves behind."""

from __future__ import annotations

import json
import math
import os
import signal
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import rows, save_tiny, write_recipe, write_rows
from transformers import TrainerCallback

from san_llm.data.split import split_held_out
from san_llm.errors import InputError, SanError
from san_llm.models.locate import find_base
from san_llm.recipe.read import load_recipe
from san_llm.runs.folder import new_run, recipe_of
from san_llm.runs.record import TrainResult
from san_llm.train.batches import GroupedByLength
from san_llm.train.prepare import prepare
from san_llm.train.run import train
from san_llm.train.trainer import SanTrainer


def start(path: Path, folder: Path, *overrides: str) -> TrainResult:
    """Train the recipe file into a new folder."""
    recipe = load_recipe(path, list(overrides))
    return train(recipe, new_run(recipe, folder, overwrite=False))


def adapter(run: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "adapter" / "adapter_model.safetensors")


def moved(run: str | Path) -> float:
    """Return how far the gammas, which start at 1, moved at most."""
    return max((gamma - 1).abs().max().item() for gamma in adapter(run).values())


def apart(first: str | Path, second: str | Path) -> float:
    """Return the largest difference between two runs' adapters."""
    one, two = adapter(first), adapter(second)
    assert one.keys() == two.keys()
    return max((one[key] - two[key]).abs().max().item() for key in one)


def log(run: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def recipe(here: Path, tiny_base: Path) -> Path:
    return write_recipe(here / "r.yaml", tiny_base, write_rows(here / "rows.json", rows(30)))


# --- what the weights depend on ---------------------------------------------------------------


def test_sixteen_by_one_and_one_by_sixteen_give_the_same_gammas(here: Path, recipe: Path) -> None:
    # 26 rows in batches of 16: the second batch of an epoch has 10 rows, so fillers are in play.
    how = ("training.batch_size=16", "training.max_steps=3")
    for size in (16, 4, 1, 3):
        start(recipe, here / f"by{size}", *how, f"training.micro_batch_size={size}")
    assert moved(here / "by16") > 0.02
    for size in (4, 1, 3):
        assert apart(here / "by16", here / f"by{size}") < 1e-5
        for one, two in zip(log(here / "by16"), log(here / f"by{size}"), strict=True):
            assert one["step"] == two["step"]
            assert one == pytest.approx(two, rel=1e-5)


def test_the_loss_is_the_mean_over_all_supervised_tokens_of_the_global_batch(
    here: Path, tiny_base: Path
) -> None:
    # Responses of 2 to 60 letters: a mean of the means of single rows would be another number.
    several = [
        {"instruction": f"say {n}", "input": "", "output": "ab" * (1 + n * 10)} for n in range(4)
    ]
    path = write_recipe(
        here / "r.yaml", tiny_base, write_rows(here / "rows.json", several), data={"held_out": 0}
    )
    start(path, here / "run", "training.max_steps=1", "training.micro_batch_size=1")

    from san_llm.data.encode import Encoding
    from san_llm.data.sources import read_rows
    from san_llm.data.tokenized import encode_rows
    from san_llm.models.load import load_base
    from san_llm.models.tokenizer import load_tokenizer

    chosen = load_recipe(path)
    tokenizer, model = load_tokenizer(find_base(chosen.base)), load_base(find_base(chosen.base))
    losses = []
    for row in encode_rows(
        read_rows(here / "rows.json"), Encoding(tokenizer, "alpaca", "response", 256)
    ).rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        logits = model(ids).logits[0].double()
        losses.append(
            [
                -logits[at - 1].log_softmax(-1)[label].item()
                for at, label in enumerate(labels.tolist())
                if label != -100
            ]
        )
    flat = [loss for row in losses for loss in row]
    wrong = sum(sum(row) / len(row) for row in losses) / len(losses)
    right = sum(flat) / len(flat)
    assert abs(right - wrong) > 1e-3
    assert log(here / "run")[0]["loss"] == pytest.approx(right, rel=1e-5)


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=120),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 5),
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_an_epoch_has_every_row_once_in_whole_batches(
    lengths: list[int], batch_size: int, seed: int
) -> None:
    steps = -(-len(lengths) // batch_size)
    epochs = [
        list(GroupedByLength(lengths, batch_size, seed, lambda at=at: at, lambda: 10**9))
        for at in (0, steps, steps - 1)
    ]
    for order in epochs:
        assert len(order) == steps * batch_size
        real = [row for row in order if row < len(lengths)]
        assert sorted(real) == list(range(len(lengths)))
        assert all(row == len(lengths) for row in order if row not in real)
    assert epochs[2] == epochs[0]  # the last step of an epoch belongs to it


def test_batches_hold_rows_of_like_length_and_epochs_differ() -> None:
    lengths = [1 + (n * 37) % 100 for n in range(200)]
    first = list(GroupedByLength(lengths, 4, 1, lambda: 0, lambda: 99))
    second = list(GroupedByLength(lengths, 4, 1, lambda: 50, lambda: 99))
    spread = [
        max(lengths[r] for r in first[i : i + 4]) - min(lengths[r] for r in first[i : i + 4])
        for i in range(0, 200, 4)
    ]
    assert max(spread) <= 2
    assert first != second


def test_one_seed_gives_the_same_bits_and_another_seed_does_not(here: Path, recipe: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        start(recipe, here / name, f"training.seed={seed}")
    assert apart(here / "a", here / "b") == 0
    assert apart(here / "a", here / "c") > 1e-4
    files = [here / name / "adapter" / "adapter_model.safetensors" for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_gradient_checkpointing_changes_nothing(here: Path, recipe: Path) -> None:
    start(recipe, here / "without")
    start(recipe, here / "with", "training.gradient_checkpointing=true")
    assert moved(here / "with") > 0.01
    assert apart(here / "with", here / "without") < 1e-6


@pytest.mark.parametrize("loss", ["response", "all"])
def test_packing_changes_nothing(here: Path, recipe: Path, loss: str) -> None:
    how = (f"data.loss={loss}", "training.micro_batch_size=4")
    packed = start(recipe, here / "packed", *how)
    padded = start(recipe, here / "padded", *how, "training.packing=false")
    assert moved(here / "packed") > 0.01
    assert apart(here / "packed", here / "padded") < 1e-6
    assert packed.held_out_loss == pytest.approx(padded.held_out_loss, rel=1e-6)


@pytest.mark.parametrize(
    ("schedule", "warmup"),
    [
        ("linear", "warmup_steps=2"),
        ("cosine", "warmup_share=0.3"),
        ("constant_with_warmup", "warmup_steps=2"),
    ],
)
def test_the_logged_learning_rate_follows_the_schedule(
    here: Path, recipe: Path, schedule: str, warmup: str
) -> None:
    start(
        recipe,
        here / "run",
        f"training.schedule={schedule}",
        "training.max_steps=6",
        f"training.{warmup}",
    )
    after = {
        "linear": lambda part: 1 - part,
        "cosine": lambda part: 0.5 * (1 + math.cos(math.pi * part)),
        "constant_with_warmup": lambda part: 1.0,
    }[schedule]
    # A step is taken with the rate of the steps before it.
    expected = [1e-2 * (n / 2 if n < 2 else after((n - 2) / 4)) for n in range(6)]
    found = [entry["learning_rate"] for entry in log(here / "run") if "learning_rate" in entry]
    assert found == pytest.approx(expected)


def test_a_warmup_longer_than_the_run_is_told_and_cut_off_by_its_end(
    here: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(recipe, here / "run", "training.warmup_steps=100")
    assert "warning: the warmup of 100 steps never ends in a run of 4" in capsys.readouterr().err
    found = [entry["learning_rate"] for entry in log(here / "run") if "learning_rate" in entry]
    assert found == pytest.approx([0, 1e-4, 2e-4, 3e-4])


# --- how long, and on what --------------------------------------------------------------------


def test_epochs_count_whole_batches_and_max_steps_wins(here: Path, recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace('"max_steps": 4', '"max_steps": null'))
    how = ("training.batch_size=12", "training.micro_batch_size=12")
    assert start(recipe, here / "one", *how).steps == 3  # 26 rows in batches of 12
    assert start(recipe, here / "two", *how, "training.epochs=2.0").steps == 6
    result = start(recipe, here / "three", *how, "training.epochs=5.0", "training.max_steps=2")
    assert (result.steps, result.max_steps, result.best_step) == (2, 2, 2)
    assert start(recipe, here / "four", *how, "training.max_steps=4").steps == 4  # beyond the epoch


def test_without_held_out_rows_the_last_step_is_kept(here: Path, recipe: Path) -> None:
    result = start(recipe, here / "run", "data.held_out=0", "training.evaluate_every=100")
    assert (result.held_out_loss, result.best_step, result.rows) == (None, 4, 30)
    assert not any("eval_loss" in entry for entry in log(here / "run"))
    last = here / "run" / "checkpoints" / "checkpoint-4" / "adapter_model.safetensors"
    assert all(torch.equal(load_file(last)[k], v) for k, v in adapter(here / "run").items())


def test_the_last_step_is_judged_when_evaluate_every_is_larger(here: Path, recipe: Path) -> None:
    result = start(recipe, here / "run", "training.evaluate_every=100")
    assert [e["step"] for e in log(here / "run") if "eval_loss" in e] == [4]
    assert result.best_step == 4
    assert result.held_out_loss is not None


def test_a_held_out_file_takes_no_row_from_training(here: Path, recipe: Path) -> None:
    held = write_rows(here / "held.json", rows(5))
    result = start(recipe, here / "run", f"data.held_out={held}")
    assert result.rows == 30
    assert set(json.loads((here / "run" / "manifest.json").read_text())["sha256"]["data"]) == {
        str(here / "rows.json"),
        str(held),
    }


def test_the_limit_comes_before_the_held_out_rows(here: Path, recipe: Path) -> None:
    chosen = load_recipe(recipe, ["data.limit=10", "data.held_out=3"])
    parted = split_held_out(chosen)
    learned, held_out = parted.train, parted.held_out
    everything = {row["instruction"] for row in rows(10)}
    assert (len(learned), len(held_out)) == (7, 3)
    assert {row.instruction for row in (*learned, *held_out)} == everything


def test_more_held_out_rows_than_rows_is_refused(here: Path, recipe: Path) -> None:
    with pytest.raises(InputError, match="30 of 30 rows leave none to train on"):
        split_held_out(load_recipe(recipe, ["data.held_out=30"]))


def test_cut_and_dropped_rows_are_counted(here: Path, recipe: Path) -> None:
    from san_llm.protocol.prompts import training_prompt

    # One token a letter, and one for the begin or end of a text.
    width = len(training_prompt("alpaca", "y" * 50, ""))
    whole, cut, dropped = (
        {"instruction": "y" * n, "input": "", "output": "1234"} for n in (45, 47, 50)
    )
    write_rows(here / "rows.json", [whole] * 4 + [cut] * 3 + [dropped] * 2)
    result = start(recipe, here / "run", "data.held_out=0", f"data.cutoff={width}")
    assert (result.rows, result.cut_rows, result.dropped_rows) == (7, 3, 2)


# --- the best checkpoint ----------------------------------------------------------------------


def test_the_kept_adapter_is_the_one_with_the_least_held_out_loss(
    here: Path, recipe: Path, tiny_base: Path
) -> None:
    # A rate this large makes the loss worse after a good start.
    how = ("training.learning_rate=0.6", "training.max_steps=12", "training.evaluate_every=1")
    how += ("training.schedule=constant_with_warmup", "training.warmup_steps=8")
    result = start(recipe, here / "run", *how)
    losses = {e["step"]: e["eval_loss"] for e in log(here / "run") if "eval_loss" in e}
    best = min(losses, key=lambda step: losses[step])
    assert best < 12, losses
    assert losses[12] > losses[best] + 0.01
    assert (result.best_step, result.held_out_loss) == (best, losses[best])

    from san_llm.data.encode import Encoding
    from san_llm.data.tokenized import encode_rows
    from san_llm.models.adapter import load_adapter
    from san_llm.models.load import load_base
    from san_llm.models.tokenizer import load_tokenizer

    chosen = load_recipe(recipe, list(how))
    held_out = split_held_out(chosen).held_out
    model = load_adapter(load_base(find_base(chosen.base)), here / "run" / "adapter")
    encoded = encode_rows(
        held_out, Encoding(load_tokenizer(find_base(chosen.base)), "alpaca", "response", 256)
    )
    total, count = 0.0, 0
    with torch.no_grad():
        for row in encoded.rows:
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].double()
            labels = torch.tensor(row["labels"][1:])
            total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            count += int((labels != -100).sum())
    assert total / count == pytest.approx(result.held_out_loss, rel=1e-5)


@pytest.mark.parametrize("held_out", [4, 0])
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(
    here: Path, recipe: Path, held_out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Poison(TrainerCallback):
        """Puts a NaN where a diverged run has one: into a weight, between two steps."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **how: Any) -> None:
            if state.global_step == 2:
                gamma = next(p for p in how["model"].parameters() if p.requires_grad)
                gamma.data[0] = float("nan")

    build = SanTrainer.__init__

    def with_poison(self: SanTrainer, **how: Any) -> None:
        build(self, **(how | {"callbacks": [*how["callbacks"], Poison()]}))

    monkeypatch.setattr(SanTrainer, "__init__", with_poison)
    with pytest.raises(SanError) as caught:
        start(recipe, here / "run", f"data.held_out={held_out}", "training.evaluate_every=1")
    message = str(caught.value)
    assert (
        "step 3: the loss is nan, the gradient's norm nan, at a learning rate of 0.005" in message
    )
    assert f"in the batch of {here / 'rows.json'}: row " in message
    assert "checkpoint-2 is the last good checkpoint" in message
    assert "\n" not in message
    kept = sorted(path.name for path in (here / "run" / "checkpoints").iterdir())
    assert kept == ["checkpoint-1", "checkpoint-2"]
    assert not (here / "run" / "adapter").exists()
    for line in (here / "run" / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_bad_batches_can_be_skipped_and_are_counted(
    here: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Poison(TrainerCallback):
        """Makes one step's loss NaN, by a weight that is NaN while it is computed."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **how: Any) -> None:
            if state.global_step == 2:
                self.gamma = next(p for p in how["model"].parameters() if p.requires_grad)
                self.good = self.gamma.data.clone()
                self.gamma.data[0] = float("nan")

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **how: Any) -> None:
            if state.global_step == 2:
                self.gamma.data.copy_(self.good)
                self.before = [p.clone() for p in how["model"].parameters() if p.requires_grad]

        def on_step_end(self, args: Any, state: Any, control: Any, **how: Any) -> None:
            if state.global_step == 3:
                after = [p for p in how["model"].parameters() if p.requires_grad]
                assert all(map(torch.equal, self.before, after))

    build = SanTrainer.__init__

    def with_poison(self: SanTrainer, **how: Any) -> None:
        build(self, **(how | {"callbacks": [*how["callbacks"], Poison()]}))

    monkeypatch.setattr(SanTrainer, "__init__", with_poison)
    result = start(recipe, here / "run", "training.bad_batches=skip", "training.max_steps=6")
    assert (result.steps, result.skipped_batches) == (6, 1)
    assert math.isfinite(result.train_loss)
    entries = {entry["step"]: entry for entry in log(here / "run") if "loss" in entry}
    assert entries[3] == {**entries[3], "loss": None, "skipped": 1}
    assert all("skipped" not in entry for step, entry in entries.items() if step != 3)
    assert moved(here / "run") > 0


# --- methods and bases ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "dora", "ia3"])
def test_other_methods_train_through_the_same_harness(
    here: Path, tiny_base: Path, name: str
) -> None:
    data = write_rows(here / "rows.json", rows(30))
    path = write_recipe(here / "r.yaml", tiny_base, data, method={"name": name})
    result = start(path, here / "run")
    losses = [entry["loss"] for entry in log(here / "run") if "loss" in entry]
    assert losses[-1] < losses[0]
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_base), here / "run" / "adapter"
    )
    kind = loaded.peft_config["default"]
    assert kind.peft_type.value == {"lora": "LORA", "dora": "LORA", "ia3": "IA3"}[name]
    assert getattr(kind, "use_dora", False) == (name == "dora")
    assert sum(tensor.numel() for tensor in adapter(here / "run").values()) == (
        result.trained_numbers
    )


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantized_bases_train(here: Path, bits: str) -> None:
    base = save_tiny(here / "base64", hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    data = write_rows(here / "rows.json", rows(30))
    path = write_recipe(here / "r.yaml", base, data)
    result = start(path, here / "run", "training.max_steps=8", f"base.quantization={bits}")
    losses = [entry["loss"] for entry in log(here / "run") if "loss" in entry]
    assert min(losses[-3:]) < losses[0]
    assert moved(here / "run") > 0.005
    assert all(tensor.dtype == torch.float32 for tensor in adapter(here / "run").values())
    assert result.held_out_loss is not None


# --- what a run leaves behind -----------------------------------------------------------------


def test_the_embedding_and_shifts_are_trained_where_the_recipe_says_so(
    here: Path, recipe: Path
) -> None:
    start(recipe, here / "run", "method.adapt_embedding=true", "method.shift=true")
    found = adapter(here / "run")
    moved = [
        name for name, values in found.items() if (values - values.round()).abs().max() > 0.001
    ]
    assert "base_model.model.model.embed_tokens.san_gamma" in moved
    assert any(name.endswith("san_beta") for name in moved)


def test_a_run_folder_says_what_ran_with_what(here: Path, recipe: Path, tiny_base: Path) -> None:
    result = start(recipe, here / "run")
    run = here / "run"
    assert recipe_of(run) == load_recipe(recipe)

    def digest(path: Path) -> str:
        return sha256(path.read_bytes()).hexdigest()

    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["sha256"] == {
        "base": {path.name: digest(path) for path in tiny_base.iterdir()},
        "data": {str(here / "rows.json"): digest(here / "rows.json")},
        "adapter": digest(run / "adapter" / "adapter_model.safetensors"),
    }
    assert manifest["versions"]["torch"] == version("torch")
    assert {"san-llm", "python", "transformers", "peft", "accelerate"} <= set(manifest["versions"])
    assert (manifest["seed"], manifest["processes"]) == (42, 1)
    assert manifest["device"].startswith("cuda" if torch.cuda.is_available() else "cpu")
    assert json.loads((run / "metrics.json").read_text()) == {
        "run": str(run),
        "finished": True,
        "steps": 4,
        "max_steps": 4,
        "best_step": result.best_step,
        "held_out_loss": result.held_out_loss,
        "train_loss": result.train_loss,
        "trained_numbers": result.trained_numbers,
        "rows": 26,
        "dropped_rows": 0,
        "cut_rows": 0,
        "skipped_batches": 0,
        "stopped_by": None,
        "seconds": result.seconds,
        "resumed_at": 0,
        "peak_memory": result.peak_memory,
        "row_kind": "own",
        "held_out_losses": {},
    }
    assert 1e7 < result.peak_memory < 1e11
    entries = log(run)
    steps = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4]
    assert all({"loss", "grad_norm", "learning_rate", "epoch"} <= set(entry) for entry in steps)
    assert [entry["step"] for entry in entries if "eval_loss" in entry] == [2, 4]
    assert result.train_loss == pytest.approx(sum(entry["loss"] for entry in steps) / 4)
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]


def test_the_end_token_is_learned_so_that_generation_stops_by_itself(
    here: Path, tiny_base: Path
) -> None:
    two = [
        {"instruction": "one?", "input": "", "output": "ab"},
        {"instruction": "two?", "input": "", "output": "cabbage"},
    ]
    path = write_recipe(
        here / "r.yaml",
        tiny_base,
        write_rows(here / "rows.json", two),
        method={"name": "lora", "rank": 16, "dropout": 0.0},
        data={"held_out": 0},
        training={"epochs": 1000.0, "max_steps": 100, "batch_size": 2, "evaluate_every": 1000},
    )
    start(path, here / "run", "training.micro_batch_size=2")

    from san_llm.models.adapter import load_adapter
    from san_llm.models.load import load_base
    from san_llm.models.tokenizer import load_tokenizer
    from san_llm.protocol.prompts import training_prompt

    base = load_recipe(path).base
    tokenizer = load_tokenizer(find_base(base))
    model = load_adapter(load_base(find_base(base)), here / "run" / "adapter")
    for row in two:
        ids = tokenizer(training_prompt("alpaca", row["instruction"], ""), return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=20, do_sample=False)[0]
        answer = out[ids["input_ids"].shape[1] :]
        assert tokenizer.decode(answer) == row["output"] + "</s>"


def test_every_micro_batch_of_every_step_throws_dice_of_its_own(
    here: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(here / "rows.json", rows(8))  # the same rows in every step
    path = write_recipe(here / "r.yaml", tiny_base, data, method={"name": "lora", "dropout": 0.5})
    still = ("training.learning_rate=1e-9", "training.max_steps=2", "data.held_out=0")
    thrown: list[int] = []
    forward = torch.nn.Dropout.forward

    def watched(module: torch.nn.Dropout, x: torch.Tensor) -> torch.Tensor:
        if module.training and module.p == 0.5:
            thrown.append(torch.initial_seed())
        return forward(module, x)

    monkeypatch.setattr(torch.nn.Dropout, "forward", watched)
    for seed in (1, 2):
        how = ("training.batch_size=8", "training.micro_batch_size=4", f"training.seed={seed}")
        start(path, here / f"by{seed}", *still, *how)
    assert len(set(thrown)) == 2 * 4, "two steps of two micro-batches, by two seeds"
    first, second = (entry["grad_norm"] for entry in log(here / "by1") if "loss" in entry)
    assert first != second


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_rows_share_a_beginning_only_where_nothing_is_drawn(
    here: Path, tiny_base: Path, dropout: float
) -> None:
    data = write_rows(here / "rows.json", rows(8))
    path = write_recipe(
        here / "r.yaml", tiny_base, data, method={"name": "lora", "dropout": dropout}
    )
    collator = prepare(load_recipe(path), here, None).collator
    row = {"input_ids": [4, 5, 6, 7], "labels": [-100, 5, 6, 7]}
    once, twice = (collator([row] * count)["input_ids"].numel() for count in (1, 2))
    assert twice == (2 * once if dropout else once)


# --- going on ---------------------------------------------------------------------------------


class _StopAfter(TrainerCallback):
    """Presses Ctrl-C in the middle of a step."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)


NINE = ("training.max_steps=9", "training.evaluate_every=2", "training.epochs=9.0")


def dropping(folder: Path, base: Path) -> Path:
    """Write a recipe that throws dice."""
    data = write_rows(folder / "rows.json", rows(30))
    return write_recipe(folder / "r.yaml", base, data, method={"name": "lora", "dropout": 0.1})


@pytest.fixture(scope="module")
def nine(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> tuple[Path, TrainResult]:
    """Nine steps of it which nothing stopped. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("nine")
    return folder / "run", start(dropping(folder, tiny_base), folder / "run", *NINE)


@pytest.mark.parametrize(
    ("step", "number", "kept"),
    [(1, signal.SIGINT, 2), (3, signal.SIGTERM, 1), (4, signal.SIGINT, 2), (7, signal.SIGINT, 2)],
)
def test_a_stopped_run_goes_on_to_the_same_bits(
    here: Path,
    tiny_base: Path,
    nine: tuple[Path, TrainResult],
    step: int,
    number: int,
    kept: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 26 rows in batches of 4 are 7 steps: the stops are at an epoch's begin, inside, and its end.
    path, (unstopped, whole) = dropping(here, tiny_base), nine
    how = (*NINE, f"training.keep_checkpoints={kept}")
    build = SanTrainer.__init__

    def stopping(self: SanTrainer, **arguments: Any) -> None:
        callbacks = [*arguments["callbacks"], _StopAfter(step, number)]
        build(self, **(arguments | {"callbacks": callbacks}))

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(SanTrainer, "__init__", stopping)
        stopped = start(path, here / "parts", *how)
    assert signal.getsignal(number) == before
    assert (stopped.finished, stopped.steps) == (False, step)
    assert not (here / "parts" / "adapter").exists()
    result = train(recipe_of(here / "parts"), here / "parts")
    assert result.finished
    assert (whole.resumed_at, result.resumed_at) == (0, step)
    assert (result.best_step, result.held_out_loss) == (whole.best_step, whole.held_out_loss)
    assert apart(unstopped, here / "parts") == 0
    assert log(here / "parts") == log(unstopped)


@pytest.mark.parametrize(("step", "where"), [(3, "step"), (4, "judging"), (9, "judging")])
def test_a_stop_inside_a_long_step_or_judging_changes_nothing(
    here: Path,
    tiny_base: Path,
    nine: tuple[Path, TrainResult],
    step: int,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class StopBeforeJudging(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step:
                os.kill(os.getpid(), signal.SIGTERM)

    path, (unstopped, whole) = dropping(here, tiny_base), nine
    build = SanTrainer.__init__
    stopper = _StopAfter(step, signal.SIGTERM) if where == "step" else StopBeforeJudging()

    def stopping(self: SanTrainer, **arguments: Any) -> None:
        build(self, **(arguments | {"callbacks": [*arguments["callbacks"], stopper]}))

    with monkeypatch.context() as patch:
        patch.setattr(SanTrainer, "__init__", stopping)
        for module in ("callbacks", "trainer"):
            patch.setattr(f"san_llm.train.{module}.SLOW", -1.0)  # whatever it takes is too long
        stopped = start(path, here / "parts", *NINE)
    assert (stopped.finished, stopped.stopped_by) == (False, "SIGTERM")
    assert stopped.steps == (step - 1 if where == "step" else step)
    judged = {entry["step"] for entry in log(here / "parts") if "eval_loss" in entry}
    assert step not in judged
    result = train(recipe_of(here / "parts"), here / "parts")
    assert (result.best_step, result.held_out_loss) == (whole.best_step, whole.held_out_loss)
    assert apart(unstopped, here / "parts") == 0
    assert log(here / "parts") == log(unstopped)


def test_a_stop_in_the_last_step_changes_nothing(
    here: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = SanTrainer.__init__

    def stopping(self: SanTrainer, **arguments: Any) -> None:
        callbacks = [*arguments["callbacks"], _StopAfter(4, signal.SIGINT)]
        build(self, **(arguments | {"callbacks": callbacks}))

    monkeypatch.setattr(SanTrainer, "__init__", stopping)
    result = start(recipe, here / "run")
    assert result.finished
    assert (here / "run" / "adapter").is_dir()


@pytest.mark.parametrize("held_out", [4, 0])
def test_a_run_killed_between_its_last_checkpoint_and_its_adapter_is_completed(
    here: Path, recipe: Path, held_out: int
) -> None:
    import shutil

    whole = start(recipe, here / "whole", f"data.held_out={held_out}")
    shutil.copytree(here / "whole", here / "killed")
    shutil.rmtree(here / "killed" / "adapter")
    (here / "killed" / "metrics.json").unlink()
    result = train(recipe_of(here / "killed"), here / "killed")
    assert (result.steps, result.best_step) == (4, whole.best_step)
    assert result.held_out_loss == whole.held_out_loss
    assert apart(here / "whole", here / "killed") == 0
    assert log(here / "killed") == log(here / "whole")


def test_a_half_written_checkpoint_is_not_gone_on_from(here: Path, recipe: Path) -> None:
    import shutil

    start(recipe, here / "whole")
    shutil.copytree(here / "whole", here / "killed")
    shutil.rmtree(here / "killed" / "adapter")
    half = here / "killed" / "checkpoints" / "checkpoint-4"
    (half / "sha256.json").unlink()
    (half / "optimizer.pt").write_bytes(b"half")
    # A killed process also leaves half a line, and lines of steps after the last checkpoint.
    with (here / "killed" / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    result = train(recipe_of(here / "killed"), here / "killed")
    assert result.finished
    assert apart(here / "whole", here / "killed") == 0
    assert log(here / "killed") == log(here / "whole")


@pytest.mark.parametrize(("dtype", "short"), [("bfloat16", True), ("float32", False)])
def test_low_rank_products_of_a_16_bit_run_may_be_short_on_a_gpu_and_no_others(
    here: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, short: bool
) -> None:
    matmul: Any = torch.backends.cuda.matmul
    seen = []
    step = SanTrainer.training_step

    def noted(*arguments: Any) -> Any:
        seen.append(matmul.allow_tf32)
        return step(*arguments)

    monkeypatch.setattr(SanTrainer, "training_step", noted)
    start(recipe, here / "run", "training.max_steps=1", f"base.dtype={dtype}")
    assert (set(seen), matmul.allow_tf32) == ({short}, False)
