"""Modules that transformers has renamed: what other pages still write in ``target_modules``.

Its tables for the weights of older files are read the other way round.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from san_llm.san.node import matches


def renamed(targets: Any, names: Iterable[str], model_class: str, model_type: str) -> str:
    """Return ``": transformers 5.23.0 calls it q_proj"`` for older names, or nothing.

    Args:
        targets: Those that match no module: names, or one regular expression.
        names: The model's modules.
        model_class: The name of the model's class.
        model_type: The model's type.
    """
    from transformers import __version__

    older = _older(names, model_class, model_type)
    now = {}
    for target in [targets] if isinstance(targets, str) else targets:
        wanted = target if isinstance(targets, str) else [target]
        found = [name.rsplit(".", 1)[-1] for name, old in older.items() if matches(wanted, old)]
        if found:
            now[target] = ", ".join(dict.fromkeys(found))
    if len(now) == 1:
        return f": transformers {__version__} calls it {next(iter(now.values()))}"
    told = "; ".join(f"{target!r} is {found}" for target, found in now.items())
    return f": in transformers {__version__} {told}" if told else ""


def _older(names: Iterable[str], model_class: str, model_type: str) -> dict[str, str]:
    """Return what files of older versions call some modules, by their names."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    bare = MODEL_MAPPING_NAMES.get(model_type)  # a head's class holds one of these
    of = dict.fromkeys(
        [model_class, *([bare] if isinstance(bare, str) else bare or ()), model_type]
    )
    tables = [get_checkpoint_conversion_mapping(name) or () for name in of]
    backwards = [step.reverse_transform() for table in tables for step in reversed(table)]
    older = {}
    for name in names:
        old = f"{name}.weight"
        for step in backwards:
            old, _ = step.rename_source_key(old)
        old = old.removesuffix(".weight")
        if old.rsplit(".", 1)[-1] != name.rsplit(".", 1)[-1]:
            older[name] = old
    return older
