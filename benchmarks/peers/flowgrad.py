"""FlowGrad's sweep over stored states (Liu et al. 2023), by its formulas.

Euler's steps y_{n+1} = y_n + h_n f(y_n, s_n) are stored. The way back is g_n = g_{n+1} + H g_{n+1}·∂f/∂y (y_n, s_n),
one evaluation and one product per node gone through. With a threshold, steps over which the slope hardly changes are
joined: the relative change of slope to the neighbours, ‖f_{n±1} - f_n‖²/‖f_n‖², whichever is larger, is added up, and
a joined step of length H ends where the sum passes the threshold. Without one (0) the sweep is exact for Euler's.

The paper's gradient is that by the state; the same products give those by shared tensors, and they are added here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .equation import Equation
from .method import Method, of_torch
from .work import Work


class _Sweep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, equation: Equation, threshold: float, y: Tensor, *shared: Tensor) -> Tensor:
        ctx.equation, ctx.shared = equation, shared
        clocks, states, slopes = equation.nodes, [y], list[Tensor]()
        for s, after in itertools.pairwise(clocks):
            slope = equation(s, states[-1])
            if threshold > 0:
                slopes.append(slope)
            states.append(states[-1] + (after - s).to(y) * slope)
        count = len(clocks) - 1
        ctx.firsts = _joined(slopes, threshold) if threshold > 0 else list(range(count))
        ctx.states = {n: states[n] for n in ctx.firsts}
        return states[-1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        equation, shared, clocks = ctx.equation, ctx.shared, ctx.equation.nodes
        totals: list[Tensor | None] = [None] * len(shared)
        ends = [*ctx.firsts[1:], len(clocks) - 1]
        for n, end in zip(reversed(ctx.firsts), reversed(ends), strict=True):
            with torch.enable_grad():
                state = ctx.states[n].detach().requires_grad_()
                slope = equation(clocks[n], state)
            on_state, *on_shared = torch.autograd.grad(
                slope, (state, *shared), (clocks[end] - clocks[n]).to(g) * g, allow_unused=True
            )
            g = g + on_state
            for i, found in enumerate(on_shared):
                if found is not None:
                    before = totals[i]
                    totals[i] = found if before is None else before.add_(found)
        return (None, None, g, *totals)


def _joined(slopes: list[Tensor], threshold: float) -> list[int]:
    """The first node of every joined step."""
    change = [float((b - a).square().sum() / a.square().sum()) for a, b in itertools.pairwise(slopes)]
    back = [float((b - a).square().sum() / b.square().sum()) for a, b in itertools.pairwise(slopes)]
    firsts, total = [0], 0.0
    for n in range(len(slopes)):
        total += max(change[n] if n < len(change) else 0.0, back[n - 1] if n > 0 else 0.0)
        if total > threshold and n + 1 < len(slopes):
            firsts.append(n + 1)
            total = 0.0
    return firsts


def sweep(threshold: float, clock: str = "rho", rule: str = "logsnr") -> Callable[[Work, float], Tensor]:
    """A run with a number of steps."""

    def run(work: Work, steps: float) -> Tensor:
        equation = Equation(work, clock, work.nodes(int(steps), rule))
        return equation.finish(_Sweep.apply(equation, threshold, equation.begin(), *work.shared))

    return run


def methods() -> list[Method]:
    """All settings; 5e-3 is the authors' threshold."""
    name, found = "stored-state sweep", []
    for threshold, shown in ((0.0, "Euler, every step"), (5e-3, "Euler, straight steps joined")):
        found.append(of_torch("FlowGrad", name, shown, sweep(threshold), sampler="Euler"))
        uniform = sweep(threshold, "time", "uniform")
        found.append(of_torch("FlowGrad", name, f"{shown}, original form, uniform t", uniform))
    return found
