"""Make SAN known to PEFT whichever of the two is imported first, without importing torch.

PEFT finds the class of a saved adapter by the name of its type, among those that are registered.
Importing PEFT takes seconds and torch, which ``san-llm --help`` does without. So SAN is registered
right behind PEFT's own import, by a finder (https://docs.python.org/3/reference/import.html).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

IMPORTING_PEFT = {f"san_llm.san.{name}" for name in ("config", "layer", "model")}


def register_with_peft() -> None:
    """Register SAN now if PEFT is imported, else as soon as it is."""
    if "peft" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _BehindPeft())


def _register() -> None:
    # Where one of ours is what imports PEFT, it is not ready yet, and registers SAN by itself.
    if not IMPORTING_PEFT & sys.modules.keys():
        import_module("san_llm.san.model")


class _BehindPeft(MetaPathFinder):
    """Finds nothing itself; lets what loads PEFT register SAN afterwards."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return PEFT's spec; many ask whether PEFT is there long before they import it."""
        if fullname != "peft" or self not in sys.meta_path:
            return None
        place = sys.meta_path.index(self)
        sys.meta_path.remove(self)
        try:
            spec = find_spec(fullname)
        finally:
            sys.meta_path.insert(place, self)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            load(module)
            _register()

        vars(spec.loader)["exec_module"] = load_and_register
        return spec
