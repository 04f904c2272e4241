"""Whose tokenizer and chat template a model is asked with: an adapter's own, else its base's.

Trainers such as TRL's save both beside the adapter that was trained with them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from san_llm.errors import InputError, first_line, nearest_file
from san_llm.files import read_json
from san_llm.models.agree import refuse_past_embedding
from san_llm.models.locate import FoundBase
from san_llm.models.reading import load_or_refuse
from san_llm.protocol.template_date import with_date
from san_llm.protocol.templates import NAMES
from san_llm.protocol.templates import template as named_template
from san_llm.recipe.carried_on import adapter_folder
from san_llm.recipe.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

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


def load_tokenizer(
    found: FoundBase,
    adapter: Path | None = None,
    date: str | None = None,
    template: str | None = None,
    *,
    bases_template: bool = False,
) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a base, or of an adapter that brings its own; likewise its template.

    Args:
        found: The base.
        adapter: The adapter's folder.
        date: What a chat template writes as today's; None: one that does so refuses.
        template: The chat template instead: the name of one of ours, or a file.
        bases_template: Write chats as the base does, also where the adapter brings its own.

    Raises:
        InputError: when there is none that can be used, or an adapter's has tokens that the
            embedding has no rows for.
    """
    folder = tokenizer_folder(found.folder, adapter)
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise InputError(f"{folder}: no tokenizer in it: none of {', '.join(TOKENIZERS)}")
    tokenizer: PreTrainedTokenizerFast = load_or_refuse(
        "tokenizer",
        str(folder),
        _class_of(folder, found).from_pretrained,
        trust_remote_code=found.base.trust_remote_code,
    )
    if bases_template and folder == adapter:
        tokenizer.chat_template = load_tokenizer(found).chat_template
    for file in template_files(found.folder, None if bases_template else adapter):
        if file.parent != folder and file.suffix == ".jinja":
            tokenizer.chat_template = file.read_text(encoding="utf-8")
    chat: Any = tokenizer.chat_template if template is None else _template(template, tokenizer)
    if isinstance(chat, dict):
        tokenizer.chat_template = {name: with_date(text, date) for name, text in chat.items()}
    elif chat:
        tokenizer.chat_template = with_date(chat, date)
    if found.vocabulary is not None:
        _check_words(tokenizer, found, folder, adapter)
    return tokenizer


def training_tokenizer(recipe: Recipe, found: FoundBase) -> PreTrainedTokenizerFast:
    """Return the tokenizer that a recipe's rows are written with, over its base.

    Raises:
        InputError: see :func:`load_tokenizer`; and where the adapter that it goes on from is none.
    """
    before, data = adapter_folder(recipe.base.adapter), recipe.data
    return load_tokenizer(found, before, date=data.date, template=data.chat_template)


def _class_of(folder: Path, found: FoundBase) -> Any:
    """Return what loads a tokenizer: transformers' choice, or at once what it would choose.

    Its choice takes two seconds of imports, torch among them. It is the class that the file names
    where that reads ``tokenizer.json`` as it stands, and the model is a Llama.
    """
    import transformers

    file = folder / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else {}
    plain = settings.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
    if plain and "auto_map" not in settings and found.config.get("model_type") == "llama":
        return transformers.PreTrainedTokenizerFast
    return transformers.AutoTokenizer


def begins_texts(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Return whether a tokenizer puts its first token before every text."""
    tokens = tokenizer("a")["input_ids"]
    return bool(tokens) and tokens[0] == tokenizer.bos_token_id


def _template(name: str, tokenizer: PreTrainedTokenizerFast) -> str:
    if name in NAMES:
        return named_template(name, begins_texts(tokenizer))
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or first_line(error)
        raise InputError(
            f"data.chat_template: {name}: cannot be read: {why}{nearest_file(Path(name))}"
        ) from None


def embedded(found: FoundBase, adapter: Path | None) -> int:
    """Return how many tokens the embedding has rows for, counting those that an adapter brings."""
    rows: int = found.config["vocab_size"]
    if adapter is None:
        return rows
    from san_llm.models.adapter import embedding_rows, open_adapter

    return embedding_rows(open_adapter(adapter), rows)


def _check_words(
    tokenizer: PreTrainedTokenizerFast, found: FoundBase, folder: Path, adapter: Path | None
) -> None:
    """Refuse tokens of a tokenizer in ``folder`` that will be met and have no row."""
    rows = embedded(found, adapter)
    for role in ("eos_token", "pad_token"):  # what every row ends with, or is filled up with
        number = getattr(tokenizer, f"{role}_id")
        if number is not None:
            where = f"{folder / 'tokenizer_config.json'}: {role}"
            refuse_past_embedding([number], rows, where, tokenizer)
    if folder != adapter:
        return
    word, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if number >= rows and word not in load_tokenizer(found).get_vocab():
        raise InputError(
            f"{adapter}: its tokenizer has the token {word!r} ({number:,}), the embedding "
            f"{rows:,} rows: it was added, and the adapter brings no row for it; save the adapter "
            "with its embedding, or take its tokenizer's files out of the folder"
        )
