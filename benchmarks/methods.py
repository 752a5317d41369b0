"""The ways to have the gradient that are compared. Each maps (problem, steps) to the finished state with a graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import backdrift as bd

from .problem import GUIDANCE, Problem

Method = Callable[[Problem, int], Tensor]

# How far from "min" to "max" the budgets of the ladder lie, by measured peak memory.
LADDER = {"exact-1/4": 0.25, "exact-1/2": 0.5, "exact-3/4": 0.75}
NAMES = ("plain", "exact-min", *LADDER, "exact-max", "checkpoint", "torchdiffeq")


def plain(problem: Problem, steps: int) -> Tensor:
    """Ordinary backpropagation: every call's activations stay."""
    return problem.sample(steps, bd.Plain())


def exact(memory: str | int) -> Method:
    """backdrift's exact gradient under a memory plan."""
    return lambda problem, steps: problem.sample(steps, bd.Exact(memory))


def per_call_checkpoint(problem: Problem, steps: int) -> Tensor:
    """Each network call under non-reentrant torch.utils.checkpoint: the lines everybody writes."""

    def network(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return checkpoint(problem.network, x, t, cond, use_reentrant=False)

    return problem.sample(steps, bd.Plain(), network)


class ExponentialForm(nn.Module):
    """dy/drho = eps(alpha y, t(rho), cond) for torchdiffeq: the same equation, guidance and nodes as ours."""

    def __init__(self, problem: Problem, times: Tensor) -> None:
        super().__init__()
        self.problem = [problem]  # in a list: its network is no submodule, parameters are handed over by name
        self.rho = problem.schedule.rho(times).float()
        # torchdiffeq hands times over in y's dtype. Euler's method asks at nodes only, so each float32 rho
        # stands for its node's own t and alpha.
        alphas = problem.schedule.alpha(times).tolist()
        nodes = zip(self.rho.tolist(), times.tolist(), alphas, strict=True)
        self.nodes = {rho: (t, alpha) for rho, t, alpha in nodes}

    def forward(self, rho: Tensor, y: Tensor) -> Tensor:
        (problem,) = self.problem
        t, alpha = self.nodes[rho.item()]
        x = alpha * y
        both = torch.cat([problem.uncond, problem.cond])
        times = torch.full((2,), t, device=x.device)
        uncond, cond = problem.network(torch.cat([x, x]), times, both).chunk(2)
        return uncond + GUIDANCE * (cond - uncond)


def torchdiffeq(problem: Problem, steps: int) -> Tensor:
    """torchdiffeq's continuous adjoint, Euler, with all nodes as output times (its adjoint then starts every
    interval at the forward pass's own state, which is the more accurate of its two ways)."""
    from torchdiffeq import odeint_adjoint

    times = problem.times(steps)
    form = ExponentialForm(problem, times)
    alpha = [float(problem.schedule.alpha(t)) for t in (times[0], times[-1])]
    shared = tuple(problem.leaves[1:])
    y = odeint_adjoint(
        form, problem.x_T / alpha[0], form.rho.to(problem.x_T.device), method="euler", adjoint_params=shared
    )
    return alpha[1] * y[-1]


def method(name: str, budget: int | None = None) -> Method:
    """The method of that name; a rung of the ladder needs its budget in bytes."""
    if name in LADDER:
        if budget is None:
            raise ValueError(f"{name} needs a budget")
        return exact(budget)
    return {
        "plain": plain,
        "exact-min": exact("min"),
        "exact-max": exact("max"),
        "checkpoint": per_call_checkpoint,
        "torchdiffeq": torchdiffeq,
    }[name]
