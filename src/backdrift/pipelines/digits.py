"""The shipped pixel model's network: continuous-time, variance-preserving, of 8×8 handwritten digits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError


class DigitsNetwork(nn.Module):
    """A residual perceptron that predicts v = alpha eps - sigma x0 of one picture's 64 pixels.

    It is told the time through lam = log(alpha/sigma), in slow waves only, so that the flow is smooth enough in time
    for high-order solvers to show their order.

    Args:
        width: of the residual stream.
        hidden: of the layer inside each block.
        blocks: how many.
        embedding: width of what the blocks are told of time and digit.
        frequencies: waves in lam, between 0.1 and 1.6 radians a unit.
        beta0, beta1: of the schedule, ``VP.linear(beta0, beta1)``.

    Call it as ``network(x, t, cond)``:

    * ``x``: (B, 1, 8, 8), noisy; a clean picture is -1 on paper and 1 in full ink.
    * ``t``: (B,), in (0, 1].
    * ``cond``: (B, 10) weights of the ten digits, one-hot in training; None, or a row of zeros: any digit.
    """

    def __init__(
        self,
        width: int = 192,
        hidden: int = 128,
        blocks: int = 4,
        embedding: int = 32,
        frequencies: int = 8,
        beta0: float = 0.1,
        beta1: float = 20.0,
    ) -> None:
        super().__init__()
        self._config = {
            "width": width,
            "hidden": hidden,
            "blocks": blocks,
            "embedding": embedding,
            "frequencies": frequencies,
            "beta0": beta0,
            "beta1": beta1,
        }
        self.beta0, self.beta1 = beta0, beta1
        self.register_buffer("waves", torch.logspace(-1, 0.2, frequencies), persistent=False)
        self.waves: Tensor
        self.time = nn.Linear(2 * frequencies, embedding)
        self.digit = nn.Linear(10, embedding, bias=False)
        self.film = nn.Linear(embedding, 2 * hidden * blocks)
        self.enter = nn.Linear(64, width)
        self.up = nn.ModuleList(nn.Linear(width, hidden) for _ in range(blocks))
        self.down = nn.ModuleList(nn.Linear(hidden, width) for _ in range(blocks))
        self.leave = nn.Linear(width, 64)
        for layer in (*self.down, self.leave):  # so that it begins by predicting 0
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        if x.ndim != 4 or x.shape[1:] != (1, 8, 8):
            raise InputError(f"DigitsNetwork takes pictures (B, 1, 8, 8); got {tuple(x.shape)}")
        if cond is not None and cond.shape != (len(x), 10):
            raise InputError(
                f"DigitsNetwork's cond is ({len(x)}, 10), a weight for each digit, or None; got {tuple(cond.shape)}"
            )
        phase = self.lam(t)[:, None] * self.waves
        told = self.time(torch.cat([phase.sin(), phase.cos()], 1).to(x.dtype))
        if cond is not None:
            told = told + self.digit(cond.to(x.dtype))
        films = self.film(F.silu(told)).chunk(2 * len(self.up), 1)
        h = self.enter(x.flatten(1))
        for up, down, scale, shift in zip(self.up, self.down, films[::2], films[1::2], strict=True):
            h = h + down(F.silu(up(_normal(h)) * (1 + scale) + shift))
        return self.leave(_normal(h)).view_as(x)

    def lam(self, t: Tensor) -> Tensor:
        """log(alpha/sigma) of ``VP.linear(beta0, beta1)`` at ``t``."""
        log_alpha = -((self.beta1 - self.beta0) * t / 4 + self.beta0 / 2) * t
        return log_alpha - (-torch.expm1(2 * log_alpha)).log() / 2

    def config(self) -> dict[str, float]:
        """What is needed to build the same network again."""
        return dict(self._config)


def _normal(h: Tensor) -> Tensor:
    return F.layer_norm(h, h.shape[1:])
