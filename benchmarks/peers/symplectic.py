"""The symplectic adjoint as it is published, by its formulas: stored step states, stages computed twice.

Written from Matsubara et al. 2021 (and what SAG runs): the forward pass keeps the state of every step. The way back
first computes a step's stages without a graph, then evaluates each stage once more with one, for the partner's
vector–Jacobian product: one evaluation more per stage than are needed. Gradients of shared tensors are added out of
place, step by step, as the published implementation adds them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .equation import Equation
from .method import Method, of_torch
from .work import Work


class Tableau(NamedTuple):
    """An explicit Runge–Kutta method."""

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]


TABLEAUS = {
    "Euler": Tableau(((),), (1.0,), (0.0,)),
    "Heun": Tableau(((), (1.0,)), (0.5, 0.5), (0.0, 1.0)),
    "RK4": Tableau(
        ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), (0.0, 0.5, 0.5, 1.0)
    ),
}


class _Stored(torch.autograd.Function):
    """The whole run as one node of the graph."""

    @staticmethod
    def forward(ctx: Any, equation: Equation, tableau: Tableau, y: Tensor, *shared: Tensor) -> Tensor:
        ctx.equation, ctx.tableau, ctx.shared = equation, tableau, shared
        ctx.states = []
        clocks = equation.nodes
        for n in range(len(clocks) - 1):
            ctx.states.append(y)
            h, slopes = clocks[n + 1] - clocks[n], list[Tensor]()
            for i in range(len(tableau.b)):
                slopes.append(equation(_clock(clocks, n, tableau.c[i]), _stage(y, h, tableau.a[i], slopes)))
            y = _stage(y, h, tableau.b, slopes)
        return y

    @staticmethod
    def backward(ctx: Any, p: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        equation, tableau, shared = ctx.equation, ctx.tableau, ctx.shared
        clocks, totals = equation.nodes, [torch.zeros_like(w) for w in shared]
        for n in reversed(range(len(ctx.states))):
            h, y = clocks[n + 1] - clocks[n], ctx.states[n]
            states, slopes = list[Tensor](), list[Tensor]()
            for i in range(len(tableau.b)):
                states.append(_stage(y, h, tableau.a[i], slopes))
                slopes.append(equation(_clock(clocks, n, tableau.c[i]), states[-1]))
            pulled: dict[int, Tensor] = {}
            added = [torch.zeros_like(w) for w in shared]
            for i in reversed(range(len(tableau.b))):
                moved = h.to(p) * tableau.b[i] * p
                for j, g in pulled.items():
                    moved = moved + h.to(p) * tableau.a[j][i] * g
                with torch.enable_grad():
                    state = states[i].detach().requires_grad_()
                    slope = equation(_clock(clocks, n, tableau.c[i]), state)
                pulled[i], *on_shared = torch.autograd.grad(slope, (state, *shared), moved, allow_unused=True)
                added = [a if g is None else a + g for a, g in zip(added, on_shared, strict=True)]
            p = p + sum(pulled.values())
            totals = [t + a for t, a in zip(totals, added, strict=True)]
        return (None, None, p, *totals)


def _clock(clocks: Tensor, n: int, c: float) -> Tensor:
    """The clock of a stage of step ``n``; a node's own where it is one."""
    return clocks[n] if c == 0 else clocks[n + 1] if c == 1 else torch.lerp(clocks[n], clocks[n + 1], c)


def _stage(y: Tensor, h: Tensor, row: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    for weight, slope in zip(row, slopes, strict=False):
        if weight != 0:
            y = y + h.to(y) * weight * slope
    return y


def stored_symplectic(
    tableau: str, clock: str = "rho", rule: str = "logsnr"
) -> Callable[[Work, float], Tensor]:
    """A run with a number of steps."""

    def run(work: Work, steps: float) -> Tensor:
        equation = Equation(work, clock, work.nodes(int(steps), rule))
        return equation.finish(_Stored.apply(equation, TABLEAUS[tableau], equation.begin(), *work.shared))

    return run


def methods() -> list[Method]:
    """All settings."""
    name = "symplectic adjoint, stored states"
    found = [of_torch("published", name, t, stored_symplectic(t), sampler=t) for t in TABLEAUS]
    uniform = stored_symplectic("RK4", "time", "uniform")
    return [*found, of_torch("published", name, "RK4, original form, uniform t", uniform)]
