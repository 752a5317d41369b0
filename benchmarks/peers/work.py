"""The work that every method does: one flow, one loss, gradients by x_T, conditioning and weights.

What a method costs is counted here and nowhere else. The rule: **a call** is one evaluation of the network, with or
without a graph, guidance's two halves in one batch; **a product** is one backward pass through one call, whatever it is
asked for (x alone, or cond and every weight too). The network counts both itself, so no method is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import backdrift as bd
from backdrift.predictions import conversion

QUANTITIES = ("x_T", "cond", "weights")


class _CountProducts(torch.autograd.Function):
    """The identity; its backward pass adds one to the network's products."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, network: Counted) -> Tensor:
        ctx.network = network
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.network.products += 1
        return gradient, None


class Counted(nn.Module):
    """``network(x, t, cond)``, counting calls and products.

    Args:
        inner: the network.

    Attributes:
        calls, products: so many since they were last set to 0.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls = self.products = 0

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        self.calls += 1
        out = self.inner(x, t, cond)
        return _CountProducts.apply(out, self) if out.requires_grad else out


@dataclass
class Work:
    """One flow to differentiate.

    Attributes:
        name: of the problem.
        network: counts its own calls.
        schedule, prediction: how the network is read.
        x_T: the leaf where the run starts (B, …).
        cond: the leaf that conditions it.
        loss: a scalar of the finished state.
        start, end: times.
        uncond: the conditioning without a prompt, where there is guidance.
        guidance_scale: 1 for none.
        wants: which of ``x_T``, ``cond`` and ``weights`` get gradients.
    """

    name: str
    network: Counted
    schedule: bd.Schedule
    prediction: str
    x_T: Tensor
    cond: Tensor
    loss: Callable[[Tensor], Tensor]
    start: float
    end: float
    uncond: Tensor | None = None
    guidance_scale: float = 1.0
    wants: tuple[str, ...] = QUANTITIES
    _numbers: dict[float, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.x_T.requires_grad_("x_T" in self.wants)
        self.cond.requires_grad_("cond" in self.wants)
        self.network.requires_grad_("weights" in self.wants)

    @property
    def weights(self) -> list[nn.Parameter]:
        """The network's weights that get gradients."""
        return [p for p in self.network.parameters() if p.requires_grad]

    @property
    def shared(self) -> tuple[Tensor, ...]:
        """What all calls share and gradients are wanted for: cond, then the weights."""
        return (*([self.cond] if self.cond.requires_grad else []), *self.weights)

    def nodes(self, steps: int, rule: str = "logsnr") -> Tensor:
        """Falling times (steps + 1,), float64."""
        return bd.TimeGrid(rule, steps, start=self.start, end=self.end).nodes(self.schedule)

    def denoiser(self, network: Any = None) -> bd.Denoiser:
        """The network, or a wrapper of it, as backdrift reads it."""
        return bd.Denoiser(
            network or self.network,
            self.schedule,
            self.prediction,
            guidance_scale=self.guidance_scale,
            uncond=self.uncond,
        )

    def eps(self, x: Tensor, t: float) -> Tensor:
        """The guided noise prediction at time ``t``, for packages that know nothing of denoisers."""
        guided = self.guidance_scale != 1
        cond, rows = self.cond, torch.cat([x, x]) if guided else x
        if guided:
            assert self.uncond is not None
            cond = torch.cat([self.uncond, cond])
        times = torch.full((len(rows),), t, dtype=x.dtype, device=x.device)
        out = self.network(rows, times, cond)
        if guided:
            uncond, cond = out.chunk(2)
            out = uncond + self.guidance_scale * (cond - uncond)
        on_x, on_out = self._read_as_eps(t)
        return out if (on_x, on_out) == (0.0, 1.0) else on_x * x + on_out * out

    def _read_as_eps(self, t: float) -> tuple[float, float]:
        if t not in self._numbers:
            alpha, sigma = float(self.schedule.alpha(t)), float(self.schedule.sigma(t))
            self._numbers[t] = conversion(self.prediction, "epsilon", alpha, sigma, t)
        return self._numbers[t]

    def clear(self) -> None:
        """Forget gradients and counts."""
        for leaf in (self.x_T, self.cond, *self.network.parameters()):
            leaf.grad = None
        self.network.calls = self.network.products = 0

    def gradients(self) -> dict[str, Tensor]:
        """Copies of the leaves' gradients, flat; weights in one row, zeros where one is not used.

        Raises:
            RuntimeError: one that is wanted is missing.
        """
        rows: dict[str, list[Tensor | None]] = {"x_T": [self.x_T.grad], "cond": [self.cond.grad]}
        rows["weights"] = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.weights]
        found = {}
        for name in self.wants:
            if any(g is None for g in rows[name]):
                raise RuntimeError(f"no gradient by {name} on {self.name}")
            found[name] = torch.cat([g.detach().flatten() for g in rows[name] if g is not None])
        return found
