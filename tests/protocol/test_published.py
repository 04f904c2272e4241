"""Quoted numbers against what their papers say, each written down here once more by itself."""

import pytest

from san_llm.architectures.sizes import shape_of
from san_llm.plan.bases import KNOWN
from san_llm.plan.memory import trained_numbers
from san_llm.protocol.published import QUOTED
from san_llm.recipe.schema import DoraMethod, LoraMethod

# Base, method, average, trained numbers in percent, what was learned, for how many epochs, whence.
# A: the whole text; P: the response, the prompt masked; ?: not found out.
FACTS = """
LLaMA-7B   LoRA r32    74.7  0.83   A  3  DoRA
LLaMA-7B   DoRA r16    77.5  0.43   A  3  DoRA
LLaMA-7B   DoRA r32    78.4  0.84   A  3  DoRA
LLaMA-7B   IA3, all    77.8  0.02   P  6  RoAd
LLaMA-7B   RoAd1       79.2  0.02   P  6  RoAd
LLaMA-7B   LoReFT      79.5  0.031  P  3  ReFT
LLaMA-7B   LoReFT      80.2  0.031  P  6  ReFT
LLaMA-13B  LoRA r32    80.5  0.67   A  3  DoRA
LLaMA-13B  DoRA r32    81.5  0.68   A  3  DoRA
LLaMA-13B  RoAd1       83.0  0.02   P  6  RoAd
LLaMA-13B  LoReFT      83.3  0.025  P  6  ReFT
LLaMA2-7B  LoRA r32    77.6  0.83   A  3  DoRA
LLaMA2-7B  DoRA r16    80.5  0.43   A  3  DoRA
LLaMA2-7B  DoRA r32    79.7  0.84   A  3  DoRA
LLaMA2-7B  RoAd1       81.2  0.02   P  6  RoAd
LLaMA2-7B  LoReFT      81.8  0.031  P  6  ReFT
LLaMA3-8B  LoRA r32    80.8  0.70   A  3  DoRA
LLaMA3-8B  LoRA        86.5  ?      P  ?  reruns
LLaMA3-8B  DoRA r16    85.0  0.36   A  3  DoRA
LLaMA3-8B  DoRA r32    85.2  0.71   A  3  DoRA
LLaMA3-8B  RoAd1       86.3  0.02   P  6  RoAd
LLaMA3-8B  LoReFT      86.6  0.026  P  6  ReFT
LLaMA3-8B  DiReFT      85.4  0.026  P  6  ReFT
LLaMA3-8B  HiRA        86.7  0.70   P  ?  HiRA
LLaMA3-8B  HiRA        85.3  0.70   A  ?  reruns
LLaMA3-8B  SAN         85.5  ?      ?  ?  SAN
"""
MASKS = {"whole text": "A", "response": "P", "not found out": "?"}
FIVE = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
BASES = {  # of as many numbers
    "LLaMA-7B": ("huggyllama/llama-7b", 6_738_415_616),
    "LLaMA-13B": ("huggyllama/llama-13b", 13_015_864_320),
    "LLaMA3-8B": ("meta-llama/Meta-Llama-3-8B", 8_030_261_248),
}


def number(text):
    return None if text == "?" else float(text)


def test_every_number_stands_with_what_was_trained_learned_and_for_how_long():
    facts = [line.rsplit(maxsplit=5) for line in FACTS.strip().splitlines()]
    said = [
        (" ".join(name.split()), float(average), number(share), mask, number(epochs), source)
        for name, average, share, mask, epochs, source in facts
    ]
    chatgpt, *trained = QUOTED
    assert [
        (q.name, q.average, q.share, MASKS[q.learned], q.epochs, q.source.partition(",")[0])
        for q in trained
    ] == said
    assert (chatgpt.name, chatgpt.average, chatgpt.learned) == ("ChatGPT", 77.0, "nothing")
    assert [q.name for q in QUOTED if q.note] == ["LLaMA3-8B SAN"]


@pytest.mark.parametrize("quoted", [q for q in QUOTED if " r" in q.name], ids=lambda q: q.name)
def test_shares_of_low_rank_methods_are_those_of_the_published_five_modules(quoted):
    base, method, rank = quoted.name.replace("LLaMA2", "LLaMA").split()
    known, numbers = BASES[base]
    kind = {"LoRA": LoraMethod, "DoRA": DoraMethod}[method]
    recipe = kind(name=method.lower(), rank=int(rank[1:]), target_modules=FIVE)
    added = sum(trained_numbers(shape_of(KNOWN[known]), recipe).values())
    assert quoted.share == pytest.approx(100 * added / (numbers + added), abs=0.005)
