"""A ``.gguf`` file to a plain model folder: dequantized once, saved as safetensors."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import torch

from san_llm.architectures.lookup import check_family
from san_llm.errors import InputError, first_line
from san_llm.files import refuse_link, whole_folder


def convert_gguf(path: Path, folder: Path, overwrite: bool = False) -> Path:
    """Write the model and tokenizer in a GGUF file as a folder that transformers loads.

    Args:
        path: The ``.gguf`` file of a Llama, Mistral or Qwen2 model.
        folder: The model folder to make; bf16, complete or absent.
        overwrite: Replace what is there.

    Returns:
        ``folder``.

    Raises:
        InputError: when the file is no GGUF file, broken, or of an unsupported family.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    try:
        with path.open("rb") as file:
            head = file.read(24)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if head[:4] != b"GGUF":
        raise InputError(f"{path}: not a GGUF file: it does not begin with 'GGUF'")
    # Behind the version stand the numbers of tensors and of keys, which readers count up to.
    if len(head) < 24 or max(struct.unpack("<QQ", head[8:])) > 2**20:
        raise InputError(f"{path}: cannot be read as a model: its header is cut short or damaged")
    _check_rope(path)
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        read_config = AutoConfig.from_pretrained(**where)
        check_family(read_config.model_type)
        loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**where)
        _set_ends(path, tokenizer)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # a broken file breaks its readers in many ways
        first = first_line(error)
        raise InputError(f"{path}: cannot be read as a model: {first}") from error
    # The loaded config says that it is quantized, so the model refuses to be saved: build the same
    # architecture from a config without that, and hand the numbers over.
    settings = {
        key: value
        for key, value in loaded.config.to_dict().items()
        if key not in ("quantization_config", "_name_or_path", "dtype", "torch_dtype")
    }
    config = type(loaded.config)(**settings)
    with torch.device("meta"):
        clean = AutoModelForCausalLM.from_config(config)
    clean.load_state_dict(loaded.state_dict(), assign=True)
    clean.tie_weights()
    clean = clean.to(torch.bfloat16)
    clean.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with whole_folder(folder, overwrite) as temporary:
        clean.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for licence in path.parent.glob("LICENSE*"):
            refuse_link(licence)
            shutil.copy(licence, temporary)
    return folder


def _set_ends(path: Path, tokenizer: Any) -> None:
    """Give a tokenizer the start and the end that its file names.

    transformers before 5.18 may take the start of a text for its end, too.
    """
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    for end in ("bos", "eos"):
        field = fields.get(f"tokenizer.ggml.{end}_token_id")
        if field is not None:
            token = tokenizer.convert_ids_to_tokens(int(field.contents()))
            if getattr(tokenizer, f"{end}_token") != token:
                setattr(tokenizer, f"{end}_token", token)


def _check_rope(path: Path) -> None:
    """Refuse scaled rotary frequencies, which transformers passes over without a word."""
    from gguf import GGUFReader

    try:
        names = {tensor.name for tensor in GGUFReader(path).tensors}
    except Exception as error:  # a broken file breaks its readers in many ways
        first = first_line(error)
        raise InputError(f"{path}: cannot be read as a model: {first}") from error
    if "rope_freqs.weight" in names:
        raise InputError(
            f"{path}: its rotary frequencies are scaled, which transformers does not read from "
            "GGUF: use the model's safetensors"
        )
