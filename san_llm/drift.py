"""How far neuron scales have moved while they are trained: how many up, how many down.

``diff`` says the same of a finished adapter, channel by channel. This is one number for all of
them, cheap enough for every step: their vectors are joined, and nothing is read but three means.
"""

from __future__ import annotations

from typing import Any

import torch

from san_llm.diff import STILL


class Drift:
    """The neuron scales of a model in training, where the adapter holds them as they are."""

    def __init__(self, model: Any) -> None:
        """Find them; the low-rank carriers and other methods have none."""
        self._gammas = [p for name, p in model.named_parameters() if ".san_gamma." in name]

    def measure(self) -> dict[str, float]:
        """Return the shares above 1 (LTP) and below 1 (LTD), and the mean of ``|gamma - 1|``.

        Nothing where there are no scales, or where an engine holds them in parts.
        """
        if not self._gammas or any(not gamma.numel() for gamma in self._gammas):
            return {}
        with torch.no_grad():
            moved = torch.cat([gamma.float() for gamma in self._gammas]) - 1
            means = torch.stack(
                [
                    (moved > STILL).float().mean(),
                    (moved < -STILL).float().mean(),
                    moved.abs().mean(),
                ]
            ).tolist()
        names = ("gamma_potentiated", "gamma_depressed", "gamma_change")
        return dict(zip(names, means, strict=True))
