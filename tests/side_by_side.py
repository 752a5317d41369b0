"""One run that measures a solver on two problems with known answers: Gaussian data beside a Gaussian mixture.

Both flows, and the gradients of a loss by x_T, by cond and by the data's means, are known: the Gaussian's in closed
form, the mixture's from torchdiffeq's eighth-order method at a tolerance of 1e-12, on an equation written down here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torchdiffeq import odeint

from backdrift.denoiser import Denoiser
from backdrift.gradients import Plain
from backdrift.grids import TimeGrid
from backdrift.sampling import sample
from backdrift.schedules import Schedule
from backdrift.solvers import Solver
from problems import PREDICTIONS, SCHEDULES, GaussianNetwork, MixtureNetwork, condition, start_state

# All schedules are run over the same range of rho, away from their singular ends and where errors are smooth.
RHO = (4.0, 0.2)
PROBLEMS = ("Gaussian", "mixture")
QUANTITIES = ("state", "x_T", "cond", "weights")

_COLUMNS = (slice(0, 3), slice(3, 6))
_WEIGHTS = torch.tensor([0.7, -1.1, 0.4], dtype=torch.float64).repeat(2)

# One list per problem; in it the state and the three gradients.
Outcome = list[list[Tensor]]


class _Scales:
    """alpha and sigma of a schedule for a batch of equal times, computed once per time."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.known: dict[tuple[str, float], Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        def scale(t: Tensor | float) -> Tensor:
            key = (name, float(t if isinstance(t, float) else t[0]))
            if key not in self.known:
                self.known[key] = getattr(self.schedule, name)(key[1])
            value = self.known[key]
            return value if isinstance(t, float) else value.expand(len(t))

        return scale


class SideBySide(nn.Module):
    """The best prediction for data whose first three columns are Gaussian and whose last three are a mixture."""

    def __init__(self, schedule: Schedule, prediction: str) -> None:
        super().__init__()
        scales: Any = _Scales(schedule)
        self.gaussian = GaussianNetwork(scales, prediction)
        self.mixture = MixtureNetwork(scales, prediction, width=0.8)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        parts = (self.gaussian, self.mixture)
        return torch.cat([f(x[:, s], t, cond[:, s]) for f, s in zip(parts, _COLUMNS, strict=True)], dim=1)


def ends(schedule: Schedule) -> tuple[float, float]:
    return float(schedule.t_from_rho(RHO[0])), float(schedule.t_from_rho(RHO[1]))


def inputs(schedule: Schedule) -> tuple[Tensor, Tensor]:
    """x_T, of the size it has there, and cond; both (2, 6) and requiring grad."""
    start, _ = ends(schedule)
    x = torch.tensor([[1.0, -0.4, 0.7], [-0.3, 0.8, -1.1]], dtype=torch.float64).repeat(1, 2)
    size = (schedule.alpha(start) ** 2 + schedule.sigma(start) ** 2).sqrt()
    return (x * size).requires_grad_(), condition().repeat(1, 2).requires_grad_()


def outcome(x0: Tensor, x: Tensor, cond: Tensor, network: SideBySide) -> Outcome:
    losses = _WEIGHTS * x0 + 0.3 * x0**2
    found = []
    for columns, weight in zip(_COLUMNS, (network.gaussian.mean, network.mixture.means), strict=True):
        by_x, by_cond, by_weight = torch.autograd.grad(
            losses[:, columns].sum(), [x, cond, weight], retain_graph=True
        )
        found.append([x0[:, columns].detach(), by_x[:, columns], by_cond[:, columns], by_weight])
    return found


def run(name: str, form: str, solver: Solver, steps: int) -> Outcome:
    """A run on the schedule of that name."""
    schedule, prediction = SCHEDULES[name], PREDICTIONS[name]
    network, (start, end), (x, cond) = SideBySide(schedule, prediction), ends(schedule), inputs(schedule)
    grid = TimeGrid("karras" if name == "edm" else "logsnr", steps, start=start, end=end)
    model = Denoiser(network, schedule, prediction)
    solution = sample(model, x, cond, solver=solver, grid=grid, form=form, gradient=Plain())
    return outcome(solution.x0, x, cond, network)


