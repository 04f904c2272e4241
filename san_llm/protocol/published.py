"""Numbers that others have published for this protocol: to be quoted, never measured here.

What was learned of a row, and for how long, matters as much as the method: LLM-Adapters and DoRA
learn the whole text for 3 epochs, ReFT and RoAd the response for 6. So each number has them beside
it. The shares of LoRA and DoRA are those of q, k, v, up and down, of base and adapter together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DORA = "DoRA, Liu et al. 2024, arXiv:2402.09353"
ROAD = "RoAd, Liao and Monz 2024, arXiv:2409.00119"
REFT = "ReFT, Wu et al. 2024, arXiv:2404.03592"
HIRA = "HiRA, Huang et al. 2025, ICLR"
RERUN = "reruns, by a user of HiRA's code: github.com/hqsiswiliam/hira/issues/7"
SAN = "SAN, abstract of arXiv:2409.06706: 8.5 over ChatGPT, 4.7 over LoRA"

Learned = Literal["response", "whole text", "not found out", "nothing"]


@dataclass(frozen=True)
class Quoted:
    """An average over the eight tasks, in percent, and where it stands.

    Attributes:
        name: Base and method.
        average: The average.
        share: Trained numbers, in percent of all; None where it was not found out.
        learned: What of a training row the loss was on; ``nothing`` where none was trained.
        epochs: How often the training rows were seen; None where it was not found out.
        source: A short name, and behind a comma where it stands.
        note: What has to be said with it.
    """

    name: str
    average: float
    share: float | None
    learned: Learned
    epochs: int | None
    source: str
    note: str = ""


QUOTED = (
    Quoted("ChatGPT", 77.0, None, "nothing", None, DORA),
    Quoted("LLaMA-7B LoRA r32", 74.7, 0.83, "whole text", 3, DORA),
    Quoted("LLaMA-7B DoRA r16", 77.5, 0.43, "whole text", 3, DORA),
    Quoted("LLaMA-7B DoRA r32", 78.4, 0.84, "whole text", 3, DORA),
    Quoted("LLaMA-7B IA3, all", 77.8, 0.02, "response", 6, ROAD),
    Quoted("LLaMA-7B RoAd1", 79.2, 0.02, "response", 6, ROAD),
    Quoted("LLaMA-7B LoReFT", 79.5, 0.031, "response", 3, REFT),
    Quoted("LLaMA-7B LoReFT", 80.2, 0.031, "response", 6, REFT),
    Quoted("LLaMA-13B LoRA r32", 80.5, 0.67, "whole text", 3, DORA),
    Quoted("LLaMA-13B DoRA r32", 81.5, 0.68, "whole text", 3, DORA),
    Quoted("LLaMA-13B RoAd1", 83.0, 0.02, "response", 6, ROAD),
    Quoted("LLaMA-13B LoReFT", 83.3, 0.025, "response", 6, REFT),
    Quoted("LLaMA2-7B LoRA r32", 77.6, 0.83, "whole text", 3, DORA),
    Quoted("LLaMA2-7B DoRA r16", 80.5, 0.43, "whole text", 3, DORA),
    Quoted("LLaMA2-7B DoRA r32", 79.7, 0.84, "whole text", 3, DORA),
    Quoted("LLaMA2-7B RoAd1", 81.2, 0.02, "response", 6, ROAD),
    Quoted("LLaMA2-7B LoReFT", 81.8, 0.031, "response", 6, REFT),
    Quoted("LLaMA3-8B LoRA r32", 80.8, 0.70, "whole text", 3, DORA),
    Quoted("LLaMA3-8B LoRA", 86.5, None, "response", None, RERUN),
    Quoted("LLaMA3-8B DoRA r16", 85.0, 0.36, "whole text", 3, DORA),
    Quoted("LLaMA3-8B DoRA r32", 85.2, 0.71, "whole text", 3, DORA),
    Quoted("LLaMA3-8B RoAd1", 86.3, 0.02, "response", 6, ROAD),
    Quoted("LLaMA3-8B LoReFT", 86.6, 0.026, "response", 6, REFT),
    Quoted("LLaMA3-8B DiReFT", 85.4, 0.026, "response", 6, REFT),
    Quoted("LLaMA3-8B HiRA", 86.7, 0.70, "response", None, HIRA),
    Quoted("LLaMA3-8B HiRA", 85.3, 0.70, "whole text", None, RERUN),
    Quoted(
        *("LLaMA3-8B SAN", 85.5, None, "not found out", None, SAN),
        note="carrier not known, likely DoRA",
    ),
)
