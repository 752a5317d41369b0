"""The adjoint equation as something that a solver can be run on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..forms import Form
from ..scalars import add_scaled, rescaled
from ..solvers import Solver
from .calls import Calls
from .legs import Leg
from .paths import StoredPath, interval_of
from .quadrature import Evaluations
from .sweep import ADJOINT, Task


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
        self.task, self._sums = task, task.sums
        self._weights: Iterator[float] = itertools.repeat(0.0)

    def scale(self, t: float) -> float:
        return 1.0

    def solve(self, solver: Solver, times: Sequence[float], z: Tensor, evaluations: Evaluations) -> Tensor:
        """The state at the last of the rising ``times`` from ``z`` at the first; adds to the shared tensors' sums.

        Args:
            evaluations: the solver's on these times.
        """
        self._weights = iter(evaluations.weights)
        stepper, nodes = solver.begin(), [self.own.node(t) for t in times]
        for a, b in itertools.pairwise(nodes):
            z = stepper.step(self, z, a, b)
        return z

    @contextmanager
    def without_sums(self) -> Iterator[None]:
        """Inside the block evaluations add nothing to the shared tensors' sums."""
        sums, self._sums = self._sums, None
        self._weights = itertools.repeat(0.0)
        try:
            yield
        finally:
            self._sums = sums

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
        weight = -next(self._weights) if self._sums is not None else 0.0
        sums = self._sums if weight != 0 else None
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
