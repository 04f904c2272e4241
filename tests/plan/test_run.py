"""Plans: what is told before a run is what the run then does, and the estimate what it takes."""

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import rows, tiny_model, write_recipe, write_rows

from san_llm.architectures.sizes import shape_of
from san_llm.data.batches import Pack, Pad
from san_llm.errors import InputError
from san_llm.models.adapter import add_adapter, trainable_parameters
from san_llm.ops import head_loss
from san_llm.plan.bases import KNOWN
from san_llm.plan.largest import look_at
from san_llm.plan.measured import SHARED, measure
from san_llm.plan.memory import (
    LOGITS_AT_ONCE,
    RUNTIME,
    Batch,
    Setting,
    _kept_by_block,
    full_batch,
    memory,
    traffic,
)
from san_llm.plan.planned import marked_recipe
from san_llm.plan.request import bytes_of
from san_llm.plan.run import make_plan
from san_llm.recipe.read import load_recipe, parse_recipe
from san_llm.recipe.schema import Method, PeftMethod, Recipe
from san_llm.recipe.shipped import hardware, shipped_recipes
from san_llm.runs.folder import new_run
from san_llm.train.loss import token_losses
from san_llm.train.packed_attention import has_dropout, use_packed_attention
from san_llm.train.run import train

ROOT = Path(__file__).resolve().parents[2]
METHODS = {
    "san": {"name": "san"},
    "san-plain": {"name": "san", "form": "plain"},
    "san-neuron": {"name": "san", "mode": "neuron"},
    "san-synapse": {"name": "san", "mode": "synapse"},
    "san-free": {"name": "san", "links": "free"},
    "san-shift": {"name": "san", "shift": True},
    "san-norms": {"name": "san", "train_norms": True},
    "san-norms-plain": {"name": "san", "train_norms": True, "form": "plain"},
    "san-lora": {"name": "san", "carrier": "lora", "rank": 4},
    "san-dora": {"name": "san", "carrier": "dora", "rank": 4},
    "lora": {"name": "lora", "rank": 4},
    "lora-nodrop": {"name": "lora", "rank": 4, "dropout": 0},
    "dora": {"name": "dora", "rank": 4},
    "ia3": {"name": "ia3"},
}
TUNERS = {
    "road": {"peft_type": "ROAD", "group_size": 16},
    "vera": {"peft_type": "VERA", "r": 8},
    "hra": {"peft_type": "HRA"},  # keeps whole weights
    "pvera": {"peft_type": "PVERA", "r": 8},  # rows draw at random, so that they share nothing
    "ln_tuning": {"peft_type": "LN_TUNING"},
}
METHODS |= {
    name: {
        "name": "peft",
        "config": config,
        **({} if name == "ln_tuning" else {"target_modules": "all"}),
    }
    for name, config in TUNERS.items()
}


