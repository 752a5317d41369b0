"""DPM-Solver++(2M): Lu et al. 2022 (DPM-Solver++), Algorithm 2.

With lam = log(alpha/sigma), h = lam_{n+1} - lam_n and r = h_{n-1}/h_n a step is

    D = x0_n + (x0_n - x0_{n-1}) / (2 r),   x_{n+1} = sigma_{n+1}/sigma_n x_n + alpha_{n+1} (1 - e^{-h}) D,

which in the data form's variables is u_{n+1} = u_n + (omega_{n+1} - omega_n) D: Euler's method with an
extrapolated drift.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..forms import Form, Node
from ..scalars import finite, log
from .base import Solver, Stepper, add_scaled, rescaled
from .runge_kutta import Euler


class DPMSolverPP(Solver):
    """DPM-Solver++(2M), order 2, one evaluation a step; works on the data form. Its first step, and a last step
    to sigma = 0, are of first order (DDIM), as its authors' are."""

    order = 2
    forms = ("data",)
    default_form = "data"

    def begin(self) -> Stepper:
        return _MultistepRun()

    def evaluations(self, index: int) -> int:
        return 1

    @property
    def aside(self) -> Solver:
        return Euler()


class _MultistepRun(Stepper):
    def __init__(self) -> None:
        self.before: tuple[float, Tensor] | None = None

    def step(self, form: Form, x: Tensor, a: Node, b: Node) -> Tensor:
        sample = form.drift(x, a.t)
        lam = log(a.s) if a.s > 0 else -math.inf
        weights = [(1.0, sample)]
        # From omega = 0 (no signal at all) the previous step is infinitely long in lam, and r = inf.
        if self.before is not None and finite(self.before[0]):
            past_lam, past = self.before
            slope = (log(b.s) - lam) / (lam - past_lam) / 2
            weights = [(1 + slope, sample), (-slope, past)]
        self.before = (lam, sample)
        h = b.s - a.s
        y = add_scaled(rescaled(x, 1 / form.scale(a.t)), [(h * w, k) for w, k in weights])
        return rescaled(y, form.scale(b.t))