def scaled_end(name: str, form: str, solver: Solver, steps: int = 6) -> Tensor:
    """x/alpha at the end of a run from the same x/alpha at its start, without gradients."""
    schedule, (start, end) = SCHEDULES[name], ends(SCHEDULES[name])
    x, cond = inputs(SCHEDULES["linear"])
    x = x / SCHEDULES["linear"].alpha(ends(SCHEDULES["linear"])[0]) * schedule.alpha(start)
    model = Denoiser(SideBySide(schedule, PREDICTIONS[name]), schedule, PREDICTIONS[name])
    grid = TimeGrid("logsnr", steps, start=start, end=end)
    with torch.no_grad():
        return sample(model, x, cond, solver=solver, grid=grid, form=form).x0 / schedule.alpha(end)


@dataclass(frozen=True)
class Error:
    """Relative errors of the final state and of the gradient of a loss on it by x_T."""

    state: float
    gradient: float


def error_at(solver: Solver, evaluations: int) -> Error | None:
    """What a solver makes of that many evaluations at most, from nearly pure noise to nearly clean data.

    A mixture of three Gaussians, VP linear, t from 1 to 0.001, log-SNR grid, the solver's own form or the exponential
    one. None where not even one step can be had.
    """
    steps = 0
    while sum(solver.evaluations(i) for i in range(steps + 1)) <= evaluations:
        steps += 1
    if steps == 0:
        return None
    schedule = SCHEDULES["linear"]
    x, cond = start_state(schedule, 1.0).requires_grad_(), condition()
    grid = TimeGrid("logsnr", steps, start=1.0, end=1e-3)
    model = Denoiser(MixtureNetwork(schedule), schedule)
    x0 = sample(model, x, cond, solver=solver, grid=grid, gradient=Plain()).x0
    found = (x0, *torch.autograd.grad((_WEIGHTS[:3] * x0 + 0.3 * x0**2).sum(), x))
    pairs = zip(found, _whole_way(), strict=True)
    return Error(*(float((ours - true).detach().norm() / true.detach().norm()) for ours, true in pairs))


@cache
def _whole_way() -> tuple[Tensor, Tensor]:
    """The true state and gradient of :func:`error_at`."""
    schedule = SCHEDULES["linear"]
    x, network = start_state(schedule, 1.0).requires_grad_(), MixtureNetwork(schedule)
    x0 = by_torchdiffeq(schedule, network, x, condition(), (1.0, 1e-3))
    (gradient,) = torch.autograd.grad((_WEIGHTS[:3] * x0 + 0.3 * x0**2).sum(), x)
    return x0.detach(), gradient


@cache
def known(name: str) -> Outcome:
    """The true flow and its gradients on the schedule of that name."""
    schedule = SCHEDULES[name]
    network, (start, end), (x, cond) = SideBySide(schedule, "epsilon"), ends(schedule), inputs(schedule)
    columns = _COLUMNS[0]
    closed = network.gaussian.solution(x[:, columns], cond[:, columns], start, end)
    solved = by_torchdiffeq(schedule, network, x, cond, (start, end))
    return outcome(torch.cat([closed, solved[:, _COLUMNS[1]]], dim=1), x, cond, network)


def by_torchdiffeq(
    schedule: Schedule, network: nn.Module, x: Tensor, cond: Tensor, between: tuple[float, float]
) -> Tensor:
    """The state at the later of two times, from that at the earlier, by dopri8 on dy/drho = eps(alpha y)."""
    start, end = between

    def drift(rho: Tensor, y: Tensor) -> Tensor:
        t = schedule.t_from_rho(rho.detach())
        return network(schedule.alpha(t) * y, t.expand(len(y)), cond)

    rho = schedule.rho([start, end])
    # Without a first step of our own, torchdiffeq's is a function of y, and its gradient is wrong.
    options = {"step_t": rho[1:], "first_step": 0.01 * float(rho[0])}
    y = odeint(
        drift, x / schedule.alpha(start), rho, method="dopri8", rtol=1e-12, atol=1e-13, options=options
    )
    return y[-1] * schedule.alpha(end)


def slopes(coarse: Outcome, fine: Outcome, truth: Outcome) -> list[list[float]]:
    """log2 of the error's ratio, for each problem and quantity."""
    return [
        [math.log2(float((a - t).norm()) / float((b - t).norm())) for a, b, t in zip(*problem, strict=True)]
        for problem in zip(coarse, fine, truth, strict=True)
    ]
