"""Guided sampling with known answers: small pictures whose noise prediction is a formula, float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backdrift.denoiser import Denoiser
from backdrift.schedules import EDM, VP, Flow, Schedule


class PictureNetwork(nn.Module):
    """eps(x, t, cond) of pictures (B, 3, 2, 2): that of a Gaussian in y = x/alpha at the noise level rho, bent a
    little, so that estimates in one step and in several differ. It is the same function of (y, rho) on every schedule.

    Attributes:
        calls: how often it was called.
        rows: of the last call.
    """

    def __init__(self, schedule: Schedule, prediction: str = "epsilon") -> None:
        super().__init__()
        self.schedule, self.prediction, self.calls, self.rows = schedule, prediction, 0, 0
        generator = torch.Generator().manual_seed(3)
        self.mean = torch.rand(3, 2, 2, generator=generator, dtype=torch.float64)
        self.mix = 0.3 * torch.randn(12, 12, generator=generator, dtype=torch.float64)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        self.calls, self.rows = self.calls + 1, len(x)
        alpha, sigma = (f(t)[:, None, None, None] for f in (self.schedule.alpha, self.schedule.sigma))
        y, rho = x / alpha, sigma / alpha
        centred = y - self.mean - (0.0 if cond is None else cond)
        bent = torch.tanh(centred.flatten(1) @ self.mix).view_as(centred)
        eps = rho / (0.09 + rho**2) * (centred + 0.5 * bent * rho / (1 + rho))
        x0 = y - rho * eps
        if self.prediction == "epsilon":
            return eps
        if self.prediction == "sample":
            return x0
        return alpha * eps - sigma * x0 if self.prediction == "v_prediction" else eps - x0


def denoiser(
    schedule: Schedule | None = None, prediction: str = "epsilon", guidance_scale: float = 1.0
) -> tuple[Denoiser, PictureNetwork]:
    """A denoiser of pictures, and its network; with guidance its halves differ by their conditioning."""
    schedule = schedule or VP.linear()
    network = PictureNetwork(schedule, prediction)
    uncond = torch.full((1, 3, 2, 2), -0.2, dtype=torch.float64) if guidance_scale != 1 else None
    return Denoiser(network, schedule, prediction, guidance_scale=guidance_scale, uncond=uncond), network


SCHEDULES: dict[str, tuple[Schedule, str]] = {
    "vp": (VP.linear(), "epsilon"),
    "edm": (EDM(), "epsilon"),
    "flow": (Flow(), "flow_prediction"),
}


def times_at(schedule: Schedule, rhos: list[float]) -> list[float]:
    """The schedule's times at these noise levels, and the clean end."""
    return [*schedule.t_from_rho(rhos).tolist(), schedule.t_clean]


def start(batch: int = 2, seed: int = 0) -> Tensor:
    """Noise (batch, 3, 2, 2); row i is the same in every batch."""
    rows = [
        torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(seed + i), dtype=torch.float64)
        for i in range(batch)
    ]
    return torch.stack(rows)


def bright(images: Tensor) -> Tensor:
    """A loss: the squared distance of the weighted mean from 0.8, and some curvature."""
    weights = torch.linspace(0.2, 1.0, 12, dtype=images.dtype).view(3, 2, 2)
    return ((images * weights).sum((1, 2, 3)) / weights.sum() - 0.8) ** 2 + 0.01 * images.pow(4).sum(
        (1, 2, 3)
    )
