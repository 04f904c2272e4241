"""A tokenizer in the words of a ``.gguf`` file, or what of it the format has no place for.

llama.cpp splits text by rules of its own, which a file names: a tokenizer is written only where the
rules of a name are its own. What it does is asked of the tokenizer as transformers loads it, with
which models are trained, and not read from its files a second time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from san_llm.data.ends import turn_end
from san_llm.errors import InputError
from san_llm.models.locate import FoundBase
from san_llm.recipe.schema import Base

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DIGIT = r"\p{N}"
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = "bytes"  # as the letters that stand for them

# What cuts a text up, one after the other, by llama.cpp's name of it (llm_tokenizer_bpe in its
# llama-vocab.cpp). Those on which it agreed with tokenizers over 1,500 texts of many scripts.
SPLITTERS = {
    "gpt-2": (GPT_2, BYTES),
    "smollm": (DIGIT, GPT_2, BYTES),
    "llama-bpe": (LLAMA_3, BYTES),
}
TAKES_WHOLE_WORDS = ("llama-bpe",)  # words of the vocabulary, whatever their merges are


def readable_tokenizer(folder: Path, config: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Return a folder's tokenizer; refuse one that llama.cpp would not make the same tokens with.

    Args:
        folder: A model folder.
        config: The model's config, as its class reads it.

    Raises:
        InputError: naming the file, what stands in the way and the way out.
    """
    from san_llm.models.tokenizer import load_tokenizer

    base = Base(model=str(folder))
    tokenizer = load_tokenizer(FoundBase(base, folder, config, None))
    found = _obstacle(tokenizer)
    if found is None and end_token(tokenizer, config) is None:
        found = "names no end token, for which llama.cpp would take the token 11"
    if found is not None:
        file = folder / "tokenizer.json"
        raise InputError(
            f"--gguf: {file if file.is_file() else folder}: {found}; merge without --gguf, and try "
            "llama.cpp's own convert_hf_to_gguf.py on the merged folder"
        )
    return tokenizer


def _obstacle(tokenizer: Any) -> str | None:
    """Return what GGUF has no place for in a tokenizer, or None."""
    if not tokenizer.is_fast:
        return "has no fast version, whose rules could be written"
    rules = parsed(tokenizer)
    model, stages = rules["model"], tuple(_stages(rules["pre_tokenizer"]))
    if model["type"] != "BPE" or BYTES not in stages:
        kind = model["type"] + (" of SentencePiece's kind" if model.get("byte_fallback") else "")
        return f"only byte-level BPE is written, found {kind}"
    normalizers = [step["type"] for step in _flat(rules["normalizer"], "normalizers")]
    if normalizers:
        return f"the format has no place for its normalizer {', '.join(normalizers)}"
    name = splitter(rules)
    if name is None:
        shown = json.dumps([*stages], ensure_ascii=False)
        return (
            f"text is split by {shown if len(shown) < 200 else shown[:200] + '...'}, of which "
            f"llama.cpp knows no name; expected the rules of {', '.join(SPLITTERS)}"
        )
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            return f"the format has no place for its model's {key} {model[key]!r}"
    if model["ignore_merges"] != (name in TAKES_WHOLE_WORDS) and not _merges_make_all(tokenizer):
        return f"ignore_merges is {model['ignore_merges']}, which llama.cpp's {name} is not"
    for token in rules["added_tokens"]:
        for key in ("lstrip", "rstrip", "single_word"):
            if token[key]:
                return f"the format has no place for {key} of its token {token['content']!r}"
    first = first_tokens(tokenizer)
    if first not in ([], [tokenizer.bos_token_id]):
        shown = " ".join(tokenizer.convert_ids_to_tokens(first))
        return (
            f"it begins a text with {shown}, llama.cpp only with the one start token "
            f"{tokenizer.bos_token}"
        )
    return None


def parsed(tokenizer: Any) -> dict[str, Any]:
    """Return a tokenizer's rules as its ``tokenizer.json`` would have them."""
    rules: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return rules


