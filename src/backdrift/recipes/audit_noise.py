"""Noise within a box around the noise it began with, and updates of one size whatever the gradient's.

The set is AdjointDPM's (Pan et al. 2024, section 4.1.2): ``|x - x_T| <= tau`` in every coordinate. It is held by the
numbers that the pipeline is handed, not up to rounding: the box's ends are rounded inwards, in the pipeline's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..accelerators import doubled
from ..descent import Example, Noise


class NoiseWithin(Noise):
    """The initial noise, one row per example, no coordinate farther than ``tau`` from where it was.

    Args:
        tau: half the box's side, in units of the noise's standard deviation; positive.
    """

    def __init__(self, tau: float) -> None:
        super().__init__()
        self.tau = tau
        self.lr = 0.15 * tau

    @contextmanager
    def on(self, pipe: Any, examples: Sequence[Example]) -> Iterator[None]:
        start = torch.cat([e.noise for e in examples]).to(pipe.dtype)
        self.low, self.high = box(start, self.tau)
        with super().on(pipe, examples):  # a copy: the start stays what it was
            yield

    @torch.no_grad()
    def project(self) -> None:
        noise = self.parameters["noise"]
        noise.copy_(noise.clamp(self.low.to(noise), self.high.to(noise)))

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"tau": self.tau}


def box(start: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """The least and the largest numbers of ``start``'s dtype that are no farther than ``tau`` from it, or nearly so.

    The ends are inside by less than two units in the last place. Whatever lies between them still does after
    rounding to that dtype, which is monotone.
    """
    wide = doubled(start)
    ends = [_inward(wide + sign * tau, wide, tau, start.dtype) for sign in (-1, 1)]
    return ends[0].to(start.device), ends[1].to(start.device)


def _inward(end: Tensor, centre: Tensor, tau: float, dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    rounded = end.to(dtype)
    wide = rounded.to(end.dtype)
    step = (wide.abs() * info.eps).clamp_min(info.tiny) * (centre - end).sign()
    nearer = (wide + step).to(dtype)
    inner = nearer.to(end.dtype)
    # Where tau is below the spacing of the dtype's numbers, there is none but the centre itself.
    passed = ((inner - centre).abs() > tau) | ((inner - centre).sign() == (centre - end).sign())
    nearer = torch.where(passed, centre.to(dtype), nearer)
    return torch.where((wide - centre).abs() > tau, nearer, rounded)


class Normalized(torch.optim.Optimizer):
    """Gradient descent in which each sample's gradient is divided by its root mean square.

    ``x_i <- x_i - lr g_i / RMS(g_i)`` for each row i: lr is how far a coordinate moves, in the root mean square. It is
    the L2-normalised gradient of AdjointDPM's ImageNet attack with the dimension in lr. A zero gradient moves nothing.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * self.direction(parameter.grad))

    def direction(self, gradient: Tensor) -> Tensor:
        rows = gradient.flatten(1)
        # By the largest entry first: the squares of gradients far below 1 would underflow.
        rows = rows / rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
        size = rows.square().mean(1, keepdim=True).sqrt().clamp_min(torch.finfo(rows.dtype).tiny)
        return (rows / size).view_as(gradient)


class Signs(Normalized):
    """Gradient descent by the gradient's signs, ``x <- x - lr sign(g)`` (Goodfellow et al. 2015; with several steps,
    projected: Madry et al. 2018)."""

    def direction(self, gradient: Tensor) -> Tensor:
        return gradient.sign()


UPDATES: dict[str, str | Callable[..., torch.optim.Optimizer]] = {
    "adamw": "adamw",
    "normalized": Normalized,
    "sign": Signs,
}
"""How the noise is updated, by name."""


def random_within(start: Tensor, tau: float, draws: Sequence[torch.Generator]) -> Tensor:
    """A corner of the box around each row of ``start``, by fair coins: no change in the box is larger, in any norm."""
    low, high = box(start, tau)
    coins = torch.stack([torch.rand(start.shape[1:], generator=draw) < 0.5 for draw in draws])
    return torch.where(coins.to(start.device), low, high)
