"""A merged model as one ``.gguf`` file for llama.cpp, through the format's own library.

Only the Llama family with a tokenizer that llama.cpp knows (``gguf_tokenizer``). Tensors go one at
a time from the model's weights into the file; q and k have the halves of each head's channels
interleaved, as llama.cpp rotates them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from san_llm.architectures.decoders import K, Q
from san_llm.errors import InputError, SanError
from san_llm.export.modelfile import write_modelfile
from san_llm.export.tokenizer import add_tokenizer, readable_tokenizer
from san_llm.files import read_json
from san_llm.models.weights import Numbers, Stored, read_rows, read_weights
from san_llm.progress import bar, say

KINDS = ("f16", "bf16", "q8_0")
FILE = "model.gguf"
LARGEST_F16 = 65504.0
ACTIVATIONS = ("silu", "swish")  # two names of one
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
    config = _of_class(folder, config)
    if config["attention_bias"] or config["mlp_bias"]:
        raise InputError("--gguf: a model with biases is not written: readers pass over them")
    activation = config["hidden_act"]
    if activation not in ACTIVATIONS:
        raise InputError(
            f"--gguf: {folder / 'config.json'}: hidden_act {activation!r} is not written: readers "
            f"compute {ACTIVATIONS[0]}"
        )
    kind = config["rope_parameters"]["rope_type"]
    if kind not in ("default", "llama3"):
        raise InputError(f"--gguf: rotary scaling of the type {kind!r} is not written")
    readable_tokenizer(folder, config)


def _of_class(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a ``config.json`` means to the family's class, whose defaults fill it up.

    Raises:
        InputError: when the class refuses it.
    """
    from transformers import LlamaConfig

    from san_llm.models.reading import load_or_refuse

    whole: Mapping[str, Any] = load_or_refuse(
        "config", str(folder), lambda _: LlamaConfig.from_dict(dict(config)).to_dict()
    )
    return whole


def rope_factors(config: Mapping[str, Any]) -> Numbers | None:
    """Return what each rotary frequency is divided by, (head_dim / 2,), or None for 1.

    As llama.cpp's own converter works it out for Llama 3.1 (LlamaModel.generate_extra_tensors of
    convert_hf_to_gguf.py): long waves are slowed down by a factor, short ones are kept, and those
    between go from one to the other.
    """
    rope = config["rope_parameters"]
    if rope["rope_type"] == "default":
        return None
    known = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    channels = np.arange(0, config["head_dim"], 2) / config["head_dim"]
    wavelength = 2 * np.pi * rope["rope_theta"] ** channels
    smooth = np.clip((known / wavelength - low) / (high - low), 0, 1)
    factors: Numbers = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return factors.astype(np.float32)


def export_gguf(folder: Path, kind: str) -> Path:
    """Write a model of the Llama family as ``model.gguf`` beside its weights; return that file.

    Beside it, a ``Modelfile`` for Ollama.

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

    config = _of_class(folder, read_json(folder / "config.json"))
    check_exportable(folder, config)
    matrices = GGMLQuantizationType[kind.upper()]
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    writer = GGUFWriter(folder / FILE, "llama", use_temp_file=True)
    writer.add_file_type(LlamaFileType[f"MOSTLY_{kind.upper()}"])
    if kind == "q8_0":
        writer.add_quantization_version(2)  # of ggml's block formats
    _add_shape(writer, config)
    tokenizer = readable_tokenizer(folder, config)
    add_tokenizer(writer, tokenizer, config)
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
    why = write_modelfile(folder, FILE, tokenizer)
    if why is not None:
        say(f"Modelfile: without a template: {why}")
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
    heads = config["num_key_value_heads" if match[1] == K else "num_attention_heads"]
    halves = numbers.reshape(heads, 2, -1, *numbers.shape[1:])  # (heads, half, channel, ...)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(numbers.shape)


def _add_shape(writer: Any, config: Mapping[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
