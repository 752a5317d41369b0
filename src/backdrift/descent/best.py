"""The best so far: of each sample where they are independent, else of the whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .measure import Measured


class BestSoFar:
    """Keeps values and pictures whose score is lowest.

    Args:
        enough: what has reached this score is kept as it is; None: the lowest score to the end.

    Attributes:
        values: the optimised tensors at their best.
        images: the pictures they made, (n, 3, H, W).
        flagged: (n,) which of these the pipeline's safety checker flagged.
        losses, scores, iterations: (n,) for independent samples, else (1,).
        stale: iterations since the last improvement.
    """

    def __init__(self, enough: float | None = None) -> None:
        self.enough = enough
        self.values: dict[str, Tensor] = {}
        self.images = self.flagged = self.losses = self.scores = self.iterations = torch.empty(0)
        self.stale = 0

    def offer(
        self, iteration: int, values: dict[str, Tensor], found: Measured, losses: Tensor, scores: Tensor
    ) -> None:
        """Keep what is better. ``losses`` and ``scores``: (n,) for independent samples, else (1,)."""
        images, flagged = found.images, found.flagged
        if not self.values:
            better = torch.ones_like(scores, dtype=torch.bool)
            self.values, self.images, self.flagged = values, images, flagged
            self.losses, self.scores = losses, scores
            self.iterations = torch.zeros_like(scores, dtype=torch.int64)
        else:
            better = scores < self.scores
            if self.enough is not None:
                better &= self.scores > self.enough
        self.stale = 0 if bool(better.any()) else self.stale + 1

        def choose(new: Tensor, old: Tensor) -> Tensor:
            if len(better) == 1:  # the batches of a shared variable may differ in size
                return new.detach().clone() if better.item() else old
            rows = better.view(-1, *[1] * (new.ndim - 1)).to(new.device)
            return torch.where(rows, new.detach(), old.detach())

        self.values = {k: choose(v, self.values[k]) for k, v in values.items()}
        self.images, self.flagged = choose(images, self.images), choose(flagged, self.flagged)
        self.losses, self.scores = choose(losses, self.losses), choose(scores, self.scores)
        self.iterations = torch.where(better, iteration, self.iterations)

    @property
    def loss(self) -> float:
        return self.losses.mean().item()

    @property
    def iteration(self) -> int:
        return int(self.iterations.max())

    def record(self, heldout: bool) -> dict[str, Any]:
        """The record's entry ``best``."""
        entry: dict[str, Any] = {"iteration": self.iteration, "loss": self.loss}
        entry["heldout"] = self.scores.mean().item() if heldout else None
        if len(self.losses) > 1:
            rows = zip(self.iterations.tolist(), self.losses.tolist(), strict=True)
            entry["per_sample"] = [{"iteration": i, "loss": x} for i, x in rows]
        return entry

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any], like: Tensor) -> None:
        """Take ``state`` up again, its tensors on the device of ``like``."""
        for name, value in state.items():
            setattr(self, name, value.to(like.device) if isinstance(value, Tensor) else value)
        self.values = {k: v.to(like.device) for k, v in self.values.items()}
