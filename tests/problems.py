"""Problems with known answers: Gaussian data and a Gaussian mixture, whose best predictions have closed forms.

Everything is float64. ``cond`` shifts the data's mean; the weights are its mean and log-variance, so that a
gradient of each kind has a known answer too.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from backdrift.denoiser import Denoiser
from backdrift.grids import TimeGrid
from backdrift.noises import Brownian
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
# Each schedule with another prediction, so that all four are met.
PREDICTIONS = {
    "linear": "epsilon",
    "cosine": "v_prediction",
    "discrete": "epsilon",
    "edm": "sample",
    "flow": "flow_prediction",
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


class NoisePaths:
    """Paths of Brownian motion W over c = v / (1 + v), v = rho², and their noises on grids that divide the finest.

    The nodes fall evenly in log rho from 4 to 0.1. A coarser step's noise is the sum of those inside it.
    """

    def __init__(self, rows: int, finest: int, seed: int = 0) -> None:
        self.rows, self.finest = rows, finest
        self.rho = torch.exp(torch.linspace(math.log(4.0), math.log(0.1), finest + 1, dtype=torch.float64))
        v = self.rho**2
        self.c = v / (1 + v)
        self.increments = self._normals(seed) * (self.c[:-1] - self.c[1:]).sqrt()[:, None, None]

    def _normals(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.finest, self.rows, 1, generator=generator, dtype=torch.float64)

    def times(self, schedule: Schedule, steps: int) -> list[float]:
        return schedule.t_from_rho(self.rho[:: self.finest // steps]).tolist()

    def noises(self, steps: int) -> Tensor:
        """Standard normal (steps, rows, 1): those of a run with that many steps."""
        stride = self.finest // steps
        c = self.c[::stride]
        sums = self.increments.reshape(steps, stride, self.rows, 1).sum(1)
        return sums / (c[:-1] - c[1:]).sqrt()[:, None, None]


class ScalarPaths(NoisePaths):
    """Many scalar solutions of the diffusion SDE for data N(mean, variance), each along its own noise, in closed form.

    In y = x/alpha the SDE of noise level eta is linear. With z = y - mean and p = (1 + eta²)/2,

        z = (variance + v)^p q,   dq = eta (1 + v) / (variance + v)^p dW.

    q is known where the Wiener integral is: on each of the finest steps it is drawn given W's increment there, with
    which it is jointly normal. W is the path of :class:`Brownian`.
    """

    mean, variance = 0.7, 0.09

    def __init__(self, rows: int = 2000, finest: int = 256, eta: float = 1.0, seed: int = 0) -> None:
        super().__init__(rows, finest, seed)
        self.eta = eta
        generator = torch.Generator().manual_seed(seed + 1)
        self.start = torch.randn(rows, 1, generator=generator, dtype=torch.float64)
        self.q = self._wiener_integral(torch.randn(finest, rows, 1, generator=generator, dtype=torch.float64))

    def _normals(self, seed: int) -> Tensor:
        like, rhos = torch.zeros(self.rows, 1, dtype=torch.float64), self.rho.tolist()
        draw = Brownian(seed).path(EDM(), rhos, like)
        return torch.stack([draw(like, 1.0, *pair) for pair in itertools.pairwise(rhos)])

    def _wiener_integral(self, rest: Tensor) -> Tensor:
        """eta ∫ (1 + v)/(variance + v)^p dW from the first node to the last (rows, 1), given the increments of W."""
        gauss, weights = (torch.from_numpy(a) for a in numpy.polynomial.legendre.leggauss(6))
        dc = self.c[:-1] - self.c[1:]
        c = self.c[1:, None] + dc[:, None] * (gauss + 1) / 2
        v = c / (1 - c)
        integrand = (1 + v) / (self.variance + v) ** ((1 + self.eta**2) / 2)
        mean = (integrand * weights / 2).sum(1, keepdim=True)
        spread = (dc * ((integrand - mean) ** 2 * weights / 2).sum(1)).sqrt()[:, None, None]
        return self.eta * (mean[..., None] * self.increments + spread * rest).sum(0)

    def network(self, schedule: Schedule, prediction: str = "epsilon") -> GaussianNetwork:
        network = GaussianNetwork(schedule, prediction)
        network.mean = nn.Parameter(torch.tensor([self.mean], dtype=torch.float64))
        network.log_variance = nn.Parameter(torch.tensor([self.variance], dtype=torch.float64).log())
        return network.requires_grad_(False)

    def ends(self, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """The states at the first and at the last node."""
        (v_a, v_b), p = (self.rho[[0, -1]] ** 2).tolist(), (1 + self.eta**2) / 2
        alpha_a, alpha_b = (float(schedule.alpha(t)) for t in self.times(schedule, 1))
        z = (self.variance + v_a) ** 0.5 * self.start
        z_b = (self.variance + v_b) ** p * (z / (self.variance + v_a) ** p + self.q)
        return alpha_a * (self.mean + z), alpha_b * (self.mean + z_b)
