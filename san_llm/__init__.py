"""san-llm: instruction-tune LLaMA-family models with SAN (Synapse and Neuron).

Public names are resolved on first use, so that importing the package costs no torch::

    from san_llm import SanConfig, propagation_graph

``import san_llm`` is enough for ``PeftModel.from_pretrained`` to load an adapter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from san_llm.san.register import register_with_peft

__version__ = "0.1.0"

if TYPE_CHECKING:
    from san_llm.san.config import SanConfig as SanConfig
    from san_llm.san.graph import propagation_graph as propagation_graph
    from san_llm.san.model import SanModel as SanModel

_HOMES = {
    # SanConfig lives in san.config; coming in through san.model also registers SAN with PEFT.
    "SanConfig": "san_llm.san.model",
    "SanModel": "san_llm.san.model",
    "propagation_graph": "san_llm.san.graph",
}
__all__ = ["SanConfig", "SanModel", "__version__", "propagation_graph"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'san_llm' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


register_with_peft()
