"""Whose tokenizer and chat template a model is asked with: an adapter's own, else its base's.

Trainers such as TRL's save both beside the adapter that was trained with them.
"""

from __future__ import annotations

from pathlib import Path

from san_llm.files import read_json

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    "*.model",
)
_TEMPLATES = ("chat_template*",)


def tokenizer_folder(base: Path, adapter: Path | None) -> Path:
    """Return the folder with the tokenizer: the adapter's where one lies in it, else the base's."""
    own = adapter is not None and any((adapter / name).is_file() for name in TOKENIZERS)
    return adapter if own and adapter is not None else base


def template_files(base: Path, adapter: Path | None) -> list[Path]:
    """Return the files with the chat template, those of the adapter before the base's.

    There are none where the tokenizer's own settings hold it.
    """
    if adapter is None:
        return _matching(base, _TEMPLATES)
    own, settings = _matching(adapter, _TEMPLATES), adapter / "tokenizer_config.json"
    inside = (
        tokenizer_folder(base, adapter) == adapter
        and settings.is_file()
        and read_json(settings).get("chat_template")
    )
    return own if own or inside else _matching(base, _TEMPLATES)


def tokenizer_files(base: Path, adapter: Path | None) -> list[Path]:
    """Return all files of the tokenizer and the chat template that go with a merged model."""
    words = _matching(tokenizer_folder(base, adapter), _FILES)
    return words + template_files(base, adapter)


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return [f for pattern in patterns for f in sorted(folder.glob(pattern)) if f.is_file()]
