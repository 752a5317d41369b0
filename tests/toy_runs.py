"""Runs of the toy network, differentiated by everything, and whether two gradients are the same bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from backdrift.gradients import GradientMethod
from backdrift.grids import TimeGrid
from backdrift.sampling import Solution, sample
from backdrift.solvers import Heun, Solver
from problems import ToyNetwork, toy_denoiser, toy_inputs

GRID = TimeGrid("uniform", steps=5, start=1.0, end=0.05)


def equal(left: list[Tensor | None], right: list[Tensor | None]) -> list[int]:
    """Where two lists of gradients differ, in any bit."""
    pairs = enumerate(zip(left, right, strict=True))
    return [i for i, (a, b) in pairs if not (a is b if a is None or b is None else torch.equal(a, b))]


def toy_run(
    gradient: GradientMethod, network: Any = None, solver: Solver | None = None, **kwargs: Any
) -> tuple[Solution, list[Tensor | None]]:
    """A run of the toy network, differentiated by everything: x_T, both cond tensors, all weights."""
    network = network if network is not None else ToyNetwork()
    x, cond = toy_inputs()
    x.requires_grad_()
    cond["prompt"].requires_grad_()
    cond["more"][0].requires_grad_()
    model = toy_denoiser(network, **kwargs)
    solution = sample(model, x, cond, solver=solver or Heun(), grid=GRID, gradient=gradient)
    (solution.x0**2).sum().backward()
    weights = [p.grad for p in network.parameters()] if isinstance(network, nn.Module) else []
    return solution, [x.grad, cond["prompt"].grad, cond["more"][0].grad, *weights]
