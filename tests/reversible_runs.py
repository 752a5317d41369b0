"""The reversible solvers, and guided runs of a toy network on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import backdrift as bd
from backdrift.gradients import GradientMethod
from backdrift.solvers import RK4, Euler, Midpoint, ReversibleSolver
from problems import ToyNetwork, toy_denoiser, toy_inputs

SOLVERS: dict[str, ReversibleSolver] = {
    "MF(Euler)": bd.McCallumFoster(Euler()),
    "MF(Heun)": bd.McCallumFoster(),
    "MF(Midpoint)": bd.McCallumFoster(Midpoint()),
    "MF(RK4)": bd.McCallumFoster(RK4()),
    "EDICT": bd.EDICT(),
    "ReversibleHeun": bd.ReversibleHeun(),
}


def grid(steps: int) -> bd.TimeGrid:
    return bd.TimeGrid("logsnr", steps, start=1.0, end=0.02)


def gradients(
    gradient: GradientMethod,
    solver: ReversibleSolver,
    steps: int = 10,
    *,
    network: Any = None,
    dtype: torch.dtype = torch.float64,
    trajectory: bool = False,
    guidance_scale: float = 3.0,
) -> tuple[bd.Solution, list[Tensor]]:
    """A guided run of the toy network, differentiated by a pair, both conditionings and all weights; with the
    trajectory also by a pair on the way."""
    network = network if network is not None else ToyNetwork(dtype=torch.float64).to(dtype)
    x, cond = toy_inputs(dtype)
    _, uncond = toy_inputs(dtype)
    uncond["prompt"] = -uncond["prompt"]
    leaves = [x, 0.9 * x, cond["prompt"], cond["more"][0], uncond["prompt"]]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    leaves += list(network.parameters())
    model = toy_denoiser(network, guidance_scale=guidance_scale, uncond=uncond)
    pair = bd.Pair(leaves[0], leaves[1])
    solution = bd.sample(
        model, pair, cond, solver=solver, grid=grid(steps), gradient=gradient, trajectory=trajectory
    )
    assert solution.pair is not None
    loss = (solution.x0**3).sum() + solution.pair.second.sin().sum()
    if trajectory:
        assert solution.pairs is not None
        leaves += solution.pairs[steps // 2]
    return solution, list(torch.autograd.grad(loss, leaves))


def difference(found: list[Tensor], known: list[Tensor]) -> float:
    """The largest relative one, over all gradients."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, known, strict=True))
