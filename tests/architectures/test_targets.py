"""Words that stand for target modules, against PEFT's own tables and the published runs."""

from __future__ import annotations

import pytest
from peft.utils import constants

from san_llm.architectures.decoders import FAMILIES, TARGETS
from san_llm.architectures.targets import PEFT_FEEDFORWARD, targets_of
from san_llm.errors import InputError

LORA = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
IA3 = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
FEEDFORWARD = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_stands_for_what_peft_takes_unless_told(family: str) -> None:
    assert targets_of("san", "peft", family) == list(FAMILIES[family].targets)
    if family not in LORA:
        for method in ("lora", "dora", "ia3"):
            with pytest.raises(InputError, match=f"no choice of its own for a {family} model"):
                targets_of(method, "peft", family)
        return
    assert targets_of("lora", "peft", family) == targets_of("dora", "peft", family) == LORA[family]
    assert targets_of("ia3", "peft", family) == IA3[family]
    assert FEEDFORWARD[family] == list(PEFT_FEEDFORWARD)


def test_published_stands_for_what_ran_the_protocol() -> None:
    five = [name for name in TARGETS if name not in ("o_proj", "gate_proj")]
    assert targets_of("lora", "published") == targets_of("dora", "published") == five
    for method in ("san", "ia3"):
        assert targets_of(method, "published") == list(TARGETS)
    with pytest.raises(InputError, match="a part of 'gate_up_proj' in a phi3 model"):
        targets_of("lora", "published", "phi3")


@pytest.mark.parametrize("method", ["san", "lora", "dora", "ia3"])
def test_all_stands_for_every_linear_of_a_block(method: str) -> None:
    for family, entry in FAMILIES.items():
        assert targets_of(method, "all", family) == list(entry.targets)
