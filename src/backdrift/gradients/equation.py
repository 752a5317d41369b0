"""The adjoint equation as something that a solver can be run on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..forms import Form
from ..scalars import add_scaled, rescaled
from ..solvers import AdaptiveDormandPrince, Solver
from ..solvers.adaptive import accepted_steps
from .accumulate import Sums
from .attempts import Attempts
from .calls import Calls
from .legs import Leg
from .paths import StoredPath, interval_of
from .quadrature import Evaluations
from .sweep import ADJOINT, Task

# Where an evaluation's part of the shared tensors' sums goes to, and its weight there; None if it has none.
Share = Callable[[], tuple[Sums, float] | None]


def _nowhere() -> None:
    return None


def _in_turn(sums: Sums, weights: Sequence[float]) -> Share:
    left = iter(weights)
    return lambda: (sums, next(left))


class AdjointForm(Form):
    """dp/ds = -scale (on_x p + on_output p · ∂out/∂x) along a leg: for p alone, or for (Y, p).

    The state is p of x's shape where the path is stored, else Y and p stacked, (2, B, …). Both are the form's own
    variables, so the scale is 1. Each evaluation is one network call and one vector–Jacobian product, which
    also gives the shared tensors' part.

    Args:
        form: the form.
        leg: the leg.
        times: the run's falling nodes.
        path: the stored path; None to solve for Y alongside.
        calls: makes the evaluations.
        task: the backward pass.
    """

    def __init__(
        self,
        form: Form,
        leg: Leg,
        times: Sequence[float],
        path: StoredPath | None,
        calls: Calls,
        task: Task,
    ) -> None:
        super().__init__(form.name, form.schedule, form.prediction)
        self.own, self.leg, self.run_times, self.path, self.calls = form, leg, times, path, calls
        self.task = task
        self._share: Share = _nowhere

    def scale(self, t: float) -> float:
        return 1.0

    def solve(self, solver: Solver, times: Sequence[float], z: Tensor, evaluations: Evaluations) -> Tensor:
        """The state at the last of the rising ``times`` from ``z`` at the first; adds to the shared tensors' sums.

        Args:
            evaluations: the solver's on these times.
        """
        self._share = _nowhere if self.task.sums is None else _in_turn(self.task.sums, evaluations.weights)
        stepper, nodes = solver.begin(), [self.own.node(t) for t in times]
        for a, b in itertools.pairwise(nodes):
            z = stepper.step(self, z, a, b)
        return z

    def adaptively(
        self,
        solver: AdaptiveDormandPrince,
        times: Sequence[float],
        z: Tensor,
        first_step: float | None = None,
    ) -> Tensor:
        """The same by steps that the solver chooses between the rising ``times``; each evaluation is made once.

        Args:
            first_step: size of the first attempt in the clock; None to look for one.
        """
        # The equation is linear in p and the tolerance is not, so p is brought to the size of 1.
        parts = (z if self.path is None else z[None]).clone()
        size = float(parts[-1].square().mean().sqrt()) or 1.0
        parts[-1] /= size
        state, form = parts.reshape(z.shape), self.own
        attempts = None if self.task.sums is None else Attempts(self.task.sums, size)
        self._share = _nowhere if attempts is None else attempts.next
        for low, high in itertools.pairwise(times):
            found = accepted_steps(
                self.clocked(low, high), state, form.node(low).s, form.node(high).s,
                rtol=solver.rtol, atol=solver.atol, first_step=first_step, max_steps=solver.max_steps,
                witness=attempts,
            )  # fmt: skip
            state, first_step = found.states[-1], found.last
        parts = state.reshape(parts.shape).clone()
        parts[-1] *= size
        return parts.reshape(z.shape)

    def clocked(self, low: float, high: float) -> Callable[[float, Tensor], Tensor]:
        """The drift as a function of the clock, between two times whose clocks are met exactly."""
        ends = {self.own.node(t).s: t for t in (low, high)}
        return lambda s, z: self.drift(z, ends[s] if s in ends else self.own.between(s).t)

    def drift(self, x: Tensor, t: float) -> Tensor:
        """d/ds of the state ``x`` (p, or Y and p) at time ``t``."""
        form, interval = self.own, self._interval(t)
        y, p = (None, x) if self.path is not None else (x[0], x[1])
        scale, (on_x, on_output) = form.scale(t), form.coefficients(t)
        if self.path is not None:
            state = self.path.at(t, interval)
        else:
            assert y is not None
            state = rescaled(y, scale)
        self.task.at(interval)
        evaluation = self.calls.again(state, t, interval)
        # The cotangent carries the weight of this evaluation in the sums, which therefore need no scaling.
        sums, weight = self._share() or (None, 0.0)
        weight = -weight
        sums = sums if weight != 0 else None
        pulled = evaluation.pull(rescaled(p, on_output * weight if sums is not None else on_output), sums)
        if sums is not None:
            pulled = pulled / weight
        slope = rescaled(add_scaled(pulled, [(on_x, p)]), -scale)
        self.task.see(ADJOINT, slope)
        if self.path is not None:
            self.path.note(t, interval, evaluation.out)
            return slope
        return torch.stack([add_scaled(rescaled(evaluation.out, on_output), [(on_x, state)]), slope])

    def _interval(self, t: float) -> int:
        return min(max(interval_of(self.run_times, t), self.leg.first), self.leg.last - 1)
