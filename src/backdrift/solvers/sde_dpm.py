"""SDE-DPM-Solver++ (Lu et al. 2022, DPM-Solver++, Section 5), with a noise level.

With h the step in lam = log(alpha/sigma), the SDE's linear part and its noise integrated exactly,

    x_b = sigma_b/sigma_a e^{-eta² h} x_a + alpha_b (1 - e^{-(1 + eta²) h}) D + sigma_b sqrt(1 - e^{-2 eta² h}) noise

where D = x0_a (one step), or x0_a + (x0_a - x0_before) h / (2 h_before), two points' estimate at the middle (2M).
"""

from __future__ import annotations

import math

from torch import Tensor

from ..errors import InputError
from ..forms import Form, Node
from .base import add_scaled
from .stochastic import StochasticSolver, StochasticStepper, decay


class SDEDPMSolverPP(StochasticSolver):
    """SDE-DPM-Solver++, first order or 2M: one evaluation a step, on the data form.

    With ``eta=0`` the second is DPM-Solver++(2M). Its first step, and a last step to sigma = 0, are of first order.
    The strong order is 1 for both; 2M has means and variances of second order.

    Args:
        solver_order: 1 or 2.
        eta: noise level >= 0: 1 is the reverse SDE (diffusers' ``sde-dpmsolver++``). The square root of the ``eta`` of
            k-diffusion's ``sample_dpmpp_2m_sde``.

    Raises:
        InputError: another order or level.
    """

    forms = ("data",)
    default_form = "data"

    def __init__(self, solver_order: int = 2, eta: float = 1.0) -> None:
        super().__init__(eta)
        if solver_order not in (1, 2) or isinstance(solver_order, bool):
            raise InputError(f"SDEDPMSolverPP has solver_order 1 and 2; got {solver_order!r}")
        self.solver_order = solver_order

    def __repr__(self) -> str:
        return f"SDEDPMSolverPP({self.solver_order}, eta={self.eta:g})"

    def begin(self) -> StochasticStepper:
        return _Run(self.solver_order, self.eta)


class _Run(StochasticStepper):
    def __init__(self, solver_order: int, eta: float) -> None:
        self.solver_order, self.level = solver_order, eta**2
        self.before: tuple[float, Tensor] | None = None

    def moments(self, form: Form, x: Tensor, a: Node, b: Node) -> tuple[Tensor, float]:
        sigma_a, (alpha_b, sigma_b) = form.scales(a.t)[1], form.scales(b.t)
        sample, shrink = form.denoised(x, a.t), decay(form, a, b)
        h = -math.log(shrink) if shrink > 0 else math.inf  # no signal at all at ``a``: infinitely long
        slope = 0.0
        if self.before is not None and math.isfinite(self.before[0]):
            slope = h / self.before[0] / 2
        weights = [(1 + slope, sample)]
        if self.before is not None and slope != 0:
            weights.append((-slope, self.before[1]))
        if self.solver_order == 2:
            self.before = (h, sample)
        scale = -alpha_b * math.expm1(-(1 + self.level) * h)
        mean = x * (sigma_b / sigma_a * math.exp(-self.level * h) if self.level else sigma_b / sigma_a)
        mean = add_scaled(mean, [(scale * weight, k) for weight, k in weights])
        return mean, sigma_b * math.sqrt(-math.expm1(-2 * self.level * h)) if self.level else 0.0
