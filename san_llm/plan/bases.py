"""Which base a plan is about: its config, from its folder or, of well-known ones, from here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from san_llm.architectures.lookup import is_known
from san_llm.architectures.sizes import check_sizes
from san_llm.errors import InputError
from san_llm.files import read_json
from san_llm.models.agree import check_base
from san_llm.models.download import PINNED, model_folder
from san_llm.models.locate import filled, locate, open_base
from san_llm.models.weights import has_weights
from san_llm.recipe.schema import Base

_7B = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "tie_word_embeddings": False,
}
_13B = _7B | {"hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 40}
_13B |= {"num_attention_heads": 40, "num_key_value_heads": 40}
_8B = _7B | {"vocab_size": 128_256, "intermediate_size": 14_336, "num_key_value_heads": 8}
_70B = _8B | {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80}
_70B |= {"num_attention_heads": 64}
_405B = _70B | {"hidden_size": 16_384, "intermediate_size": 53_248, "num_hidden_layers": 126}
_405B |= {"num_attention_heads": 128}
_135M = _7B | {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536}
_135M |= {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
_135M |= {"tie_word_embeddings": True}
# What the config.json of these bases says, for a plan before 15 GB are fetched.
KNOWN: dict[str, dict[str, Any]] = {
    "smollm2-135m": _135M,
    "huggyllama/llama-7b": _7B,
    "meta-llama/Llama-2-7b-hf": _7B,
    "huggyllama/llama-13b": _13B,
    "meta-llama/Meta-Llama-3-8B": _8B,
    "meta-llama/Llama-3.1-70B": _70B,
    "meta-llama/Llama-3.1-405B": _405B,
}


def config_of(base: Base) -> tuple[dict[str, Any], str]:
    """Return a base's ``config.json``, and where it is from; weights are not fetched.

    Raises:
        InputError: when it cannot be had, names sizes that are none, or a model that transformers
            does not have.
    """
    config, source = any_config_of(base)
    if is_known(config.get("model_type")):
        check_sizes(config)
    folder = Path(source).parent
    # The hub's cache may hold a part of a model yet.
    if Path(locate(base.model)).is_dir() and has_weights(folder):
        check_base(open_base(base, folder))
    return config, source


def any_config_of(base: Base) -> tuple[dict[str, Any], str]:
    """Return the ``config.json`` of a model of whatever family, completed, and where it is from.

    Raises:
        InputError: when it cannot be had.
    """
    config, source = _config_of(base)
    return filled(config), source


def _config_of(base: Base) -> tuple[dict[str, Any], str]:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    name = base.model
    folder = model_folder(name)
    if name in KNOWN and not Path(name).exists():
        here = folder is not None and (folder / "config.json").is_file()
        if not here and (name in PINNED or not try_to_load_from_cache(name, "config.json")):
            return KNOWN[name], "its sizes are known; it is not here yet"
    located = locate(name)
    path: Any = Path(located) / "config.json"
    if not path.is_file():
        path = try_to_load_from_cache(located, "config.json", revision=base.revision)
        if not isinstance(path, str):
            try:
                path = hf_hub_download(located, "config.json", revision=base.revision)
            except Exception:  # of several HTTP libraries, by the hub client's version
                raise InputError(
                    f"{name}: no such folder, and its config.json is not in the hub's cache; the "
                    "hub cannot be reached, or has no such model that is open to you"
                ) from None
    return read_json(Path(path)), str(path)
