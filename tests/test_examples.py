"""The examples, run as their users run them, on a tiny base."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, get_peft_model
from tiny import rows, write_rows
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

from san_llm import SanConfig
from san_llm.architectures.sizes import shape_of
from san_llm.plan.memory import trained_numbers
from san_llm.recipe.schema import SanMethod

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def example(here, monkeypatch):
    """Run a file of ``examples/`` with arguments, in a directory of its own."""

    def run(name: str, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    write_rows(here / "rows.json", rows(20))
    return run


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(4, 40)[None]).logits


def assert_trained_on(base: Path, adapted) -> None:
    """Every scale has moved, and without the adapter the model is the base bit for bit."""
    scales = [value for name, value in adapted.named_parameters() if "san_gamma" in name]
    assert len(scales) == 28
    assert all((scale != 1).any() for scale in scales)
    plain = logits(AutoModelForCausalLM.from_pretrained(base))
    assert (logits(adapted) - plain).abs().max() > 1e-3
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), plain)


def test_peft_and_trainer_train_an_adapter_and_merge_it(example, tiny_base, here, capsys):
    example("peft_trainer.py", tiny_base, "rows.json", "out", 4)
    assert "trainable params: 896 " in capsys.readouterr().out
    adapted = AutoPeftModelForCausalLM.from_pretrained("out")
    assert_trained_on(tiny_base, adapted)
    merged = AutoModelForCausalLM.from_pretrained("out/merged")
    assert torch.allclose(logits(merged), logits(adapted), atol=1e-4)


def test_trl_trains_an_adapter_that_peft_loads(example, tiny_base, here):
    example("trl_sft.py", tiny_base, "rows.json", "out", 4)
    assert_trained_on(tiny_base, AutoPeftModelForCausalLM.from_pretrained("out"))


# --- PEFT's method comparison ---

COMPARISON = EXAMPLES / "peft_method_comparison"
# The fields of the suite's TrainConfig (MetaMathQA/utils.py), all of them needed, and the defaults
# (default_training_params.json) that an experiment's own file changes.
DEFAULTS = {
    "model_id": "meta-llama/Llama-3.2-3B",
    "dtype": "bfloat16",
    "max_seq_length": 768,
    "batch_size": 4,
    "batch_size_eval": 50,
    "max_steps": 5000,
    "eval_steps": 250,
    "compile": False,
    "use_gc": False,
    "seed": 0,
    "grad_norm_clip": 1.0,
    "optimizer_type": "AdamW",
    "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1},
    "lr_scheduler": "cosine",
    "use_amp": False,
    "autocast_adapter_dtype": True,
    "attn_implementation": None,
    "generation_kwargs": {"max_length": 800, "max_new_tokens": 300},
    "query_template": "Question: {query} Think step by step.\nAnswer:",
    "init_kv_cache_prefix": None,
}
LLAMA_3B = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}


@pytest.fixture
def experiment() -> Path:
    """The folder that the suite runs, which it wants under ``experiments/<method>/<name>``."""
    (config,) = COMPARISON.glob("experiments/*/*/adapter_config.json")
    return config.parent


def test_the_suite_reads_the_experiment_and_its_note_tells_the_same(experiment):
    own = json.loads((experiment / "training_params.json").read_text())
    assert own.keys() <= DEFAULTS.keys()
    assert own["optimizer_kwargs"].keys() == DEFAULTS["optimizer_kwargs"].keys()
    assert own["optimizer_kwargs"]["weight_decay"] == 0  # else every scale is pulled to 0
    assert f"lr_{own['optimizer_kwargs']['lr']:g}" in experiment.name
    config = PeftConfig.from_pretrained(experiment)
    assert isinstance(config, SanConfig)
    assert (config.carrier, config.mode, config.target_modules) == ("scale", "both", None)
    json.dumps(config.to_dict())  # which the suite writes into its results
    trained = sum(trained_numbers(shape_of(LLAMA_3B), SanMethod(name="san")).values())
    note = (COMPARISON / "README.md").read_text()
    assert f"{trained:,} numbers" in note
    assert f"experiments/san/{experiment.name}\n" in note


def test_the_suites_way_of_training_trains_the_experiment(experiment, tiny_base, tmp_path):
    settings = {**DEFAULTS, **json.loads((experiment / "training_params.json").read_text())}
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16)
    config = PeftConfig.from_pretrained(experiment)
    model = get_peft_model(base, config, autocast_adapter_dtype=settings["autocast_adapter_dtype"])
    optimizer = getattr(torch.optim, settings["optimizer_type"])(
        model.parameters(), **settings["optimizer_kwargs"]
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, 4)
    batch = {"input_ids": torch.arange(4, 60).view(2, 28), "attention_mask": torch.ones(2, 28)}
    batch["labels"] = batch["input_ids"].clone()

    def measured() -> torch.Tensor:
        with torch.inference_mode():
            return model.eval()(input_ids=batch["input_ids"]).logits.clone()

    with model.disable_adapter():
        plain = measured()
    assert torch.equal(measured(), plain)
    assert model.get_nb_trainable_parameters()[0] == 4 * (3 * 32 + 2 * 16 + 2 * 48)
    losses = []
    for _ in range(2):
        model.train()
        optimizer.zero_grad()
        loss = model(**batch, num_items_in_batch=batch["attention_mask"].sum().item()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["grad_norm_clip"])
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        measured()  # as the suite does between steps
    assert losses[1] < losses[0]
    assert not torch.equal(measured(), plain)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size > 0
