"""Multistep methods that extrapolate the drift by a polynomial, and the first of them: Adams–Bashforth.

    Y_{n+1} = Y_n + Σ_j w_j drift_{n-j},   w_j = ∫ ℓ_j(s) ds over [s_n, s_{n+1}]

with ℓ_j the Lagrange polynomials of the last k nodes. In Adams–Bashforth they are polynomials in the form's own clock
s; on the exponential form (s = rho) that is ρAB-DEIS (Zhang & Chen 2023) and AdjointDPM's solver. In
:mod:`backdrift.solvers.deis` they are polynomials in t or in log rho.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from ..errors import InputError
from ..forms import Form, Node
from .base import Solver, Stepper, add_scaled, rescaled
from .runge_kutta import CLASSIC, EULER, HEUN, ExplicitRungeKutta

Start = Literal["runge-kutta", "rising"]

# Gauss–Legendre with two points integrates cubics exactly: all that four nodes need.
_GAUSS = (0.5 - math.sqrt(3) / 6, 0.5 + math.sqrt(3) / 6)


def adams_weights(nodes: Sequence[float], start: float, stop: float) -> list[float]:
    """∫ ℓ_j(s) ds from ``start`` to ``stop`` for each of up to 4 distinct ``nodes``."""
    h = stop - start
    weights = []
    for j, own in enumerate(nodes):
        others = [node for i, node in enumerate(nodes) if i != j]
        values = [math.prod((start + g * h - node) / (own - node) for node in others) for g in _GAUSS]
        weights.append(h * sum(values) / 2)
    return weights


class Extrapolating(Solver):
    """A multistep method of order 1 to 4: one evaluation a step once it has started.

    With ``start="runge-kutta"`` the first ``order - 1`` steps are taken by a Runge–Kutta method (Heun for order 2, the
    classical one for 3 and 4) whose first stages serve as the history, so the start costs no order. With ``"rising"``
    they are of order 1, 2, 3 by the history that there is: one evaluation each, but the first of them is Euler's, whose
    error, of order 2 and made once, bounds the order of the whole.

    Args:
        order: 1, 2, 3 or 4 (1 is Euler): through how many drifts the polynomial goes.
        start: how the first steps are taken.

    Attributes:
        order: of the method with its start: at most 2 where that rises.
        drifts: through how many the polynomial goes.

    Raises:
        InputError: another order or start.
    """

    def __init__(self, order: int, start: Start = "runge-kutta") -> None:
        if order not in (1, 2, 3, 4) or isinstance(order, bool):
            raise InputError(f"{type(self).__name__} has orders 1, 2, 3 and 4; got {order!r}")
        if start not in ("runge-kutta", "rising"):
            raise InputError(
                f"the start of {type(self).__name__} is 'runge-kutta' or 'rising'; got {start!r}"
            )
        self.drifts, self.start = order, start
        rising = start == "rising"
        self.order = min(order, 2) if rising else order
        tableau, starter_order = {1: (EULER, 1), 2: (HEUN, 2)}.get(1 if rising else order, (CLASSIC, 4))
        self.starter = ExplicitRungeKutta(tableau, starter_order)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join([str(self.drifts), *self._settings()])})"

    def _settings(self) -> list[str]:
        return ["start='rising'"] if self.start == "rising" else []

    @abstractmethod
    def weights(self, form: Form, nodes: Sequence[Node], b: Node) -> list[float]:
        """What each drift counts in the step from ``nodes[-1]`` to ``b``.

        Args:
            form: the run's form.
            nodes: where the drifts were evaluated, the oldest first; 1 to :attr:`drifts` of them.
            b: the step's end.
        """

    def begin(self) -> Stepper:
        return _ExtrapolatingRun(self)

    def evaluations(self, index: int) -> int:
        return self.starter.evaluations(index) if index < self.drifts - 1 else 1

    @property
    def aside(self) -> Solver:
        return self.starter


class AdamsBashforth(Extrapolating):
    """Adams–Bashforth on unequal steps: the drift is extrapolated by a polynomial in the form's clock.

    On the exponential form that is ρAB-DEIS (Zhang & Chen 2023). The first ``order - 1`` steps are taken by Heun's
    method (order 2) or the classical Runge–Kutta method, at 2 or 4 evaluations each. With ``start="rising"`` they are
    Adams–Bashforth steps of order 1, 2, 3: one evaluation each, the better choice at few steps, and order 2 as the
    steps become many.

    Args:
        order: 1, 2, 3 or 4 (1 is Euler).
        start: ``"runge-kutta"`` or ``"rising"``.

    Raises:
        InputError: another order or start.
    """

    def __init__(self, order: int = 4, start: Start = "runge-kutta") -> None:
        super().__init__(order, start)

    def weights(self, form: Form, nodes: Sequence[Node], b: Node) -> list[float]:
        return adams_weights([node.s for node in nodes], nodes[-1].s, b.s)


class _ExtrapolatingRun(Stepper):
    def __init__(self, method: Extrapolating) -> None:
        self.method = method
        self.history: deque[tuple[Node, Tensor]] = deque(maxlen=method.drifts)

    def step(self, form: Form, x: Tensor, a: Node, b: Node) -> Tensor:
        drift = form.drift(x, a.t)
        self.history.append((a, drift))
        if self.method.start == "runge-kutta" and len(self.history) < self.method.drifts:
            return self.method.starter.finish(form, x, a, b, drift)
        weights = self.method.weights(form, [node for node, _ in self.history], b)
        y = rescaled(x, 1 / form.scale(a.t))
        y = add_scaled(y, [(w, k) for w, (_, k) in zip(weights, self.history, strict=True)])
        return rescaled(y, form.scale(b.t))
