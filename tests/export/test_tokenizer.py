"""Tokenizers in .gguf files: named as llama.cpp splits text, or refused."""

import json

import pytest
from gguf import GGUFReader, GGUFWriter
from tiny_gguf import MERGES, VOCABULARY
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split
from transformers import PreTrainedTokenizerFast

from san_llm.errors import InputError
from san_llm.export.tokenizer import LLAMA_3, add_tokenizer, readable_tokenizer

WHOLE, BYTES = ByteLevel(add_prefix_space=False), ByteLevel(add_prefix_space=False, use_regex=False)
CONFIG = {"vocab_size": len(VOCABULARY), "eos_token_id": None}
# What llama.cpp splits by for a name (llama-vocab.cpp, llm_tokenizer_bpe), each within the pieces
# of the one before; what is between two matches is a piece, too.
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA_CPP = {
    "gpt-2": [GPT_2],
    "smollm": [r"\p{N}", GPT_2],
    "llama-bpe": [
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|"
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
}
TEXTS = [
    "In 2023, 1234567 people's homes\n\n\nwere RE'BUILT.",
    "def f(x):\n\treturn x**2  # 100%   ",
    "Grüße, 世界! ½ Ⅷ ٣ IT'S  it's\r\n\r\n the other",
]


def save(folder, splitter=WHOLE, model=None, names=(), added=(), **parts):
    """Save a byte-level tokenizer, changed as asked, and return its folder."""
    merges = [tuple(merge.split()) for merge in MERGES]
    words = {word: number for number, word in enumerate(VOCABULARY)}
    backend = Tokenizer(model or models.BPE(words, merges))
    backend.pre_tokenizer, backend.decoder = splitter, decoders.ByteLevel()
    for part, value in parts.items():
        setattr(backend, part, value)
    named = {"bos_token": "<|start|>", "eos_token": "<|end|>"} | dict(names)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    tokenizer.add_tokens(list(added))
    tokenizer.save_pretrained(folder)
    return folder


def written(folder, config=CONFIG):
    """Return what a file says of the tokenizer in a folder."""
    writer = GGUFWriter(folder / "words.gguf", "llama")
    add_tokenizer(writer, readable_tokenizer(folder, config), config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fields = GGUFReader(folder / "words.gguf").fields
    begin = "tokenizer."
    return {
        name.removeprefix(begin).removeprefix("ggml."): field.contents()
        for name, field in fields.items()
        if name.startswith(begin)
    }


def bpe(**how):
    words = {word: number for number, word in enumerate(VOCABULARY)}
    return models.BPE(words, [tuple(merge.split()) for merge in MERGES], **how)


SPLITTERS = {
    "gpt-2": WHOLE,
    "smollm": Sequence([Digits(individual_digits=True), WHOLE]),
    "llama-bpe": Sequence([Split(Regex(LLAMA_3), "isolated"), BYTES]),
}


@pytest.mark.parametrize("name", SPLITTERS)
def test_a_splitter_gets_the_name_by_which_llama_cpp_splits_alike(here, name):
    save(here, SPLITTERS[name])
    assert written(here)["pre"] == name
    named = Sequence([*(Split(Regex(rule), "isolated") for rule in LLAMA_CPP[name]), BYTES])
    for text in TEXTS:
        assert named.pre_tokenize_str(text) == SPLITTERS[name].pre_tokenize_str(text)


def split(*rules):
    return Sequence([*(Split(Regex(rule), "isolated") for rule in rules), BYTES])


REFUSED = {
    "another expression": ({"splitter": split(r"\s?\p{L}+")}, r'text is split by \["\\\\s\?'),
    "one in another order": ({"splitter": Sequence([WHOLE, Digits(True)])}, "text is split by"),
    "digits in groups": ({"splitter": Sequence([Digits(False), WHOLE])}, "gpt-2, smollm, llama-"),
    "what is between": (
        {"splitter": Sequence([Split(Regex(LLAMA_3), "removed", invert=True), BYTES])},
        "text is split by",
    ),
    "none": ({"splitter": BYTES}, "text is split by"),
    "a space before": ({"splitter": ByteLevel(add_prefix_space=True)}, "found BPE"),
    "NFC": ({"normalizer": normalizers.NFC()}, "no place for its normalizer NFC"),
    "two normalizers": (
        {"normalizer": normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()])},
        "no place for its normalizer NFD, Lowercase",
    ),
    "SentencePiece": (
        {"model": bpe(byte_fallback=True), "splitter": pre_tokenizers.Metaspace()},
        "found BPE of SentencePiece's kind",
    ),
    "WordPiece": ({"model": models.WordPiece({"a": 0}, unk_token="a")}, "found WordPiece"),
    "Unigram": ({"model": models.Unigram([("a", 0.0)], 0)}, "found Unigram"),
    "dropout": ({"model": bpe(dropout=0.1)}, "no place for its model's dropout 0.1"),
    "suffix": ({"model": bpe(end_of_word_suffix="Ġ")}, "its model's end_of_word_suffix"),
    "no end": ({"names": {"eos_token": None}}, "names no end token"),
    "another start": (
        {"post_processor": processors.BertProcessing(("<|end|>", 0), ("<|end|>", 0))},
        r"begins a text with <\|end\|>, llama.cpp only with the one start token <\|start\|>",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_has_no_rules_for_is_refused_with_the_file_and_the_way_out(here, name):
    changes, says = REFUSED[name]
    with pytest.raises(InputError, match=says) as refused:
        readable_tokenizer(save(here, **changes), CONFIG)
    assert str(here / "tokenizer.json") in str(refused.value)
    assert "convert_hf_to_gguf.py" in str(refused.value)


def test_words_that_merges_do_not_make_are_told_from_those_they_do(here):
    rules = json.loads((save(here) / "tokenizer.json").read_text())
    for whole, splitter in ((True, "gpt-2"), (False, "llama-bpe")):
        rules["pre_tokenizer"] = json.loads(SPLITTERS[splitter].__getstate__())
        rules["model"]["ignore_merges"] = whole
        rules["model"]["merges"] = [merge.split() for merge in MERGES]
        (here / "tokenizer.json").write_text(json.dumps(rules))
        assert written(here)["pre"] == splitter
        rules["model"]["merges"] = rules["model"]["merges"][:-1]  # nothing makes "Ġthe" any more
        (here / "tokenizer.json").write_text(json.dumps(rules))
        with pytest.raises(InputError, match=f"ignore_merges is {whole}, which .* {splitter}"):
            readable_tokenizer(here, CONFIG)


@pytest.mark.parametrize("key", ["lstrip", "rstrip", "single_word"])
def test_a_token_that_takes_more_than_its_own_letters_is_refused(here, key):
    rules = json.loads((save(here) / "tokenizer.json").read_text())
    rules["added_tokens"][0][key] = True
    (here / "tokenizer.json").write_text(json.dumps(rules))
    with pytest.raises(InputError, match=f"no place for {key} of its token"):
        readable_tokenizer(here, CONFIG)


def ids(folder, config=CONFIG):
    said = written(folder, config)
    return {name: value for name, value in said.items() if name.endswith("token_id")}


def test_a_token_that_a_tokenizer_does_not_name_is_not_in_the_file(here):
    assert ids(save(here)) == {"bos_token_id": 1, "eos_token_id": 0}
    settings = json.loads((here / "tokenizer_config.json").read_text())
    (here / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": None}))
    assert ids(here) == {"bos_token_id": 1, "eos_token_id": 0}
    # Older folders name them in a file of their own.
    plain = {key: value for key, value in settings.items() if not key.endswith("_token")}
    (here / "tokenizer_config.json").write_text(json.dumps(plain))
    special = {"eos_token": "<|end|>", "pad_token": {"content": "<|end|>"}}
    (here / "special_tokens_map.json").write_text(json.dumps(special))
    assert ids(here) == {"eos_token_id": 0, "padding_token_id": 0}


@pytest.mark.parametrize("ends", [1, [1, 0]])
def test_a_text_that_the_tokenizer_does_not_end_is_ended_as_the_model_says(here, ends):
    save(here, names={"eos_token": None})
    assert ids(here, CONFIG | {"eos_token_id": ends})["eos_token_id"] == 1


@pytest.mark.parametrize("begins", [True, False])
def test_a_start_token_is_put_before_texts_where_the_tokenizer_does(here, begins):
    template = processors.TemplateProcessing(
        single="<|start|> $A" if begins else "$A", special_tokens=[("<|start|>", 1)]
    )
    save(here, post_processor=processors.Sequence([processors.ByteLevel(), template]))
    assert written(here)["add_bos_token"] is begins


def test_words_and_their_kinds_are_those_of_the_embedding(here):
    save(here, added=["new word"])
    said = written(here, CONFIG | {"vocab_size": len(VOCABULARY) + 2})
    assert said["tokens"] == [*VOCABULARY, "new word", f"[PAD{len(VOCABULARY) + 1}]"]
    kinds = said["token_type"]
    assert kinds == [3, 3, *[1] * (len(VOCABULARY) - 2), 4, 5]
    assert said["merges"] == MERGES
    assert written(here)["tokens"] == VOCABULARY


def test_every_chat_template_is_written_by_its_name(here):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(save(here))
    assert "chat_template" not in written(here)
    tokenizer.chat_template = "one"
    tokenizer.save_pretrained(here)
    assert written(here)["chat_template"] == "one"
    tokenizer.chat_template = {"default": "one", "tools": "two"}
    tokenizer.save_pretrained(here)
    said = written(here)
    assert (said["chat_template"], said["chat_template.tools"]) == ("one", "two")
