"""Runs under the continuous adjoint, and the true flow's gradients that they approach."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from backdrift.denoiser import Denoiser
from backdrift.gradients import GradientMethod, Plain
from backdrift.grids import TimeGrid
from backdrift.sampling import Solution, sample
from backdrift.solvers import (
    RK4,
)
from problems import (
    PREDICTIONS,
    SCHEDULES,
    GaussianNetwork,
    MixtureNetwork,
    condition,
    smooth_grid,
    start_state,
)


def loss(x0: Tensor) -> Tensor:
    return (torch.tensor([0.7, -1.1, 0.4], dtype=torch.float64) * x0 + 0.3 * x0**2).sum()


def mild(schedule: Any, prediction: str) -> MixtureNetwork:
    """A mixture of wide Gaussians: its flow is curved, and in its asymptotic range at few steps."""
    return MixtureNetwork(schedule, prediction, width=1.0)


def mild_grid(steps: int) -> TimeGrid:
    return TimeGrid("logsnr", steps, start=0.6, end=0.05)


def run(
    schedule: str,
    steps: int,
    gradient: GradientMethod,
    network: Any = mild,
    *,
    latents: bool = False,
    **settings: Any,
) -> tuple[list[Tensor], Solution]:
    """Gradients by x_T, cond and the first weight. ``latents``: the loss looks at two states on the way as well."""
    made = network(SCHEDULES[schedule], PREDICTIONS[schedule])
    grid = smooth_grid(schedule, steps) if network is GaussianNetwork else mild_grid(steps)
    start = float(grid.nodes(SCHEDULES[schedule])[0])
    x, c = start_state(SCHEDULES[schedule], start).requires_grad_(), condition().requires_grad_()
    model = Denoiser(made, SCHEDULES[schedule], PREDICTIONS[schedule])
    settings = {"grid": grid, "form": "exponential", **settings}
    solution = sample(model, x, c, gradient=gradient, trajectory=latents, **settings)
    value = loss(solution.x0)
    if latents:
        assert solution.trajectory is not None
        value = (
            value + (solution.trajectory[steps // 2] ** 2).sum() + solution.trajectory[steps // 4].sin().sum()
        )
    return list(torch.autograd.grad(value, [x, c, next(made.parameters())])), solution


@cache
def mixture_truth(latents: bool = False) -> list[Tensor]:
    return run("linear", 240, Plain(), latents=latents, solver=RK4())[0]


@cache
def gaussian_truth(schedule: str) -> list[Tensor]:
    network = GaussianNetwork(SCHEDULES[schedule], PREDICTIONS[schedule])
    nodes = smooth_grid(schedule, 2).nodes(SCHEDULES[schedule]).tolist()
    x, c = start_state(SCHEDULES[schedule], nodes[0]).requires_grad_(), condition().requires_grad_()
    x0 = network.solution(x, c, nodes[0], nodes[-1])
    return list(torch.autograd.grad(loss(x0), [x, c, network.mean]))


def errors(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [float((f - t).norm() / t.norm()) for f, t in zip(found, truth, strict=True)]


def orders(coarse: list[float], fine: list[float]) -> list[float]:
    return [math.log2(a / b) for a, b in zip(coarse, fine, strict=True)]
