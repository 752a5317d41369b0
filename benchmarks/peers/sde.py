"""The diffusion SDE of the mixture along one Brownian path, from rho = 1 to 0.1: torchsde's adjoints and ours.

(From purer noise the SDE forgets where it started, and single paths that choose between two components rule the error.)

In lam = log(alpha/sigma) and y = x/alpha the reverse SDE is

    dy = -2 rho eps dlam + sqrt(2) rho dW(lam),      rho = e^-lam,

with additive noise, so Itô's and Stratonovich's readings are one. Its gradient along a path is that of the solution
driven by it. Both packages step on the same nodes (equal steps in lam) along the same path: torchsde is given W's
increments, backdrift the noise of each of its steps, the normalised increment of ∫ sqrt(2) rho dW.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import backdrift as bd
from backdrift.gradients import GradientMethod
from backdrift.solvers import Solver

from .equation import Equation
from .method import Method, of_torch
from .problems import mixture
from .work import Work

RHO = (1.0, 0.1)
FINEST = 4096  # steps of the finest path; every other number divides it


def work() -> Work:
    """The mixture between the two ends."""
    made = mixture()
    made.start, made.end = (float(made.schedule.t_from_rho(rho)) for rho in RHO)
    return made


class Path:
    """W on the finest grid, and what coarser grids see of it."""

    def __init__(self, work: Work, finest: int = FINEST, seed: int = 3) -> None:
        low, high = (float(work.schedule.lam(t)) for t in (work.start, work.end))
        self.low, self.step, self.finest = low, (high - low) / finest, finest
        generator = torch.Generator().manual_seed(seed)
        self.normals = torch.randn(finest, *work.x_T.shape, generator=generator, dtype=torch.float64)
        lam = low + self.step * torch.arange(finest + 1, dtype=torch.float64)
        squares = torch.exp(-2 * lam)
        self.variances = squares[:-1] - squares[1:]

    def increment(self, s: float, later: float) -> Tensor:
        """W(later) - W(s); both are nodes of the finest grid."""
        first, last = (round((v - self.low) / self.step) for v in (s, later))
        return self.normals[first:last].sum(0) * math.sqrt(self.step)

    def noises(self, steps: int) -> Tensor:
        """The standard normal noise of each of so many steps, in rho² (steps, B, …)."""
        stride = self.finest // steps
        shape = (steps, stride, *self.normals.shape[1:])
        spread = self.variances.sqrt().view(-1, *[1] * (self.normals.ndim - 1))
        sums = (self.normals * spread).reshape(shape).sum(1)
        total = self.variances.reshape(steps, stride).sum(1).sqrt()
        return sums / total.view(-1, *[1] * (self.normals.ndim - 1))


@cache
def path() -> Path:
    """The path that all methods share."""
    return Path(work())


class Reverse(nn.Module):
    """The SDE for torchsde."""

    noise_type = "diagonal"

    def __init__(self, equation: Equation, sde_type: str) -> None:
        super().__init__()
        self._equation, self.sde_type = [equation], sde_type

    def f(self, s: Tensor, y: Tensor) -> Tensor:
        """The drift: twice the ODE's."""
        return 2 * self._equation[0](s, y)

    def g(self, s: Tensor, y: Tensor) -> Tensor:
        """The diffusion."""
        return torch.full_like(y, math.sqrt(2) * math.exp(-float(s)))


def _given(path: Path, like: Tensor) -> Any:
    """The path as torchsde wants it."""
    from torchsde import BaseBrownian

    class Given(BaseBrownian):
        dtype, device, shape, levy_area_approximation = like.dtype, like.device, like.shape, "none"

        def __call__(self, ta: Any, tb: Any = None, return_U: bool = False, return_A: bool = False) -> Tensor:
            return path.increment(float(ta), float(tb)).to(like)

        def __repr__(self) -> str:
            return "Given()"

    return Given()


def torchsde_adjoint(method: str, adjoint_method: str, sde_type: str) -> Callable[[Work, float], Tensor]:
    """A run with a number of steps."""

    def run(work: Work, steps: float) -> Tensor:
        from torchsde import sdeint_adjoint

        equation = Equation(work, "lam", work.nodes(int(steps)))
        first, last = (float(s) for s in equation.nodes[[0, -1]])
        ys = sdeint_adjoint(
            Reverse(equation, sde_type),
            equation.begin(),
            torch.tensor([first, last], dtype=torch.float64),
            bm=_given(path(), work.x_T),
            method=method,
            adjoint_method=adjoint_method,
            dt=(last - first) / int(steps),
            adjoint_params=work.shared,
        )
        return equation.finish(ys[-1])

    return run


def ours(solver: Solver, gradient: GradientMethod) -> Callable[[Work, float], Tensor]:
    """A run of backdrift's along the path."""

    def run(work: Work, steps: float) -> Tensor:
        return bd.sample(
            work.denoiser(),
            work.x_T,
            work.cond,
            solver=solver,
            grid=work.nodes(int(steps)),
            noise=path().noises(int(steps)),
            gradient=gradient,
        ).x0

    return run


def methods() -> list[Method]:
    """torchsde's and backdrift's."""
    found = [
        of_torch(
            "torchsde", "sdeint_adjoint", f"{method}, back by {back}", torchsde_adjoint(method, back, kind)
        )
        for method, back, kind in (
            ("euler", "euler", "ito"),
            ("midpoint", "midpoint", "stratonovich"),
            ("heun", "heun", "stratonovich"),
            ("reversible_heun", "adjoint_reversible_heun", "stratonovich"),
        )
    ]
    for name, solver in (
        ("exponential Euler", bd.ExponentialEuler()),
        ("SDE-DPM-Solver++(2M)", bd.SDEDPMSolverPP(2)),
    ):
        for label, gradient in (
            ('Exact("max")', bd.Exact("max")),
            ("AdjointDEIS-1", bd.AdjointDEIS(1)),
            ("AdjointDEIS-2M", bd.AdjointDEIS(2, "M")),
            ("AdjointDEIS-2S", bd.AdjointDEIS(2, "S")),
        ):
            found.append(of_torch("backdrift", label, name, ours(solver, gradient)))
    return found


def true_gradients(steps: int = FINEST) -> dict[str, Tensor]:
    """The gradients along the path, by plain autograd through Heun's method (trapezoidal in the drift, the noise of
    each step exact) with so many steps, written out here."""
    made = work()
    equation = Equation(made, "lam", made.nodes(steps))
    s, y, noises = equation.nodes, equation.begin(), path().noises(steps)
    squares = torch.exp(-2 * s)
    made.clear()
    for n in range(steps):
        h, noise = s[n + 1] - s[n], (squares[n] - squares[n + 1]).sqrt() * noises[n]
        k = equation(s[n], y)
        y = y + h * (k + equation(s[n + 1], y + 2 * h * k + noise)) + noise
    made.loss(equation.finish(y)).backward()
    return made.gradients()
