"""Problems with known answers: Gaussian data and a Gaussian mixture, whose best predictions have closed forms.

Everything is float64. ``cond`` shifts the data's mean; the weights are its mean and log-variance, so that a
gradient of each kind has a known answer too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from backdrift.denoiser import Denoiser
from backdrift.grids import TimeGrid
from backdrift.schedules import EDM, VP, Flow, Schedule


def scaled_linear_table() -> Tensor:
    """Stable Diffusion's alphas_cumprod, in float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


SCHEDULES: dict[str, Schedule] = {
    "linear": VP.linear(),
    "cosine": VP.cosine(),
    "discrete": VP.discrete(scaled_linear_table(), "spline"),
    "edm": EDM(),
    "flow": Flow(),
}


def smooth_grid(name: str, steps: int) -> TimeGrid:
    """A grid on which every form and solver of the schedule shows its order: away from singular ends."""
    rules: dict[str, tuple[str, float, float]] = {
        "linear": ("logsnr", 1.0, 0.02),
        "cosine": ("logsnr", 0.99, 0.02),
        "discrete": ("logsnr", 999.0, 20.0),
        "edm": ("karras", 10.0, 0.1),
        "flow": ("logsnr", 0.97, 0.03),
    }
    rule, start, end = rules[name]
    return TimeGrid(rule, steps=steps, start=start, end=end)


def _predict(prediction: str, x: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    eps = (x - alpha * x0) / sigma
    if prediction == "epsilon":
        return eps
    if prediction == "sample":
        return x0
    return alpha * eps - sigma * x0 if prediction == "v_prediction" else eps - x0


class GaussianNetwork(nn.Module):
    """The best prediction for data ~ N(mean + cond, diag(exp(log_variance))): exact, and affine in x."""

    def __init__(self, schedule: Schedule, prediction: str) -> None:
        super().__init__()
        self.schedule, self.prediction = schedule, prediction
        self.mean = nn.Parameter(torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64))
        self.log_variance = nn.Parameter(torch.tensor([0.3, 1.2, 0.05], dtype=torch.float64).log())

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        alpha, sigma = self.schedule.alpha(t)[:, None], self.schedule.sigma(t)[:, None]
        mean, variance = self.mean + cond, self.log_variance.exp()
        total = alpha**2 * variance + sigma**2
        x0 = mean + alpha * variance / total * (x - alpha * mean)
        eps = sigma / total * (x - alpha * mean)
        if self.prediction == "epsilon":
            return eps
        if self.prediction == "sample":
            return x0
        return alpha * eps - sigma * x0 if self.prediction == "v_prediction" else eps - x0

    def solution(self, x: Tensor, cond: Tensor, start: float, end: float) -> Tensor:
        """The ODE's solution: (x - alpha mean) grows like the marginal's standard deviation."""
        mean, variance = self.mean + cond, self.log_variance.exp()
        s = self.schedule
        a, b = s.alpha(start), s.alpha(end)
        ratio = (b**2 * variance + s.sigma(end) ** 2) / (a**2 * variance + s.sigma(start) ** 2)
        return b * mean + ratio.sqrt() * (x - a * mean)


class MixtureNetwork(nn.Module):
    """The best prediction for a mixture of Gaussians N(mean_k + cond, width² I) with equal weights."""

    def __init__(self, schedule: Schedule, prediction: str = "epsilon", width: float = 0.4) -> None:
        super().__init__()
        self.schedule, self.prediction, self.width = schedule, prediction, width
        means = [[1.5, 0.0, -0.5], [-1.0, 1.0, 0.5], [0.0, -1.5, 1.0]]
        self.means = nn.Parameter(torch.tensor(means, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        alpha, sigma = self.schedule.alpha(t)[:, None], self.schedule.sigma(t)[:, None]
        total = (alpha * self.width) ** 2 + sigma**2
        centred = x[:, None] - alpha[..., None] * (self.means + cond[:, None])  # (B, K, d)
        share = torch.softmax(-(centred**2).sum(-1) / (2 * total), dim=1)[..., None]
        eps = sigma / total * (share * centred).sum(1)
        if self.prediction == "epsilon":
            return eps
        x0 = (x - sigma * eps) / alpha
        return _predict(self.prediction, x, x0, alpha, sigma)


def start_state(schedule: Schedule, start: float) -> Tensor:
    """Two states at ``start``, of the size that noise has there."""
    x = torch.tensor([[1.0, -0.4, 0.7], [-0.3, 0.8, -1.1]], dtype=torch.float64)
    return x * schedule.sigma(start) if isinstance(schedule, EDM) else x


def condition() -> Tensor:
    return torch.tensor([[0.2, -0.1, 0.3], [0.0, 0.4, -0.2]], dtype=torch.float64)


class ToyNetwork(nn.Module):
    """A small float64 network with what makes order of addition matter: a weight used three times in a call,
    conditioning used by two layers, x used twice, and dropout."""

    def __init__(
        self, width: int = 16, dropout: float = 0.0, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.enter = nn.Linear(4, width, dtype=dtype)
            self.shared = nn.Linear(width, width, dtype=dtype)
            self.prompt = nn.Linear(3, width, dtype=dtype)
            self.leave = nn.Linear(width, 4, dtype=dtype)
            self.scale = nn.Parameter(torch.tensor(0.7, dtype=dtype))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        c = self.prompt(cond["prompt"]) if cond is not None else 0.0
        h = self.enter(x) + torch.sin(t[:, None].to(x.dtype))
        for _ in range(3):
            h = h + torch.tanh(self.shared(h) + c)
        h = self.dropout(h)
        if cond is not None:
            h = h * (1 + cond["more"][0].tanh())
        return self.leave(h) + self.scale * x


def toy_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, generator=generator, dtype=torch.float64).to(dtype)
    prompt = torch.randn(2, 3, generator=generator, dtype=torch.float64).to(dtype)
    return x, {"prompt": prompt, "more": [prompt[:, :1].clone(), None], "note": "a string travels along"}


def toy_denoiser(network: Any = None, **kwargs: Any) -> Denoiser:
    return Denoiser(network if network is not None else ToyNetwork(), VP.linear(), **kwargs)
