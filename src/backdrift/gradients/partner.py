"""The partitioned partner of an explicit Runge–Kutta step: the exact gradient of the step, in its own notation.

A step of the method (a, b, c) on dY/ds = F(Y, s) from s_n, with h = s_{n+1} - s_n and stages Y_i, has the partner

    m_i = b_i p_{n+1} + h Σ_{j>i} a_ji g_j,   g_i = m_i · ∂F/∂Y (Y_i, s_n + c_i h),   i = s … 1
    p_n = p_{n+1} + h Σ_i g_i,                L_c += h Σ_i m_i · ∂F/∂c (Y_i, …)

for p = dL/dY. Nothing is divided by b_i, so a weight of 0 needs no case of its own; for b_i != 0 it is the partner
with B_i = b_i, Â_ij = b_j (1 - a_ji / b_i), which conserves p·δY for every variation δY (Sanz-Serna 2016; Matsubara
et al. 2021). For Euler's method it is symplectic Euler (SAG, Eqs. 7 and 8). A stage that no live stage uses and
whose own b_i is 0 has m_i = 0 and is left out (the last one of a method that is "first same as last").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..forms import Form
from ..integrate import Plan
from ..scalars import Scalar, add_scaled, rescaled
from ..solvers.runge_kutta import Euler, RungeKutta
from .accumulate import Sums
from .calls import Calls, Evaluation
from .numbers import Key, StepNumbers, dot


@dataclass(frozen=True)
class _Stage:
    """A stage with its graph: the state x, the evaluation, and the drift k_i."""

    state: Tensor
    evaluation: Evaluation
    drift: Tensor


class PartnerStep:
    """One step to go back over.

    Args:
        solver: the forward method.
        form: the form it was taken on; needs no model.
        start, end: the step's times; tensors () where gradients by them are wanted.
        calls: makes the evaluations.
        interval: the step's number in the run.

    Attributes:
        live: the stages that the result depends on.
        on_ends: the gradient by ``start`` and ``end``, float64 (2,), once the step has been gone over; where wanted.
    """

    def __init__(
        self, solver: RungeKutta, form: Form, start: Scalar, end: Scalar, calls: Calls, interval: int
    ) -> None:
        self.numbers = StepNumbers(solver, form, start, end)
        self.calls, self.interval, self.live = calls, interval, self.numbers.live
        self.on_ends: Tensor | None = None

    def back(self, x: Tensor, adjoint: Tensor, sums: Sums | None) -> Tensor:
        """dL/dx at the start from dL/dx at the end; the stages are computed again, each with its graph, and all are
        alive at once.

        Args:
            x: the state at the start.
            adjoint: at the end, of x's shape.
            sums: of the shared tensors' gradients.
        """
        n, stages = self.numbers, dict[int, _Stage]()
        y = rescaled(x, 1 / n.first)
        for i in self.live:
            inner = add_scaled(y, [(weight, stages[j].drift) for j, weight in n.rows[i].items()])
            stages[i] = self._stage(i, x if i == 0 else rescaled(inner, n.scales[i]))
        return self._sweep(x, adjoint, stages.pop, sums)

    def back_over(self, states: Sequence[Tensor], adjoint: Tensor, sums: Sums | None) -> Tensor:
        """The same from the stored states of the live stages: one stage's graph is alive at a time."""
        stored = dict(zip(self.live, states, strict=True))
        return self._sweep(states[0], adjoint, lambda i: self._stage(i, stored[i]), sums)

    def _sweep(self, x: Tensor, adjoint: Tensor, stage: Callable[[int], _Stage], sums: Sums | None) -> Tensor:
        n, found = self.numbers, dict[Key, Tensor]()
        p = rescaled(adjoint, n.last)
        pulled: dict[int, Tensor] = {}  # h g_i
        for i in reversed(self.live):
            at = stage(i)
            moved = rescaled(p, n.weights[i])  # h m_i = dL/dk_i
            moved = add_scaled(moved, [(n.rows[j][i], g) for j, g in pulled.items()])
            on_state = at.evaluation.pull(rescaled(moved, n.on_output[i]), sums)
            on_state = add_scaled(on_state, [(n.on_x[i], moved)])
            if n.timed:
                found |= self._by_numbers(i, at, p, moved, on_state, pulled)
                found["last", i] = n.weights[i] * dot(adjoint, at.drift)
            pulled[i] = rescaled(on_state, n.scales[i])
        total = add_scaled(p, [(1.0, g) for g in pulled.values()])
        if n.timed:
            found["last",] = dot(adjoint, x) / n.first + sum(found.pop(("last", i)) for i in self.live)
            found["first",] = -dot(total, x) / n.first**2
            self.on_ends = n.gradient(found)
        return rescaled(total, 1 / n.first)

    def _by_numbers(
        self, i: int, at: _Stage, p: Tensor, moved: Tensor, on_state: Tensor, pulled: dict[int, Tensor]
    ) -> dict[Key, Tensor]:
        """The gradients by the numbers of stage i."""
        return {
            ("weight", i): dot(p, at.drift),
            **{("row", j, i): dot(g, at.drift) for j, g in pulled.items()},
            ("on_x", i): dot(moved, at.state),
            ("on_output", i): dot(moved, at.evaluation.out),
            ("time", i): at.evaluation.on_t,
            ("scale", i): dot(on_state, at.state) / self.numbers.scales[i],
        }

    def _stage(self, i: int, state: Tensor) -> _Stage:
        n = self.numbers
        evaluation = self.calls.again(state, n.times[i], self.interval, number=i, timed=n.timed)
        drift = add_scaled(rescaled(evaluation.out, n.on_output[i]), [(n.on_x[i], state)])
        return _Stage(state, evaluation, drift)


def own_step(plan: Plan, interval: int, calls: Calls, *, timed: bool = False) -> PartnerStep:
    """The run's own step over an interval; Euler's from the same state where that was not a Runge–Kutta step.

    Args:
        timed: whether gradients by the step's times are wanted.
    """
    taken = plan.intervals[interval]
    solver = plan.solver.aside if taken.aside else plan.solver
    method = solver if isinstance(solver, RungeKutta) else Euler()
    start, end = plan.ends(interval) if timed else (taken.start, taken.end)
    return PartnerStep(method, plan.forms()[taken.form], start, end, calls, interval)
