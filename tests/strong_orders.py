"""The tables of docs/stochastic.md: strong errors along known paths, and errors of means and variances.

python tests/strong_orders.py
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy
import torch
from torch import Tensor

import backdrift as bd
from backdrift.solvers import StochasticSolver
from problems import PREDICTIONS, SCHEDULES, GaussianNetwork, ScalarPaths, smooth_grid

SOLVERS: dict[str, StochasticSolver] = {
    "ancestral": bd.Ancestral(),
    "ancestral large": bd.Ancestral(variance="large"),
    "ancestral half": bd.Ancestral(0.5),
    "euler-maruyama": bd.EulerMaruyama(),
    "euler-maruyama half": bd.EulerMaruyama(0.5),
    "exponential euler": bd.ExponentialEuler(),
    "exponential euler half": bd.ExponentialEuler(0.5),
    "sde-dpm++ 1": bd.SDEDPMSolverPP(1),
    "sde-dpm++ 2m": bd.SDEDPMSolverPP(2),
    "sde-dpm++ 2m half": bd.SDEDPMSolverPP(2, eta=0.5),
}
DOUBLINGS = [4, 8, 16, 32, 64, 128, 256]


@cache
def known_paths(eta: float) -> ScalarPaths:
    return ScalarPaths(eta=eta)


def regression(errors: list[float]) -> float:
    """The order: minus the slope of log error against log steps, over doublings."""
    return -float(numpy.polyfit(range(len(errors)), numpy.log2(errors), 1)[0])


def strong_errors(schedule: str, solver: StochasticSolver) -> list[float]:
    """Root mean square error over the paths, at every number of steps."""
    process, problem = SCHEDULES[schedule], known_paths(solver.eta)
    model = bd.Denoiser(problem.network(process, PREDICTIONS[schedule]), process, PREDICTIONS[schedule])
    x_T, truth = problem.ends(process)
    errors = []
    for steps in DOUBLINGS:
        how = {"grid": problem.times(process, steps), "noise": problem.noises(steps)}
        found = bd.sample(model, x_T, torch.zeros(1, dtype=torch.float64), solver=solver, **how).x0
        errors.append(float((found - truth).square().mean().sqrt()))
    return errors


def moment_errors(schedule: str, solver: StochasticSolver, steps: int) -> tuple[Tensor, Tensor]:
    """Errors of the final mean and variance (3,) from an exact start. The run is affine in its noises on Gaussian
    data, so its own mean and variance are had without drawing: by derivatives."""
    process = SCHEDULES[schedule]
    network = GaussianNetwork(process, PREDICTIONS[schedule]).requires_grad_(False)
    grid = smooth_grid(schedule, steps)
    first, last = grid.nodes(process)[[0, -1]]
    variance = network.log_variance.exp()
    variances = [process.alpha(t) ** 2 * variance + process.sigma(t) ** 2 for t in (first, last)]
    draws = [torch.zeros(1, 3, dtype=torch.float64, requires_grad=True) for _ in range(steps + 1)]
    x_T = process.alpha(first) * network.mean + variances[0].sqrt() * draws[0]
    model = bd.Denoiser(network, process, PREDICTIONS[schedule])
    how = {"solver": solver, "grid": grid, "noise": draws[1:], "gradient": bd.Plain()}
    x0 = bd.sample(model, x_T, torch.zeros(3, dtype=torch.float64), **how).x0
    found = sum(grad**2 for grad in torch.autograd.grad(x0.sum(), draws))
    return (x0.detach() - process.alpha(last) * network.mean)[0], (found - variances[1])[0]


def row(label: str, errors: list[float], order: float) -> str:
    """A line of a Markdown table."""
    return f"| {label} | {' | '.join(f'{error:.1e}' for error in errors)} | {order:.2f} |"


def _table(title: str, steps: list[int], rows: Callable[[StochasticSolver], list[float]]) -> None:
    print(
        f"\n| {title} | {' | '.join(f'N = {n}' for n in steps)} | order |\n|---|{'---|' * (len(steps) + 1)}"
    )
    for solver in SOLVERS.values():
        errors = rows(solver)
        print(row(f"`{solver!r}`", errors, regression(errors)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    _table("strong error, VP linear", DOUBLINGS, lambda solver: strong_errors("linear", solver))
    steps = [40, 80, 160]
    _table(
        "error of the variance, EDM",
        steps,
        lambda s: [float(moment_errors("edm", s, n)[1].norm()) for n in steps],
    )
