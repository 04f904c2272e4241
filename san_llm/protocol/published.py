"""Numbers that others have published for this protocol: to be quoted, never measured here."""

from __future__ import annotations

from dataclasses import dataclass

DORA = "DoRA, Liu et al. 2024, arXiv:2402.09353"
SAN = "SAN, abstract of arXiv:2409.06706: 8.5 over ChatGPT, 4.7 over LoRA"


@dataclass(frozen=True)
class Quoted:
    """An average over the eight tasks, in percent, and where it stands."""

    name: str
    average: float
    source: str


QUOTED = (
    Quoted("ChatGPT", 77.0, DORA),
    Quoted("LLaMA-7B LoRA", 74.7, DORA),
    Quoted("LLaMA-7B DoRA", 78.4, DORA),
    Quoted("LLaMA-13B LoRA", 80.5, DORA),
    Quoted("LLaMA-13B DoRA", 81.5, DORA),
    Quoted("LLaMA2-7B LoRA", 77.6, DORA),
    Quoted("LLaMA2-7B DoRA", 80.5, DORA),
    Quoted("LLaMA3-8B LoRA", 80.8, DORA),
    Quoted("LLaMA3-8B DoRA", 85.2, DORA),
    Quoted("LLaMA3-8B SAN", 85.5, SAN),
)
