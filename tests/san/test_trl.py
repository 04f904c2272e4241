"""TRL's SFTTrainer trains a SAN adapter, given the config or a wrapped model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from san.adapted import logits, text, vectors
from tiny import rows, tiny_model, tiny_tokenizer

from san_llm import SanConfig

trl = pytest.importorskip("trl")


def chats() -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["instruction"]}],
                "completion": [{"role": "assistant", "content": row["output"]}],
            }
            for row in rows(16)
        ]
    )


def arguments(folder: Path, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": 128,
        "seed": 0,
    }
    return trl.SFTConfig(**(settings | changes))


def trainer(model: Any, folder: Path, config: Any = None, **changes: Any) -> Any:
    return trl.SFTTrainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=chats(),
        processing_class=tiny_tokenizer(),
        peft_config=config,
    )


def assert_only_scales_moved(model: Any, plain: Any) -> None:
    assert isinstance(model, PeftModel)
    gammas, betas = vectors(model)
    assert len(gammas) == 28
    for name, gamma in gammas.items():
        assert not torch.equal(gamma, torch.ones_like(gamma)), name
    for name, beta in betas.items():
        assert not torch.equal(beta, torch.zeros_like(beta)), name
    base = model.unload().state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(base[name], value), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"packing": True, "max_length": 96},
        {"gradient_checkpointing": True},
        {"completion_only_loss": False, "gradient_accumulation_steps": 2},
        {"loss_type": "chunked_nll"},
    ],
    ids=str,
)
def test_given_the_config_it_trains_scales_and_leaves_the_base(tmp_path, changes):
    job = trainer(tiny_model(), tmp_path, SanConfig(shift=True), **changes)
    job.train()
    assert_only_scales_moved(job.model, tiny_model())


def test_given_a_wrapped_model_it_ends_where_the_config_leads(tmp_path):
    one = trainer(tiny_model(), tmp_path / "config", SanConfig())
    one.train()
    other = trainer(get_peft_model(tiny_model(), SanConfig()), tmp_path / "wrapped")
    other.train()
    theirs = vectors(other.model)[0]
    for name, gamma in vectors(one.model)[0].items():
        assert torch.equal(gamma, theirs[name]), name
    assert_only_scales_moved(other.model, tiny_model())


def test_what_it_saves_comes_back_bit_for_bit(tmp_path):
    job = trainer(tiny_model(), tmp_path, SanConfig())
    job.train()
    job.save_model(str(tmp_path / "adapter"))
    job.model.eval()
    again = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")
    assert torch.equal(logits(again, text()), logits(job.model, text()))


def test_the_loss_of_the_first_step_is_the_bases(tmp_path):
    job = trainer(tiny_model(), tmp_path, SanConfig(), max_steps=1, logging_steps=1)
    job.train()
    plain = trainer(tiny_model(), tmp_path, max_steps=1, logging_steps=1)
    plain.train()
    assert job.state.log_history[0]["loss"] == plain.state.log_history[0]["loss"]
