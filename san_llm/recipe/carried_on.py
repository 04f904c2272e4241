"""The method of an adapter that a recipe goes on from: read off its files, as a recipe says it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from san_llm.architectures.entry import KINDS
from san_llm.errors import InputError, nearest_file
from san_llm.files import read_json
from san_llm.recipe.schema import Method, Recipe, as_tuples
from san_llm.san.options import PEFT_NOTES, saved_options

CONFIG = "adapter_config.json"


def adapter_folder(place: str | None) -> Path | None:
    """Return the folder of ``base.adapter``: an adapter's, or of a run its adapter's.

    None where there is none said.

    Raises:
        InputError: when there is none.
    """
    if place is None:
        return None
    folder = Path(place)
    if (folder / "recipe.yaml").is_file():
        folder /= "adapter"
    if not (folder / CONFIG).is_file():
        if (folder / "config.json").is_file():
            raise InputError(
                f"base.adapter: {folder}: a model, not an adapter: to train it on, name it as "
                "base.model"
            )
        near = "" if folder.exists() else nearest_file(folder)
        raise InputError(f"base.adapter: {folder}: not an adapter: no {CONFIG} in it{near}")
    return folder


def method_of(folder: Path) -> dict[str, Any]:
    """Return the ``method`` of a recipe that makes adapters such as this one.

    Raises:
        InputError: when its options are none that are known.
    """
    options = read_json(folder / CONFIG)
    kind, targets = options.get("peft_type"), options.get("target_modules")
    named = {"target_modules": sorted(targets)} if isinstance(targets, list) else {}
    if kind == "SAN":
        return _san(options, named)
    if kind == "LORA" and named:
        said = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
        name = "dora" if options.get("use_dora") else "lora"
        return {"name": name, **named, **{ours: options[peft] for ours, peft in said.items()}}
    if kind == "IA3" and named:
        forward = sorted(options.get("feedforward_modules") or [])
        return {"name": "ia3", **named, "feedforward_modules": forward}
    noted = PEFT_NOTES - {"peft_type"}
    told = {key: value for key, value in options.items() if key not in noted and value is not None}
    return {"name": "peft", "config": told}


def _san(options: Mapping[str, Any], named: dict[str, Any]) -> dict[str, Any]:
    own = saved_options(options)
    low_rank = {"rank": own.rank, "alpha": own.alpha, "dropout": own.dropout}
    links = [kind for kind in KINDS if kind in own.links] if own.links != "free" else "free"
    return {
        "name": "san",
        **named,
        **{key: getattr(own, key) for key in ("carrier", "mode", "shift", "form", "wiring")},
        **{key: getattr(own, key) for key in ("adapt_embedding", "train_norms")},
        "links": links,
        **({} if own.carrier == "scale" else low_rank),
    }


def refuse_other_method(recipe: Recipe, folder: Path, model_type: str) -> None:
    """Refuse a recipe that says another method than the adapter's that it goes on from.

    Args:
        recipe: With its method.
        folder: The adapter's.
        model_type: Of the base, whose names a word such as ``all`` stands for.

    Raises:
        InputError: naming the first key that differs.
    """
    before = TypeAdapter[Any](Method).validate_python(as_tuples(method_of(folder)))
    own = before.model_dump() | {"target_modules": before.targets(model_type)}
    now = recipe.method.model_dump() | {"target_modules": recipe.method.targets(model_type)}
    for key, said in now.items():
        if key not in own or _sorted(said) != _sorted(own[key]):
            raise InputError(
                f"method.{key}: {said!r}, but {folder} was made with {own.get(key)!r}: take the "
                "section out, for training goes on with the adapter's own"
            )


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, tuple | list) else value
