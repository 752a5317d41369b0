"""A weighted sum of losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import InputError
from .base import Loss


class WeightedSum(Loss):
    """``sum_i weight_i * loss_i``; the parts' last values stay readable as :attr:`parts`.

    Raises:
        InputError: When there is nothing to add.
    """

    def __init__(self, terms: Sequence[tuple[float, Loss]]) -> None:
        super().__init__()
        if not terms:
            raise InputError("A weighted sum of losses needs at least one term.")
        self.weights = [float(weight) for weight, _ in terms]
        self.losses = nn.ModuleList(loss for _, loss in terms)
        self.spec = " + ".join(f"{weight:g}*{loss.spec}" for weight, loss in terms)
        self.parts: dict[str, Tensor] = {}

    def values(self, images: Tensor, prompts: Sequence[str] | None) -> Tensor:
        results = [loss(images, prompts) for loss in self.losses]
        self.parts = {str(loss.spec): r.detach() for loss, r in zip(self.losses, results, strict=True)}
        total = torch.zeros_like(results[0])
        for weight, result in zip(self.weights, results, strict=True):
            total = total + weight * result
        return total
