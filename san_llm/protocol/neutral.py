"""The neutral text, in chunks: on it a model's loss says what an adapter made it forget."""

from __future__ import annotations

import re
from pathlib import Path

NEUTRAL = Path(__file__).with_name("neutral.txt")  # neutral.md beside it says what it is
CHUNK = 1000  # characters at most


def chunks(text: str) -> list[str]:
    """Return a text in chunks of whole words, each as long as fits, the same ones each time."""
    return re.findall(rf"(?s)\S(?:.{{0,{CHUNK - 2}}}\S)?(?!\S)", text)
