"""A merged model as one ``.gguf`` file for llama.cpp, through the format's own library.

Only the Llama family with a byte-level BPE tokenizer. Tensors go one at a time from the model's
weights into the file; q and k have the halves of each head's channels interleaved, as llama.cpp
rotates them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from san_llm.architectures.decoders import K, Q
from san_llm.errors import InputError, SanError
from san_llm.files import read_json
from san_llm.models.weights import Numbers, Stored, read_rows, read_weights
from san_llm.progress import bar

KINDS = ("f16", "bf16", "q8_0")
FILE = "model.gguf"
LARGEST_F16 = 65504.0
_INTERLEAVED = re.compile(rf"\.self_attn\.({Q}|{K})\.(weight|bias)$")


def check_exportable(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a model that cannot be written, before anything is merged.

    Args:
        folder: The model folder, or that of the base whose tokenizer a merged one takes.
        config: The model's ``config.json``.

    Raises:
        InputError: naming what stands in the way.
    """
    family = config.get("model_type")
    if family != "llama":
        raise InputError(f"--gguf: only the llama family is written, this is {family}")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise InputError("--gguf: a model with biases is not written: readers pass over them")
    kind = _rope(config)[0]
    if kind not in ("default", "llama3"):
        raise InputError(f"--gguf: rotary scaling of the type {kind!r} is not written")
    _tokenizer(folder)


