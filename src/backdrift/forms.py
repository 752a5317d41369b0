"""The probability-flow ODE in its three forms: dY/ds = drift, Y = x / scale, s a clock.

| form | clock s | scale | drift | singular |
|---|---|---|---|---|
| ``"original"`` | t | 1 | alpha' x0 + sigma' eps = f x + g²/(2 sigma) eps | where alpha' or sigma' is infinite |
| ``"exponential"`` | rho = sigma/alpha | alpha | eps (AdjointDPM) | where alpha = 0 |
| ``"data"`` | omega = alpha/sigma | sigma | x0 (SAG's type 2) | where sigma = 0 |

For rectified flow the original form is dx/dt = u. Euler's method on the exponential, the data and the
rectified-flow form is DDIM. Each drift is ``on_x * x + on_output * output`` with two float64 numbers.

At a singular end a form steps aside for one interval: :meth:`Form.aside` gives a form that is regular there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .errors import InputError
from .noises import Draw
from .predictions import conversion
from .scalars import add_scaled, finite, number, rescaled
from .schedules import Flow, Schedule

Call = Callable[[Tensor, float], Tensor]

FORMS = ("original", "exponential", "data")


@dataclass(frozen=True)
class Node:
    """A point in time: ``t``, and the form's clock ``s`` there."""

    t: float
    s: float


class Form:
    """One form of the ODE for one model.

    Args:
        name: one of :data:`FORMS`.
        schedule: the forward process.
        prediction: what ``call`` returns.
        call: ``call(x, t)`` -> the network's output (guidance included), of x's shape. A form without one can
            be planned with, not stepped on.
        draw: the run's noise, for stochastic solvers.

    Raises:
        InputError: an unknown name.
    """

    def __init__(
        self,
        name: str,
        schedule: Schedule,
        prediction: str,
        call: Call | None = None,
        draw: Draw | None = None,
    ) -> None:
        if name not in FORMS:
            raise InputError(f"form must be one of {', '.join(FORMS)}; got {name!r}")
        self.name, self.schedule, self.prediction, self.call, self.draw = (
            name,
            schedule,
            prediction,
            call,
            draw,
        )
        self._scales: dict[float, tuple[float, float]] = {}

    def scales(self, t: float) -> tuple[float, float]:
        """alpha and sigma at ``t``. Each node is asked for several times, hence remembered."""
        if isinstance(t, Tensor):
            return self.schedule.alpha(t), self.schedule.sigma(t)
        if t not in self._scales:
            self._scales[t] = (float(self.schedule.alpha(t)), float(self.schedule.sigma(t)))
        return self._scales[t]

    def node(self, t: float) -> Node:
        """The point at time ``t``."""
        if self.name == "original":
            return Node(t, t)
        alpha, sigma = self.scales(t)
        above, below = (sigma, alpha) if self.name == "exponential" else (alpha, sigma)
        return Node(t, math.inf if below == 0 else above / below)

    def between(self, s: float) -> Node:
        """The point where the clock shows ``s``."""
        if self.name == "original":
            return Node(s, s)
        if self.name == "exponential":
            return Node(number(self.schedule.t_from_rho(s), s), s)
        return Node(number(self.schedule.t_from_rho(math.inf if s == 0 else 1 / s), s), s)

    def scale(self, t: float) -> float:
        """x = scale * Y."""
        if self.name == "original":
            return 1.0
        return self.scales(t)[0 if self.name == "exponential" else 1]

    def drift(self, x: Tensor, t: float) -> Tensor:
        """dY/ds at the state ``x`` (not Y) and time ``t``: one evaluation of the model.

        Raises:
            InputError: the drift is infinite there, or the prediction does not determine it.
        """
        return self._evaluate(self.coefficients(t), x, t)

    def denoised(self, x: Tensor, t: float) -> Tensor:
        """x0 predicted at the state ``x`` and time ``t``, whatever the form: one evaluation of the model.

        Raises:
            InputError: the prediction does not determine it there.
        """
        return self._evaluate(conversion(self.prediction, "sample", *self.scales(t), t), x, t)

    def noise(self, mean: Tensor, std: float, a: Node, b: Node) -> Tensor:
        """The run's noise for the step from ``a`` to ``b``, which goes to ``mean + std * noise``: standard normal, like
        ``mean``; the same whenever asked."""
        if self.draw is None:
            raise InputError(f"this {self.name} form has no noise to add: give it draw=")
        return self.draw(mean, std, a.t, b.t)

    def _evaluate(self, coefficients: tuple[float, float], x: Tensor, t: float) -> Tensor:
        """on_x * x + on_output * output."""
        if self.call is None:
            raise InputError(f"this {self.name} form has no model to evaluate: give it call=")
        on_x, on_output = coefficients
        out = self.call(x, t)
        return add_scaled(rescaled(out, on_output), [(on_x, x)])

    def coefficients(self, t: float) -> tuple[float, float]:
        """The numbers (on_x, on_output) of the drift at ``t``."""
        alpha, sigma = self.scales(t)
        if self.name != "original":
            target = "epsilon" if self.name == "exponential" else "sample"
            return conversion(self.prediction, target, alpha, sigma, t)
        if isinstance(self.schedule, Flow):
            return conversion(self.prediction, "flow_prediction", alpha, sigma, t)
        da, ds = number(self.schedule.dalpha(t), t), number(self.schedule.dsigma(t), t)
        if not (finite(da) and finite(ds)):
            raise InputError(
                f"the original form is infinite at t = {t:g} on {self.schedule!r} (sigma' = {ds:g}): end the grid "
                "before it, or use form='exponential'"
            )
        ex, eo = conversion(self.prediction, "epsilon", alpha, sigma, t)
        if da == 0:
            return ds * ex, ds * eo
        sx, so = conversion(self.prediction, "sample", alpha, sigma, t)
        return da * sx + ds * ex, da * so + ds * eo

    def regular(self, t: float) -> bool:
        """Whether the clock and the scale are finite and not 0 at ``t``."""
        return self.scale(t) != 0 and math.isfinite(self.node(t).s)

    def aside(self, start: float, end: float) -> Form:
        """The form to use on the interval from ``start`` to ``end``: itself, or one that is regular there.

        Where alpha(start) = 0 that is the original form of rectified flow, and the data form otherwise; where
        sigma(end) = 0 it is the original form of rectified flow, and the exponential form otherwise.

        Raises:
            InputError: no form is regular on the whole interval, or the network's prediction does not
                determine that form's drift at ``start``.
        """
        if self.regular(start) and self.regular(end):
            return self
        names = ["original"] if isinstance(self.schedule, Flow) else ["data", "exponential"]
        for name in names:
            other = Form(name, self.schedule, self.prediction, self.call, self.draw)
            if other.regular(start) and other.regular(end):
                other.coefficients(start)  # raises where the prediction is blind
                return other
        raise InputError(
            f"alpha({start:g}) = 0 and sigma({end:g}) = 0 on {self.schedule!r}: one interval cannot hold both "
            "ends; use at least 2 steps"
        )
