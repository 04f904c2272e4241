"""The examples, run as their users run them, on a tiny base."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from tiny import rows, write_rows
from transformers import AutoModelForCausalLM

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