def _rope(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the kind of rotary scaling and its numbers."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return rope.get("rope_type") or rope.get("type") or "default", rope


def rope_factors(config: Mapping[str, Any]) -> Numbers | None:
    """Return what each rotary frequency is divided by, (head_dim / 2,), or None for 1.

    As llama.cpp's own converter works it out for Llama 3.1 (LlamaModel.generate_extra_tensors of
    convert_hf_to_gguf.py): long waves are slowed down by a factor, short ones are kept, and those
    between go from one to the other.
    """
    kind, rope = _rope(config)
    if kind == "default":
        return None
    known = rope.get("original_max_position_embeddings")
    known = known or config.get("original_max_position_embeddings") or 8192
    factor, low, high = (
        float(rope.get(key, usual))
        for key, usual in (("factor", 8), ("low_freq_factor", 1), ("high_freq_factor", 4))
    )
    channels = np.arange(0, _head_dim(config), 2) / _head_dim(config)
    wavelength = 2 * np.pi * _rope_base(config) ** channels
    smooth = np.clip((known / wavelength - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _rope_base(config: Mapping[str, Any]) -> float:
    return float(_rope(config)[1].get("rope_theta") or config.get("rope_theta") or 10_000.0)


def _tokenizer(folder: Path) -> dict[str, Any]:
    """Return ``tokenizer.json``, a byte-level BPE."""
    path = folder / "tokenizer.json"
    tokenizer = read_json(path)
    try:
        kind = tokenizer["model"]["type"]
    except (KeyError, TypeError):
        raise InputError(f"--gguf: {path}: not a tokenizer") from None
    byte_level = "ByteLevel" in json.dumps(tokenizer.get("pre_tokenizer"))
    if kind != "BPE" or not byte_level:
        raise InputError(f"--gguf: only byte-level BPE tokenizers are written, not this {kind}")
    return tokenizer


def export_gguf(folder: Path, kind: str) -> Path:
    """Write a model of the Llama family as ``model.gguf`` beside its weights; return that file.

    Args:
        folder: A model folder in full precision, with its tokenizer.
        kind: ``f16``, ``bf16`` or ``q8_0``: how matrices are stored; vectors stay fp32.

    Raises:
        InputError: see :func:`check_exportable`.
        SanError: when a number does not fit f16, or the file read again is not what was written.
    """
    from gguf import (
        MODEL_ARCH,
        GGMLQuantizationType,
        GGUFWriter,
        LlamaFileType,
        get_tensor_name_map,
    )
    from gguf.quants import quantize

    config = read_json(folder / "config.json")
    check_exportable(folder, config)
    matrices = GGMLQuantizationType[kind.upper()]
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    writer = GGUFWriter(folder / FILE, "llama", use_temp_file=True)
    writer.add_file_type(LlamaFileType[f"MOSTLY_{kind.upper()}"])
    if kind == "q8_0":
        writer.add_quantization_version(2)  # of ggml's block formats
    _add_shape(writer, config)
    _add_tokenizer(writer, folder, config)
    factors = rope_factors(config)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    tensors, written = read_weights(folder), {}
    with bar("Writing GGUF", len(tensors), "tensors") as progress:
        for tensor in tensors:
            name = names.get_name(tensor.name, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise InputError(f"--gguf: {tensor.name} has no name in the format")
            written[name] = tensor
            numbers = _as_llama_cpp(tensor, config)
            # A row of q8_0 is whole blocks of 32; llama.cpp's own converter falls back likewise.
            used = matrices if len(tensor.shape) > 1 else GGMLQuantizationType.F32
            if used == GGMLQuantizationType.Q8_0 and tensor.shape[-1] % 32:
                used = GGMLQuantizationType.F16
            if used == GGMLQuantizationType.F16 and not np.abs(numbers).max() <= LARGEST_F16:
                raise SanError(f"--gguf: {tensor.name} has numbers that f16 cannot hold")
            writer.add_tensor(name, quantize(numbers, used), raw_dtype=used)
            progress.advance()
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    _compare(folder / FILE, written, config)
    return folder / FILE


def _compare(file: Path, tensors: Mapping[str, Stored], config: Mapping[str, Any]) -> None:
    """Read a file again, and hold every number of it to the weights'.

    Raises:
        SanError: naming the tensor with more than its format's rounding between the two.
    """
    from gguf import GGMLQuantizationType, GGUFReader
    from gguf.quants import dequantize

    steps = {  # what rounding to nearest may do, relative and, to the smallest numbers, absolute
        GGMLQuantizationType.F32: (0.0, 0.0),
        GGMLQuantizationType.F16: (2**-11, 2**-25),
        GGMLQuantizationType.BF16: (2**-8, 2**-134),
    }
    stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    with bar("Checking GGUF", len(tensors), "tensors") as progress:
        for name, tensor in tensors.items():
            wanted, written = _as_llama_cpp(tensor, config), stored.get(name)
            if written is None or written.data.size == 0:
                raise SanError(f"{file}: {name} is not in it")
            numbers = dequantize(written.data, written.tensor_type).reshape(wanted.shape)
            if written.tensor_type in steps:
                relative, absolute = steps[written.tensor_type]
                allowed = relative * np.abs(wanted) + absolute
            else:  # q8_0: of a block of 32 the largest number has 127 steps; they are f16
                largest = np.abs(wanted).reshape(-1, 32).max(-1, keepdims=True)
                allowed = np.repeat(largest * (0.51 / 127 + 2**-10), 32).reshape(wanted.shape)
            if not (np.abs(numbers - wanted) <= allowed).all():
                raise SanError(f"{file}: {name} is not what was merged: damaged on its way")
            progress.advance()


def _as_llama_cpp(tensor: Stored, config: Mapping[str, Any]) -> Numbers:
    numbers = read_rows(tensor)
    match = _INTERLEAVED.search(tensor.name)
    if match is None:
        return numbers
    heads = config["num_attention_heads"]
    if match[1] == K:
        heads = config.get("num_key_value_heads") or heads
    halves = numbers.reshape(heads, 2, -1, *numbers.shape[1:])  # (heads, half, channel, ...)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(numbers.shape)


def _add_shape(writer: Any, config: Mapping[str, Any]) -> None:
    heads = config["num_attention_heads"]
    head_dim = _head_dim(config)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(_rope_base(config))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_vocab_size(config["vocab_size"])


def _add_tokenizer(writer: Any, folder: Path, config: Mapping[str, Any]) -> None:
    from gguf import TokenType

    tokenizer = _tokenizer(folder)
    model = tokenizer["model"]
    words = {number: word for word, number in model["vocab"].items()}
    kinds = dict.fromkeys(words, TokenType.NORMAL)
    for added in tokenizer.get("added_tokens") or []:
        words[added["id"]] = added["content"]
        special = added.get("special")
        kinds[added["id"]] = TokenType.CONTROL if special else TokenType.USER_DEFINED
    # Tokens beyond the embedding's rows, which some tokenizers add, cannot reach the model.
    size = config["vocab_size"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_splitter(tokenizer))
    writer.add_token_list([words.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types([kinds.get(number, TokenType.UNUSED) for number in range(size)])
    merges = model["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    _add_special(writer, folder, config, tokenizer, {word: n for n, word in words.items()})


def _add_special(
    writer: Any,
    folder: Path,
    config: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    numbers: Mapping[str, int],
) -> None:
    """Write which tokens begin and end a text, whether one is put before it, and how to chat."""
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    for kind in ("bos", "eos", "unk", "pad"):
        token = settings.get(f"{kind}_token")
        word = token.get("content") if isinstance(token, dict) else token
        stored: Any = config.get(f"{kind}_token_id")
        number = numbers.get(str(word), stored)
        if isinstance(number, list):  # several ends of a text: the first is its name
            number = number[0]
        if number is not None and number < config["vocab_size"]:
            getattr(writer, f"add_{kind}_token_id")(number)
    writer.add_add_bos_token(_begins_with_token(tokenizer.get("post_processor")))
    template = folder / "chat_template.jinja"
    chat = (
        template.read_text(encoding="utf-8")
        if template.is_file()
        else settings.get("chat_template")
    )
    if isinstance(chat, str):
        writer.add_chat_template(chat)


def _begins_with_token(processor: Any) -> bool:
    """Whether a tokenizer puts a token of its own before a text."""
    if not isinstance(processor, dict):
        return False
    single = processor.get("single") or [{}]
    processors = processor.get("processors") or []
    return "SpecialToken" in single[0] or any(_begins_with_token(inner) for inner in processors)


def _splitter(tokenizer: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of how text is split before the merges."""
    text = json.dumps(tokenizer.get("pre_tokenizer"))
    if r"\\p{N}{1,3}" in text:
        return "llama-bpe"  # Llama 3
    return "smollm" if '"Digits"' in text else "gpt-2"
