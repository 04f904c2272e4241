"""The neutral text: what its note says of it, and that nothing but text is left in it."""

import re
from pathlib import Path

PROTOCOL = Path(__file__).resolve().parents[2] / "san_llm" / "protocol"
TEXT = (PROTOCOL / "neutral.txt").read_bytes()


def test_the_note_has_its_size():
    note = (PROTOCOL / "neutral.md").read_text("utf-8")
    assert len(TEXT) < 210_000
    paragraphs = TEXT.decode().rstrip("\n").split("\n\n")
    assert f"{len(TEXT) / 1000:.0f} kB, {len(paragraphs)} paragraphs" in note
    assert len(set(paragraphs)) == len(paragraphs)


def test_it_is_plain_paragraphs_of_english():
    lines = TEXT.decode().splitlines()
    assert all(lines[::2])
    assert not any(lines[1::2])  # an empty line after each
    assert all(line == " ".join(line.split()) for line in lines)
    left = re.compile(r"gutenberg|e-?book|copyright|https?:|[\[\]<>{}|\\_#*]", re.IGNORECASE)
    assert not [line for line in lines if left.search(line)]
