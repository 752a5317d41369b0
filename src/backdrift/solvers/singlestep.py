"""DPM-Solver-2 and -3 (Lu et al. 2022, Algorithms 1 and 2) and DPM-Solver++(2S), (3S).

Both families freeze what is not the network's (noise in DPM-Solver, the clean sample in DPM-Solver++) and integrate
the rest exactly in lam = log(alpha/sigma), over which the prediction is taken to be a polynomial. In a form's variables
dY/ds = k with log s = -lam (exponential form, k = eps) or +lam (data form, k = x0), so one formula serves both:
with L = log(s_b/s_a), stages at s_a e^{rL}, and

    m(z) = ∫ τ e^{zτ} dτ / ∫ e^{zτ} dτ over [0, 1] = 1/(1 - e^{-z}) - 1/z,

where a polynomial's linear part counts m, a step from Y is

    order 2, r1 = 1/2:           Y' = Y + h (k_1 + (k_2 - k_1) / (2 r1))
    order 3, r1 = 1/3, r2 = 2/3: Y' = Y + h (k_1 + (k_3 - k_1) m(L)/r2),
                                 k_3 at Y + h_2 (k_1 + (k_2 - k_1) m(r2 L) r2/r1),   h_2 = s_a (e^{r2 L} - 1)

and the first stages are Euler steps. That is an explicit Runge–Kutta step whose tableau depends on L alone.
"""

from __future__ import annotations

from ..errors import InputError
from ..forms import Node
from ..scalars import expm1, log
from .base import Solver
from .runge_kutta import Euler, RungeKutta, Tableau


class DPMSolver(RungeKutta):
    """DPM-Solver-2 or -3, singlestep (Lu et al. 2022); on the data form DPM-Solver++(2S) or (3S).

    A step to sigma = 0 or from alpha = 0, infinitely long in lam, is taken by Euler's method (DDIM).

    Args:
        order: 2 (two evaluations a step) or 3 (three).

    Raises:
        InputError: another order. (Order 1 is Euler.)
    """

    forms = ("exponential", "data")
    default_form = "exponential"

    def __init__(self, order: int = 2) -> None:
        if order not in (2, 3) or isinstance(order, bool):
            raise InputError(f"DPMSolver has orders 2 and 3; got {order!r} (order 1 is Euler, DDIM)")
        self.order = self.stages = order

    def __repr__(self) -> str:
        return f"DPMSolver({self.order})"

    def spans(self, a: Node, b: Node) -> bool:
        return a.s > 0 and b.s > 0

    @property
    def aside(self) -> Solver:
        return Euler()

    def tableau_at(self, a: Node, b: Node) -> Tableau:
        """The step's coefficients in the form's clock.

        Raises:
            InputError: the clock is 0 at an end, so lam is infinite there.
        """
        if not self.spans(a, b):
            raise InputError(
                f"{self!r} steps in log(alpha/sigma), which is infinite at t = {a.t if a.s == 0 else b.t:g}; "
                "Euler() takes such a step"
            )
        length = log(b.s / a.s)
        if self.order == 2:
            c = _reached(1 / 2, length)
            return Tableau(((), (c,)), (0.0, 1.0), (0.0, c))
        one, two = _reached(1 / 3, length), _reached(2 / 3, length)
        inner, outer = two * 2 * _mean(2 / 3 * length), 1.5 * _mean(length)
        return Tableau(((), (one,), (two - inner, inner)), (1 - outer, 0.0, outer), (0.0, one, two))


def _reached(r: float, length: float) -> float:
    """The part of a step in s that is done when the part ``r`` of it is done in log s."""
    return expm1(r * length) / expm1(length)


def _mean(z: float) -> float:
    """m(z) of the module's text."""
    if abs(z) < 1e-2:  # the two terms cancel
        return 1 / 2 + z / 12 - z**3 / 720
    return -1 / expm1(-z) - 1 / z
