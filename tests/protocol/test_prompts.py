"""Every prompt text, written out: nothing here is computed by the code under test."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from san_llm.errors import InputError
from san_llm.protocol.prompts import STYLES, evaluation_prompt, prompt_style, training_prompt

QUESTION = "Is water wet?\n\nAnswer format: true/false"
CONTEXT = "Water: H2O."

# fmt: off
TRAINING_PLAIN = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n"  # noqa: E501
    "\n"
    "                ### Instruction:\n"
    "                Is water wet?\n"
    "\n"
    "Answer format: true/false\n"
    "                \n"
    "                ### Response:\n"
    "                "
)
EVALUATION_PLAIN = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n"  # noqa: E501
    "\n"
    "                ### Instruction:\n"
    "                Is water wet?\n"
    "\n"
    "Answer format: true/false\n"
    "\n"
    "                ### Response:\n"
    "                "
)
TRAINING_PAIRED = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request. \n"  # noqa: E501
    "\n"
    "                ### Instruction:\n"
    "                Is water wet?\n"
    "\n"
    "Answer format: true/false\n"
    "                \n"
    "                ### Input:\n"
    "                Water: H2O.\n"
    "                \n"
    "                ### Response:\n"
    "                "
)
EVALUATION_PAIRED = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.\n"  # noqa: E501
    "\n"
    "                ### Instruction:\n"
    "                Is water wet?\n"
    "\n"
    "Answer format: true/false\n"
    "\n"
    "                ### Input:\n"
    "                Water: H2O.\n"
    "\n"
    "                ### Response:\n"
    "                "
)
ALPACA_PLAIN = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"  # noqa: E501
    "\n"
    "### Instruction:\n"
    "Is water wet?\n"
    "\n"
    "Answer format: true/false\n"
    "\n"
    "### Response:\n"
)
ALPACA_PAIRED = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.\n"  # noqa: E501
    "\n"
    "### Instruction:\n"
    "Is water wet?\n"
    "\n"
    "Answer format: true/false\n"
    "\n"
    "### Input:\n"
    "Water: H2O.\n"
    "\n"
    "### Response:\n"
)
# fmt: on

TEXTS = [
    ("llm-adapters", "", TRAINING_PLAIN, EVALUATION_PLAIN),
    ("llm-adapters", CONTEXT, TRAINING_PAIRED, EVALUATION_PAIRED),
    ("llm-adapters-aligned", "", TRAINING_PLAIN, TRAINING_PLAIN),
    ("llm-adapters-aligned", CONTEXT, TRAINING_PAIRED, TRAINING_PAIRED),
    ("alpaca", "", ALPACA_PLAIN, ALPACA_PLAIN),
    ("alpaca", CONTEXT, ALPACA_PAIRED, ALPACA_PAIRED),
]


@pytest.mark.parametrize(("style", "context", "training", "evaluation"), TEXTS)
def test_every_style_writes_both_faces_byte_for_byte(style, context, training, evaluation):
    assert training_prompt(style, QUESTION, context) == training
    assert evaluation_prompt(style, QUESTION, context) == evaluation


def test_the_table_has_every_style_that_is_a_text_of_ours():
    assert {style for style, *_ in TEXTS} == set(STYLES) - {"chat"}


@pytest.mark.parametrize("write", [training_prompt, evaluation_prompt])
def test_the_chat_style_has_no_text_without_a_tokenizer(write):
    with pytest.raises(ValueError, match="chat"):
        write("chat", QUESTION)


@settings(deadline=None, max_examples=50)
@given(instruction=st.text(), context=st.text(min_size=1))
def test_nothing_of_a_row_is_stripped_or_changed(instruction, context):
    for style in ("llm-adapters", "llm-adapters-aligned", "alpaca"):
        for write in (training_prompt, evaluation_prompt):
            indent = "" if style == "alpaca" else " " * 16
            text = write(style, instruction, context)
            assert f"### Instruction:\n{indent}{instruction}\n" in text
            assert f"### Input:\n{indent}{context}\n" in text
            assert "### Input:" not in write(style, "question").split("### Response:")[0]


def test_an_unknown_style_lists_the_known_ones_and_the_nearest():
    with pytest.raises(InputError) as error:
        prompt_style("alpacca")
    assert str(error.value) == (
        "prompt style 'alpacca' is not one of llm-adapters, llm-adapters-aligned, alpaca, chat "
        "(did you mean 'alpaca'?)"
    )
