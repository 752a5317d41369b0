"""AdjointDEIS: exponential integrators made for the continuous adjoint equation (Blasingame & Liu 2024).

In lam = log(alpha/sigma), with a = dL/dx and eps the noise prediction, from the clean side s to the noisier t,

    alpha_t a_t = alpha_s a_s + ∫ V e^{-lam} dlam,     V = alpha² a · ∂eps/∂x        (from lam_s to lam_t)
    L_c(t)      = L_c(s)      + ∫ V_c e^{-lam} dlam,   V_c = alpha a · ∂eps/∂c       (weights alike)

where the linear part is exact and V is a polynomial in lam. With h = lam_t - lam_s < 0, I0 = e^{-lam_t} (e^h - 1) and
I1 = I0 - e^{-lam_t} h the integrals are

    order 1:    I0 V_s                                      V frozen at s
    order 2M:   I0 V_s + I1 (V_s - V_r)/(lam_s - lam_r)     r the node before s; the first step is of order 1
    order 2S:   I0 V_s + I1 (V_m - V_s)/(lam_m - lam_s)     m inside the step, a_m by order 1; lam_m = lam_s + r h

On the diffusion SDE of noise level eta the noise is additive, so along the same path the adjoint obeys the same
equation with 1 + eta² times the network's term: twice V for the reverse SDE (their Theorem 3.1). V is then taken along
a Brownian path, which is only Hölder-1/2: every variant is of strong order 1, and order 2 lowers the constant.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..errors import InputError
from ..scalars import add_scaled, rescaled
from ..solvers import State
from .base import GradientMethod, Job
from .calls import Evaluation
from .legs import usable
from .partner import own_step
from .stochastic_step import StepNoise, StochasticOwnStep, check_noise, noise_level
from .sweep import ADJOINT, Record, Task, WayBack

Variant = Literal["M", "S"]
Trajectory = Literal["stored", "recompute"]


class AdjointDEIS(GradientMethod):
    """The gradient of the ODE's true flow by AdjointDEIS, on the run's own nodes; with a stochastic solver that of the
    SDE's solution along the run's own noise.

    Like :class:`~backdrift.gradients.ContinuousAdjoint` it approaches the flow's gradient, at the least of its own
    order and the forward solver's, and is not the gradient of the steps taken. Order 1 with stored states *is*
    ``ContinuousAdjoint(Euler(), "exponential")``.

    Args:
        order: 1 or 2.
        variant: of order 2: ``"M"``, multistep (one vector–Jacobian product a step), or ``"S"``, singlestep (two).
        r: where the singlestep variant's inner point lies in the step, 0 < r <= 1 in lam. At 1 it is the step's end,
            and both products of a node share one network call.
        trajectory: ``"stored"``: the states at the nodes are kept. ``"recompute"``: only the last one, and the states
            are solved back by the same formulas (order 1 or 2), on the SDE with the same noise.

    Beside an end where lam is infinite or the network cannot be asked, the interval's own step is differentiated,
    exactly.

    Raises:
        InputError: an argument cannot be used; when a run begins, if the conditioning changes from step to step and
            ``variant`` is ``"M"``.
        MissingGradientError: when a run begins, if its noises require grad.
    """

    def __init__(
        self, order: int = 2, variant: Variant = "M", r: float = 1.0, trajectory: Trajectory = "stored"
    ) -> None:
        if order not in (1, 2) or isinstance(order, bool):
            raise InputError(f"AdjointDEIS has orders 1 and 2; got {order!r}")
        if variant not in ("M", "S"):
            raise InputError(f"variant is 'M' (multistep) or 'S' (singlestep); got {variant!r}")
        if isinstance(r, bool) or not isinstance(r, int | float) or not 0 < r <= 1:
            raise InputError(f"r is a number above 0 and at most 1; got {r!r}")
        if trajectory not in ("stored", "recompute"):
            raise InputError(f"trajectory is 'stored' or 'recompute'; got {trajectory!r}")
        self.order, self.variant, self.r, self.trajectory = order, variant, float(r), trajectory

    def __repr__(self) -> str:
        return f"AdjointDEIS({self.order}, {self.variant!r}, r={self.r:g}, trajectory={self.trajectory!r})"

    by_times = True

    def run(self, job: Job) -> Iterator[State]:
        check_noise(job.plan, "AdjointDEIS")
        return _DEISRun(job, self).states()


@dataclass(frozen=True)
class _Past:
    """What the multistep variant knows of the node before.

    Attributes:
        lam: of that node.
        on_p, eps: V and eps there.
        handed: the adjoint that the sweep arrived with at the present node, and its version.
    """

    lam: float
    on_p: Tensor
    eps: Tensor
    handed: Tensor
    version: int

    def fresh(self, adjoint: Tensor) -> Tensor | None:
        """What has been added to the adjoint since, by a loss on the state in between; None if nothing."""
        same = adjoint.data_ptr() == self.handed.data_ptr() and adjoint._version == self.version
        return None if same else adjoint - self.handed


class _DEISRun(WayBack):
    """One run. ``factor`` is that of the network's term: 1 for the ODE."""

    def __init__(self, job: Job, method: AdjointDEIS) -> None:
        super().__init__(job, repr(method))
        self.method, self.stored = method, method.trajectory == "stored"
        self.factor = 1.0 + noise_level(self.plan) ** 2
        self.noise = StepNoise(self.plan, job.x)
        self.two_m = method.order == 2 and method.variant == "M"
        self.two_s = method.order == 2 and method.variant == "S"
        if self.two_m and self.calls.varies:
            raise InputError(
                "the multistep variant extrapolates over nodes at which this conditioning changes: use variant='S'"
            )
        self.form, times = self.plan.forms()["exponential"], self.plan.times
        good = [usable(self.form, job.model, t) and self.form.node(t).s > 0 for t in times]
        self.regular = [a and b for a, b in itertools.pairwise(good)]
        self.lam = [
            -math.log(self.form.node(t).s) if ok else math.nan for t, ok in zip(times, good, strict=True)
        ]

    def keep(self, index: int, start: Tensor, end: Tensor) -> Record:
        record: Record = {}
        if self.stored or not self.regular[index]:
            record["state", index] = start
        if self.stored or self.job.trajectory or index + 1 == len(self.regular):
            record["state", index + 1] = end
        return record

    def back(self, first: int, last: int, record: Record, adjoint: Tensor, task: Task) -> Tensor:
        x: Tensor | None = None
        for index in reversed(range(first, last)):
            task.at(index)
            if self.regular[index]:
                x = record.get(("state", index + 1), x)
                assert x is not None
                step = self._two_s if self.two_s else self._extrapolated
                adjoint, x = step(index, x, record.get(("state", index)), adjoint, task)
            else:
                x = record["state", index]
                own = StochasticOwnStep if self.noise.level else own_step
                adjoint = own(self.plan, index, self.calls).back(x, adjoint, task.sums)
                task.carry.clear()
            task.see(ADJOINT, adjoint)
        return adjoint

    def by_times(
        self, first: int, last: int, record: Record, ends: tuple[Tensor, Tensor], task: Task
    ) -> Tensor:
        return self.boundary_terms(first, last, record, ends)

    def _extrapolated(
        self, index: int, x: Tensor, before: Tensor | None, adjoint: Tensor, task: Task
    ) -> tuple[Tensor, Tensor | None]:
        """Orders 1 and 2M: from node ``index + 1``, where the state is ``x``, to ``index``."""
        t, past = self.plan.times[index + 1], task.carry.pop("past", None) if self.two_m else None
        now, old = self._weights(index)
        later = self._weights(index - 1)[1] if self.two_m and index > 0 and self.regular[index - 1] else 0.0
        plain = self._first_order(index)
        if past is None:
            now, old = plain, 0.0
        p = rescaled(adjoint, self.form.scale(t))
        fresh = past.fresh(adjoint) if past is not None else None
        evaluation = self.calls.again(x, t, index)
        velocity = self._velocity(evaluation, t, p, now + later, task, keep=fresh is not None)
        terms = [(now, velocity)]
        if past is not None:
            terms.append((old, past.on_p))
        if fresh is not None and plain != now:
            # A loss's own gradient at this node has no past: it starts with order 1.
            added = rescaled(fresh, self.form.scale(t))
            terms.append((plain - now, self._velocity(evaluation, t, added, plain - now, task)))
        p = add_scaled(p, terms)
        eps = self._eps(evaluation, x, t)
        noisy = self.plan.times[index]
        found = rescaled(p, 1 / self.form.scale(noisy))
        if self.two_m:
            task.carry["past"] = _Past(self.lam[index + 1], velocity, eps, found, found._version)
        if self.stored:
            return found, before
        y = add_scaled(rescaled(x, 1 / self.form.scale(t)), [(-now * self.factor, eps)])
        if past is not None:
            y = add_scaled(y, [(-old * self.factor, past.eps)])
        return found, rescaled(self.noise.taken(y, index), self.form.scale(noisy))

    def _two_s(
        self, index: int, x: Tensor, before: Tensor | None, adjoint: Tensor, task: Task
    ) -> tuple[Tensor, Tensor | None]:
        """Order 2S: from node ``index + 1``, where the state is ``x``, to ``index``."""
        form, r = self.form, self.method.r
        t, noisy = self.plan.times[index + 1], self.plan.times[index]
        middle = noisy if r == 1 else float(
            self.plan.schedule.t_from_lam(self.lam[index + 1] + r * (self.lam[index] - self.lam[index + 1]))
        )  # fmt: skip
        whole, rho = self._first_order(index), form.node(t).s
        part, slope = rho - form.node(middle).s, self._first_moment(index) / (r * self._length(index))
        evaluation = task.carry.pop("shared", None) or self.calls.again(x, t, index)
        p = rescaled(adjoint, form.scale(t))
        start = self._velocity(evaluation, t, p, whole - slope, task)
        y, eps = rescaled(x, 1 / form.scale(t)), self._eps(evaluation, x, t)
        shared = self.stored and r == 1 and not self.calls.varies
        if not self.stored:
            y_middle = self.noise.taken(add_scaled(y, [(-part * self.factor, eps)]), index, part / whole)
        elif r == 1:
            assert before is not None
            y_middle = rescaled(before, 1 / form.scale(noisy))
        else:
            assert before is not None
            w = part / whole  # the path between stored states, straight in rho
            y_middle = add_scaled(rescaled(y, 1 - w), [(w / form.scale(noisy), before)])
        x_middle = before if before is not None and shared else rescaled(y_middle, form.scale(middle))
        inner = self.calls.again(x_middle, middle, index)
        keep = shared and index > 0 and self.regular[index - 1]
        end = self._velocity(inner, middle, add_scaled(p, [(part, start)]), slope, task, keep=keep)
        if keep:
            task.carry["shared"] = inner
        p = add_scaled(p, [(whole - slope, start), (slope, end)])
        found = rescaled(p, 1 / form.scale(noisy))
        if self.stored:
            return found, before
        pair = ((slope - whole, eps), (-slope, self._eps(inner, x_middle, middle)))
        y = add_scaled(y, [(w * self.factor, k) for w, k in pair])
        return found, rescaled(self.noise.taken(y, index), form.scale(noisy))

    def _velocity(
        self, evaluation: Evaluation, t: float, p: Tensor, weight: float, task: Task, *, keep: bool = False
    ) -> Tensor:
        """V for the adjoint ``p / alpha``; adds V_c times ``weight`` to the shared tensors' sums."""
        on_x, on_output = self.form.coefficients(t)
        sums = task.sums if weight != 0 else None
        carried = self.factor * on_output * (weight if sums is not None else 1.0)
        pulled = evaluation.pull(rescaled(p, carried), sums, keep=keep)
        if sums is not None:
            pulled = pulled / weight
        return rescaled(add_scaled(pulled, [(self.factor * on_x, p)]), self.form.scale(t))

    def _eps(self, evaluation: Evaluation, x: Tensor, t: float) -> Tensor:
        on_x, on_output = self.form.coefficients(t)
        return add_scaled(rescaled(evaluation.out, on_output), [(on_x, x)])

    def _length(self, index: int) -> float:
        """h of the step to node ``index``."""
        return self.lam[index] - self.lam[index + 1]

    def _first_order(self, index: int) -> float:
        """I0 of the step to node ``index``."""
        return self.form.node(self.plan.times[index]).s * math.expm1(self._length(index))

    def _first_moment(self, index: int) -> float:
        """I1 of the step to node ``index``."""
        h = self._length(index)
        return self.form.node(self.plan.times[index]).s * (math.expm1(h) - h)

    def _weights(self, index: int) -> tuple[float, float]:
        """What V at node ``index + 1`` and at the node before it count in the step to node ``index``."""
        whole = self._first_order(index)
        if not self.two_m or index + 2 >= len(self.lam) or not self.regular[index + 1]:
            return whole, 0.0
        slope = self._first_moment(index) / (self.lam[index + 1] - self.lam[index + 2])
        return whole + slope, -slope
