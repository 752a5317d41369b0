"""The way back over a reversible run: kicks are undone, and the adjoints of the pair go along.

A kick ``target' = keep * target + mix * other + weight * push(other)`` is undone with the push it was made with, and
for g = dL/dY of the two

    g_other += mix * g_target + weight * g_target · ∂push/∂Y,   g_target = keep * g_target.

So each push is evaluated once, with its graph: its value rebuilds the target, its graph pulls the adjoint back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..forms import Form
from ..integrate import Plan
from ..solvers import Kick, Leg, Pair
from ..solvers.base import rescaled
from .accumulate import Sums
from .calls import Calls

# Which evaluation of the forward pass: its interval, and its number there.
Origin = tuple[int, int]


def origins(legs: Sequence[Leg]) -> dict[tuple[int, int], list[Origin]]:
    """The evaluations of each push, by the numbers of its leg and kick, in the order the forward pass makes them."""
    made: defaultdict[int, int] = defaultdict(int)
    found: dict[tuple[int, int], list[Origin]] = {}
    slope: list[Origin] = []
    for i, leg in enumerate(legs):
        for k, kick in enumerate(leg.kicks):
            if kick.weight == 0:
                continue
            interval, own = leg.conditioning(kick), slope if kick.shares else []
            fresh = kick.base.evaluations(0) - len(own)
            found[i, k] = own + [(interval, made[interval] + n) for n in range(fresh)]
            made[interval] += fresh
            slope = found[i, k][:1]
    return found


class Undoing:
    """A way back over a run's steps, from the last to the first.

    Args:
        plan: the run's.
        legs: its steps.
        calls: makes the evaluations again.
        sums: of the shared tensors' gradients.
        together: hold the graphs of all stages of a push; else make each stage a second time when it is its turn.
    """

    def __init__(
        self, plan: Plan, legs: Sequence[Leg], calls: Calls, sums: Sums | None, together: bool
    ) -> None:
        self.plan, self.legs, self.calls, self.sums, self.together = plan, legs, calls, sums, together
        self._origins = origins(legs)
        self._forms = plan.forms(self._evaluated)
        self._numbers: list[Origin] = []
        self._open: _OpenPushes | None = None

    def over(self, index: int, pair: Pair, adjoint: Pair) -> tuple[Pair, Pair]:
        """The pair and the adjoints dL/dx at the start of step ``index``, from those at its end.

        Where the step began with the slope that the one before ended with, what the slope hands back is still to
        come: it is counted in that one.
        """
        leg = self.legs[index]
        form, back = self._forms[leg.form], leg.inverse()
        ys = back.scaled(form, pair)
        scale = form.scale(leg.end.t)
        gs = [rescaled(g, scale) for g in adjoint]
        for k in reversed(range(len(leg.kicks))):
            kick, g = leg.kicks[k], gs[leg.kicks[k].target]
            push = None
            if kick.mix != 0:
                gs[kick.other] = gs[kick.other].add(g, alpha=kick.mix)
            if kick.weight != 0:
                push = self._push(form, kick, ys[kick.other], self._origins[index, k], kick.weight * g)
                # An earlier push began with the same slope, and nothing moved between: one product serves both.
                if not kick.shares:
                    gs[kick.other] = gs[kick.other] + self._close()
            gs[kick.target] = rescaled(g, kick.keep)
            ys[kick.target] = kick.inverse().moved(ys, push)
        scale = 1 / form.scale(leg.start.t)
        return back.unscaled(form, ys), Pair(rescaled(gs[0], scale), rescaled(gs[1], scale))

    def forward(self, pair: Pair) -> Iterator[Pair]:
        """The run's pairs again, from the first one on, after the first; without a graph."""
        run = self.plan.reversible().begin(pair)
        for index, leg in enumerate(self.legs):
            for k, kick in enumerate(leg.kicks):
                made = self._origins.get((index, k), [])
                self._numbers += made[1:] if kick.shares else made
            with torch.no_grad():
                yield run.take(self._forms[leg.form], leg)

    def _push(self, form: Form, kick: Kick, y: Tensor, numbers: list[Origin], cotangent: Tensor) -> Tensor:
        if self._open is None:
            self._open = _OpenPushes(y.detach().requires_grad_())
            self._numbers = list(numbers)
        else:
            self._numbers = numbers[1:]
        opened = self._open
        with torch.enable_grad():
            made, opened.slope = kick.push(form, opened.y, opened.slope)
        opened.pushes.append(made)
        opened.cotangents.append(cotangent)
        return made.detach()

    def _close(self) -> Tensor:
        """The product of the open pushes."""
        opened, self._open = self._open, None
        assert opened is not None
        (found,) = torch.autograd.grad(opened.pushes, opened.y, opened.cotangents)
        return found

    def _evaluated(self, x: Tensor, t: float) -> Tensor:
        """The next evaluation: differentiable by x where gradients are on, adding its products to the sums."""
        origin = self._numbers.pop(0)
        if not torch.is_grad_enabled():
            return self.calls.again(x, t, *origin).out
        # The last stage is the first that is differentiated.
        hold = self.together or not self._numbers
        return _Evaluated.apply(x, self.calls, t, origin, self.sums, hold)


class _OpenPushes:
    """Pushes that begin with one slope, not yet differentiated."""

    def __init__(self, y: Tensor) -> None:
        self.y = y
        self.slope: Tensor | None = None
        self.pushes: list[Tensor] = []
        self.cotangents: list[Tensor] = []


class _Evaluated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, calls: Calls, t: float, origin: Origin, sums: Sums | None, hold: bool
    ) -> Tensor:
        evaluation = calls.again(x, t, *origin)
        ctx.calls, ctx.t, ctx.origin, ctx.sums = calls, t, origin, sums
        ctx.evaluation = evaluation if hold else None
        ctx.save_for_backward(x)
        # Another tensor than the one that the evaluation holds, which would tie the graph in a cycle.
        return evaluation.out.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        evaluation = ctx.evaluation
        if evaluation is None:
            evaluation = ctx.calls.again(ctx.saved_tensors[0], ctx.t, *ctx.origin)
        return evaluation.pull(grads[0], ctx.sums), None, None, None, None, None