def splitter(rules: Mapping[str, Any]) -> str | None:
    """Return llama.cpp's name of how text is split before the merges, or None."""
    stages = tuple(_stages(rules["pre_tokenizer"]))
    return next((name for name, known in SPLITTERS.items() if stages == known), None)


def _flat(step: Any, inner: str) -> Iterator[dict[str, Any]]:
    """Iterate over the steps of a normalizer or a splitter, in order."""
    if step is not None and step["type"] == "Sequence":
        for part in step[inner]:
            yield from _flat(part, inner)
    elif step is not None:
        yield step


def _stages(pre_tokenizer: Any) -> Iterator[str]:
    """Iterate over the expressions whose matches become pieces of a text."""
    for step in _flat(pre_tokenizer, "pretokenizers"):
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": regex}:
                yield from (GPT_2, BYTES) if regex else (BYTES,)
            case {"type": "Digits", "individual_digits": True}:
                yield DIGIT
            case {
                "type": "Split",
                "pattern": {"Regex": expression},
                "behavior": "Isolated",
                "invert": False,
            }:
                yield expression
            case _:
                yield json.dumps(step, ensure_ascii=False)


def _merges_make_all(tokenizer: Any) -> bool:
    """Whether merges alone make every word of the vocabulary, so that nothing changes by them."""
    from tokenizers import Tokenizer

    rules = parsed(tokenizer)
    rules["model"]["ignore_merges"] = False
    merged = Tokenizer.from_str(json.dumps(rules)).model
    added = {token["content"] for token in rules["added_tokens"]}
    return all(len(merged.tokenize(word)) == 1 for word in rules["model"]["vocab"].keys() - added)


def first_tokens(tokenizer: Any) -> list[int]:
    """Return the tokens that a tokenizer puts before every text."""
    encoding = tokenizer.backend_tokenizer.encode("a")
    own = encoding.special_tokens_mask.index(0)
    return list(encoding.ids[:own])


def end_token(tokenizer: Any, config: Mapping[str, Any]) -> int | None:
    """Return the token that ends a text: the tokenizer's, or else the one that the model names."""
    ends = tokenizer.eos_token_id
    if ends is None:
        ends = config["eos_token_id"]
    number: int | None = ends[0] if isinstance(ends, list) else ends
    return number


def add_tokenizer(
    writer: Any, tokenizer: PreTrainedTokenizerFast, config: Mapping[str, Any]
) -> None:
    """Write a tokenizer that was found readable.

    Args:
        writer: The file's writer, of the format's library.
        tokenizer: From :func:`readable_tokenizer`.
        config: The model's config.
    """
    from gguf import TokenType

    rules = parsed(tokenizer)
    model = rules["model"]
    words = {number: word for word, number in model["vocab"].items()}
    kinds = dict.fromkeys(words, TokenType.NORMAL)
    for added in rules["added_tokens"]:
        words[added["id"]] = added["content"]
        special = added["special"]
        kinds[added["id"]] = TokenType.CONTROL if special else TokenType.USER_DEFINED
    # Tokens beyond the embedding's rows, which some tokenizers add, cannot reach the model.
    size = config["vocab_size"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter(rules))
    writer.add_token_list([words.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types([kinds.get(number, TokenType.UNUSED) for number in range(size)])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    tokens = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "unk", "pad")}
    for kind, number in (tokens | {"eos": end_token(tokenizer, config)}).items():
        if number is not None and number < size:
            getattr(writer, f"add_{kind}_token_id")(number)
    turn = turn_end(tokenizer).token if tokenizer.chat_template else None
    if turn is not None and turn != end_token(tokenizer, config):
        writer.add_eot_token_id(turn)
    writer.add_add_bos_token(bool(first_tokens(tokenizer)))
    chat: Any = tokenizer.chat_template
    if isinstance(chat, dict):
        chat = [{"name": name, "template": template} for name, template in chat.items()]
    if chat:
        writer.add_chat_template(chat)