def module(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def recipe_of(method: dict[str, Any], **training: Any) -> Recipe:
    return parse_recipe(
        json.dumps(
            {
                "base": {"model": "smollm2-135m"},
                "method": method,
                "data": {"train": "pocket", "loss": "all"},
                "training": {"learning_rate": 1e-3, "batch_size": 8, **training},
            }
        ),
        "r.yaml",
    )


def setting(method: Method | None, config: Any, batch: Batch, **how: Any) -> Setting:
    plain = {"dtype": "float32", "bits": None, "double_quant": False, "checkpointing": False}
    known = {**plain, "device": "cpu", **how}
    if isinstance(method, PeftMethod):
        known["measured"] = measure(method, config, known["dtype"])
    return Setting(shape=shape_of(config), method=method, batch=batch, **known)


# --- what is counted, held against what torch does ---


def kept(method: Method, blocks: int, dtype: torch.dtype, packed: bool) -> tuple[int, int]:
    """Return the bytes autograd keeps of a forward pass, and what is told of a block."""
    model = tiny_model(dtype=dtype, hidden_size=64, intermediate_size=160, num_hidden_layers=blocks)
    model = add_adapter(model.requires_grad_(False), method).train()
    texts = [[5 + row, *range(6, 70)] for row in range(6)]  # 65 tokens each
    pieces = [{"input_ids": text, "labels": text} for text in texts]
    if packed:
        use_packed_attention(model.get_base_model())
        draws = has_dropout(model) or bool(getattr(method, "dropout", None))
        inputs = Pack(share=not draws)(pieces)
        batch = Batch(
            inputs["input_ids"].numel(),
            len(inputs["labels"]),
            65,
            packed=True,
            masked=False,
        )
    else:
        inputs = Pad(2)(pieces)
        batch = full_batch(6, inputs["input_ids"].shape[1], packed=False)
    held = (*model.parameters(), *model.buffers())
    own = {tensor.untyped_storage().data_ptr() for tensor in held}
    storages: dict[int, int] = {}
    alive = []

    def seen(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor):
        token_losses(model, inputs)
    config = model.get_base_model().config.to_dict()
    low = "float32" if dtype == torch.float32 else "bfloat16"
    return sum(storages.values()), _kept_by_block(setting(method, config, batch, dtype=low))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_what_a_block_keeps_is_what_autograd_keeps(name, dtype):
    if (name, dtype) == ("ln_tuning", torch.bfloat16):
        return  # which is refused
    method = recipe_of(METHODS[name]).method
    two, told = kept(method, 2, dtype, packed=True)
    three, _ = kept(method, 3, dtype, packed=True)
    # What has the size of a gamma, not of a token's features, is left out.
    assert told == pytest.approx(three - two, rel=0.03)


@pytest.mark.parametrize("name", ["san", "lora"])
def test_what_a_block_keeps_of_padded_rows(name):
    method = recipe_of(METHODS[name]).method
    two, told = kept(method, 2, torch.float32, packed=False)
    three, _ = kept(method, 3, torch.float32, packed=False)
    assert told == pytest.approx(three - two, rel=0.03)


@pytest.mark.parametrize("name", METHODS)
def test_trained_numbers_are_those_that_torch_counts(name):
    base = tiny_model()
    method = recipe_of(METHODS[name]).method
    batch = full_batch(1, 8, packed=True)
    told = setting(method, base.config.to_dict(), batch).trained
    assert sum(told.values()) == trainable_parameters(add_adapter(base, method))


@pytest.mark.parametrize("kind", ["SHIRA", "FROD"])
def test_a_tuner_that_looks_at_the_base_is_counted_on_random_numbers(kind):
    # 3 blocks, which are taken to be as the first two.
    base = tiny_model(num_hidden_layers=3).requires_grad_(False)
    config = {"peft_type": kind, **({"r": 4} if kind == "SHIRA" else {})}
    method = PeftMethod(name="peft", config=config, target_modules="all")
    told = measure(method, base.config.to_dict(), "float32")
    # FRoD keeps as many numbers of a random pattern as fall on different places.
    trained = trainable_parameters(add_adapter(base, method))
    assert sum(told.trained.values()) == pytest.approx(trained, rel=0.01 if kind == "FROD" else 0)
    assert told.fixed > 0


def test_what_all_blocks_share_is_counted_once():
    config = {"peft_type": "UNILORA", "theta_d_length": 50}
    method = PeftMethod(name="peft", config=config)
    assert measure(method, tiny_model().config.to_dict(), "float32").trained == {SHARED: 50}


def test_weights_are_those_that_torch_counts():
    for tied in (True, False):
        base = tiny_model(tie_word_embeddings=tied)
        shape = shape_of(base.config.to_dict())
        assert shape.linear_numbers + shape.other_numbers == base.num_parameters()


def test_the_loss_works_on_as_many_logits_as_is_told():
    assert LOGITS_AT_ONCE == head_loss.LOGITS_AT_ONCE


# --- the published tables ---


@pytest.fixture(scope="module")
def measured():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        benchmark = module("benchmarks/plan.py")
    text = (ROOT / "benchmarks" / "results_plan_peaks.json").read_text(encoding="utf-8")
    return benchmark, json.loads(text)["cases"]


def test_most_estimates_are_within_a_tenth_of_the_measured_peak(measured):
    benchmark, cases = measured
    near = [c for c in cases.values() if abs(benchmark.planned(c).total / c["peak"] - 1) < 0.1]
    assert len(near) >= 12


def test_the_published_table_is_what_the_estimator_says(measured):
    benchmark, cases = measured
    assert benchmark.table(cases) in (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")


def test_the_page_of_large_models_is_what_the_estimator_says():
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert page == module("scripts/make_scale.py").scale_page(), (
        "python scripts/make_scale.py writes docs/scale.md anew"
    )


# --- what follows from what ---


def test_a_share_of_the_base_and_its_traffic_follow_from_the_devices():
    config, batch = KNOWN["huggyllama/llama-7b"], full_batch(1, 64, packed=True)
    method = recipe_of(METHODS["san"]).method
    alone = setting(method, config, batch, device="cuda")
    shared = setting(method, config, batch, device="cuda", devices=8, sharded=True)
    assert memory(shared).weights == memory(alone).weights // 8
    assert traffic(alone) == 0
    copies = setting(method, config, batch, device="cuda", devices=8)
    assert traffic(copies) == 2 * 4 * 1_359_872 * 7 // 8
    # With accumulation the base is gathered for every micro-batch, gradients go round once.
    assert traffic(copies, micro_batches=3) == traffic(copies)
    gathered = traffic(shared, micro_batches=2) - traffic(shared)
    assert traffic(shared) == pytest.approx(gathered + traffic(copies), abs=2)


# numbers of all weights in Linears of blocks, of all others, and rows of those Linears
LINEAR, OTHER = 106_168_320, (49_152 + 2 * 30 + 1) * 576
ROWS = 30 * (576 + 192 + 192 + 576 + 1536 + 1536 + 576)


@pytest.mark.parametrize(
    ("how", "weights"),
    [
        ({}, 4 * (LINEAR + OTHER)),
        ({"dtype": "bfloat16"}, 2 * (LINEAR + OTHER)),
        ({"bits": "4bit", "dtype": "bfloat16"}, LINEAR * 9 // 16 + 2 * OTHER),
        ({"bits": "4bit", "double_quant": True}, round(LINEAR * (33 / 64 + 1 / 4096)) + 4 * OTHER),
        ({"bits": "8bit"}, LINEAR + 4 * ROWS + 4 * OTHER),
        ({"devices": 3}, 4 * (LINEAR + OTHER)),
        ({"devices": 3, "sharded": True}, 4 * (LINEAR + OTHER) // 3),
    ],
    ids=str,
)
def test_the_weights_of_a_device_by_hand(how, weights):
    method, batch = recipe_of(METHODS["san"]).method, full_batch(1, 64, packed=True)
    found = memory(setting(method, KNOWN["smollm2-135m"], batch, **how))
    assert found.weights == weights
    copies = 1 + (how.get("devices", 1) > 1)  # of gradients, in the buckets that are exchanged
    trained = 4 * 155_520
    states = (found.adapter, found.gradients, found.optimizer)
    assert states == (trained, copies * trained, 2 * trained)
    parts = vars(found)
    assert found.total == sum(parts.values())
    assert replace(found, cache=7).total == found.total + 7


@pytest.mark.parametrize(
    ("how", "gradients", "optimizer"),
    [
        ({}, 4, 8),
        ({"dtype": "bfloat16"}, 2, 12),
        ({"bits": "4bit"}, 4, 8),  # which no full fine-tuning has
        ({"devices": 2}, 2 * 4, 8),
        ({"devices": 2, "sharded": True}, 4 / 2, 8 / 2),
        ({"dtype": "bfloat16", "devices": 4, "sharded": True}, 2 / 4, 12 / 4),
    ],
    ids=str,
)
def test_what_full_fine_tuning_holds_by_hand(how, gradients, optimizer):
    found = memory(setting(None, KNOWN["smollm2-135m"], full_batch(1, 64, packed=True), **how))
    whole = LINEAR + OTHER
    states = (found.adapter, found.gradients, found.optimizer)
    assert states == (0, int(whole * gradients), int(whole * optimizer))
    assert found.weights == (2 if "dtype" in how else 4) * whole // (
        how["devices"] if "sharded" in how else 1
    )


def test_a_full_fine_tuning_sends_all_gradients_and_a_sharded_one_its_weights_too():
    config, batch = KNOWN["smollm2-135m"], full_batch(1, 64, packed=True)
    whole = 4 * (LINEAR + OTHER)
    copies = setting(None, config, batch, devices=4)
    assert traffic(copies, micro_batches=5) == 2 * whole * 3 // 4
    shared = setting(None, config, batch, devices=4, sharded=True)
    gathered = 4 * (2 * LINEAR + OTHER)
    assert traffic(shared, micro_batches=5) == (whole + 5 * gathered) * 3 // 4


@pytest.mark.parametrize("packed", [False, True])
def test_the_largest_batch_by_hand(packed):
    seen = 63 if packed else 64  # the last token of a packed row is only predicted
    assert full_batch(3, 64, packed) == Batch(
        tokens=3 * seen,
        learned=3 * 63,
        longest=seen,
        packed=packed,
        masked=not packed,
    )


def test_holes_are_a_cpus_and_of_runs_that_spare_no_memory():
    config, method = KNOWN["smollm2-135m"], recipe_of(METHODS["san"]).method
    batch = full_batch(8, 128, packed=True)
    for how, some in (
        ({}, True),
        ({"device": "cuda"}, False),
        ({"checkpointing": True}, False),
        ({"bits": "4bit"}, False),
    ):
        found = memory(setting(method, config, batch, **how))
        assert (found.holes > 0) == some, how
        assert found.runtime == RUNTIME[how.get("device", "cpu")]
        assert found.holes < 0.4 * found.activations


def test_checkpointing_and_4_bits_take_less_and_longer_rows_more():
    config, method = KNOWN["smollm2-135m"], recipe_of(METHODS["san"]).method
    batch = full_batch(8, 128, packed=True)
    plain = memory(setting(method, config, batch))
    assert memory(setting(method, config, batch, checkpointing=True)).total < plain.total
    four = memory(setting(method, config, batch, bits="4bit", double_quant=True))
    assert four.weights < plain.weights / 3
    assert memory(setting(method, config, full_batch(8, 256, True))).total > plain.total


# --- sizes ---


@given(st.integers(1, 10**6), st.sampled_from(["", "K", "M", "G", "T"]), st.booleans())
def test_a_size_is_read_in_thousands_or_in_powers_of_two(count, prefix, binary):
    power = " KMGT".index(prefix or " ")
    text = f"{count}{prefix}{'i' if binary and prefix else ''}B"
    expected = count * (1024 if binary and prefix else 1000) ** power
    assert bytes_of(text) == bytes_of(text.lower()) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "24 G B", "1e3", "nan", "24XB", "24GBB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError, match="--memory: expected a size such as 24GB"):
        bytes_of(text)


# --- the plan of a run, and the run ---


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_has_a_plan(name):
    plan = make_plan(load_recipe(shipped_recipes()[name]), {"base.model"}, "cuda")
    title, needed = next(iter(plan.memory.items()))
    assert title.split()[0].lower() == plan.recipe.method.name
    if plan.graph is not None:
        assert sum(plan.trained.values()) == plan.graph.trained
    defaults = dict(marked_recipe(plan))
    assert not defaults[f"  model: {plan.recipe.base.model}"]
    assert defaults["  batch_size: 16"]  # not named above
    promised = re.search(r"one GPU of (\d+) GB", hardware(shipped_recipes()[name]))
    assert promised or name == "smollm2_demo"
    if promised:
        assert needed.total < 0.9 * int(promised[1]) * 1e9


@pytest.mark.parametrize(("held_out", "epochs"), [(0, 1.5), (5, 1.0)])
def test_a_run_does_what_was_planned(here, tiny_base, held_out, epochs):
    file = write_recipe(
        here / "r.yaml",
        tiny_base,
        write_rows(here / "rows.json", rows(21)),
        data={"held_out": held_out, "cutoff": 256},
        training={"epochs": epochs, "max_steps": None, "batch_size": 4, "micro_batch_size": 2},
    )
    recipe = load_recipe(file)
    counted = make_plan(recipe, set(), "cpu")
    looked = make_plan(recipe, set(), "cpu", seen=look_at(recipe, 2))
    done = train(recipe, new_run(recipe, here / "run", overwrite=False))
    assert looked.steps == counted.steps == done.steps
    assert looked.rows == counted.rows == done.rows == 21 - held_out
    assert sum(counted.trained.values()) == done.trained_numbers
    assert looked.batch.tokens < counted.batch.tokens
    file_bytes = (here / "run" / "adapter" / "adapter_model.safetensors").stat().st_size
    assert 0 <= file_bytes - counted.adapter_bytes < 8_000


def test_the_command_tells_whether_it_fits(command, here, tiny_base):
    recipe = write_recipe(here / "r.yaml", tiny_base, write_rows(here / "rows.json", rows(9)))
    done = command("plan", recipe, "--memory", "8GB", "--device", "cpu")
    assert done.returncode == 0
    assert "fits into 8.00 GB" in done.stdout
    assert "block 1 ... block 3  (3 alike)" in done.stdout
    assert "dtype: float32\n" in done.stdout  # given
    assert "mode: both  # default" in done.stdout
    done = command("plan", recipe, "--memory", "100MB", "--device", "cpu", "--data", "--json")
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert (told["fits"], told["looked"], told["data"]["rows"]) == (False, True, 9)
    assert told["memory"]["SAN"]["total"] == sum(
        size for name, size in told["memory"]["SAN"].items() if name != "total"
    )
