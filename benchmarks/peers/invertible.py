"""An invertible gradient as DOODL has it (Wallace et al. 2023): EDICT's coupled steps, undone one by one.

Nothing of the forward pass is kept but the last pair. The way back undoes a step by its inverse without a graph (two
evaluations), computes it again with one (two more), and pulls the gradient through it (two products).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .equation import Equation
from .method import Method, of_torch
from .work import Work

P = 0.93  # the published mixing weight


def _step(equation: Equation, n: int, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the pair; the two change roles at every step, as in the authors' code."""
    s, h = equation.nodes[n], (equation.nodes[n + 1] - equation.nodes[n]).to(y)
    one, two = (z, y) if n % 2 else (y, z)
    one = one + h * equation(s, two)
    two = two + h * equation(s, one)
    one = P * one + (1 - P) * two
    two = P * two + (1 - P) * one
    return (two, one) if n % 2 else (one, two)


def _undo(equation: Equation, n: int, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The pair before the step."""
    s, h = equation.nodes[n], (equation.nodes[n + 1] - equation.nodes[n]).to(y)
    one, two = (z, y) if n % 2 else (y, z)
    two = (two - (1 - P) * one) / P
    one = (one - (1 - P) * two) / P
    two = two - h * equation(s, one)
    one = one - h * equation(s, two)
    return (two, one) if n % 2 else (one, two)


class _Undone(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, equation: Equation, y: Tensor, *shared: Tensor) -> Tensor:
        ctx.equation, ctx.shared = equation, shared
        pair = (y, y)
        for n in range(len(equation.nodes) - 1):
            pair = _step(equation, n, *pair)
        ctx.pair = pair
        return pair[0].clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        equation, shared, pair = ctx.equation, ctx.shared, ctx.pair
        grads = (g, torch.zeros_like(g))
        totals: list[Tensor | None] = [None] * len(shared)
        for n in reversed(range(len(equation.nodes) - 1)):
            pair = _undo(equation, n, *pair)
            with torch.enable_grad():
                inputs = tuple(v.detach().requires_grad_() for v in pair)
                outputs = _step(equation, n, *inputs)
            on_y, on_z, *on_shared = torch.autograd.grad(
                outputs, (*inputs, *shared), grads, allow_unused=True
            )
            grads = (on_y, on_z)
            for i, found in enumerate(on_shared):
                if found is not None:
                    before = totals[i]
                    totals[i] = found if before is None else before.add_(found)
        return (None, grads[0] + grads[1], *totals)


def edict(clock: str = "rho", rule: str = "logsnr") -> Callable[[Work, float], Tensor]:
    """A run with a number of steps."""

    def run(work: Work, steps: float) -> Tensor:
        equation = Equation(work, clock, work.nodes(int(steps), rule))
        return equation.finish(_Undone.apply(equation, equation.begin(), *work.shared))

    return run


def methods() -> list[Method]:
    """The one setting."""
    return [of_torch("DOODL", "invertible gradient", "EDICT", edict(), sampler="EDICT")]
