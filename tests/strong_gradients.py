"""The table of gradients in docs/stochastic.md: errors along given noise, beside the exact gradient of a fine run.

python tests/strong_gradients.py
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import backdrift as bd
from backdrift.gradients import GradientMethod
from backdrift.gradients.deis import AdjointDEIS
from backdrift.solvers import StochasticSolver
from problems import SCHEDULES, MixtureNetwork, NoisePaths
from strong_orders import regression, row

DOUBLINGS = [8, 16, 32, 64, 128, 256, 512]
FINEST, ROWS = 1536, 2000
CASES: dict[str, tuple[GradientMethod, StochasticSolver]] = {
    "1": (AdjointDEIS(1), bd.ExponentialEuler()),
    "2M": (AdjointDEIS(2, "M"), bd.ExponentialEuler()),
    "2S": (AdjointDEIS(2, "S"), bd.SDEDPMSolverPP(2)),
    "1 of half the noise": (AdjointDEIS(1), bd.Ancestral(0.5)),
    "2M recomputed": (AdjointDEIS(2, "M", trajectory="recompute"), bd.ExponentialEuler()),
    "the run's own": (bd.Exact(memory="max"), bd.ExponentialEuler()),
}


@cache
def paths() -> NoisePaths:
    return NoisePaths(ROWS, FINEST)


def gradients(solver: StochasticSolver, method: GradientMethod, steps: int) -> list[Tensor]:
    """By x_T and cond, one number per path (2000, 1), and by the weights, of a loss on every path's end."""
    process, problem = SCHEDULES["linear"], paths()
    network = MixtureNetwork(process)
    network.means = nn.Parameter(network.means.detach()[:, :1].clone())
    times = problem.times(process, steps)
    x = torch.randn(ROWS, 1, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    x = (x * (process.alpha(times[0]) ** 2 + process.sigma(times[0]) ** 2).sqrt()).requires_grad_()
    cond = torch.full((ROWS, 1), 0.2, dtype=torch.float64, requires_grad=True)
    how: dict[str, Any] = {"grid": times, "noise": problem.noises(steps), "gradient": method}
    x0 = bd.sample(bd.Denoiser(network, process), x, cond, solver=solver, **how).x0
    loss = (x0 + 0.3 * x0**2).sum()
    return list(torch.autograd.grad(loss, [x, cond, network.means]))


@cache
def truth(eta: float) -> list[Tensor]:
    return gradients(bd.SDEDPMSolverPP(2, eta=eta), bd.Exact(memory="min"), FINEST)


def errors(method: GradientMethod, solver: StochasticSolver, doublings: list[int]) -> list[list[float]]:
    """Relative root mean square errors over the paths: of x_T, cond and weights, at every number of steps."""
    known = truth(solver.eta)
    runs = [gradients(solver, method, steps) for steps in doublings]
    return [[float((run[i] - known[i]).norm() / known[i].norm()) for run in runs] for i in range(3)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    head = " | ".join(f"N = {n}" for n in DOUBLINGS)
    print(f"| gradient by x_T | {head} | order |\n|---|{'---|' * (len(DOUBLINGS) + 1)}")
    for method, solver in CASES.values():
        found = errors(method, solver, DOUBLINGS)[0]
        print(row(f"`{method!r}`, `{solver!r}`", found, regression(found)))
