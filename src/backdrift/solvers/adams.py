"""Adams–Bashforth methods on unequal steps.

    Y_{n+1} = Y_n + Σ_j w_j drift_{n-j},   w_j = ∫ ℓ_j(s) ds over [s_n, s_{n+1}]

with ℓ_j the Lagrange polynomials of the last k nodes. On the exponential form this is ρAB-DEIS (Zhang & Chen
2023) and AdjointDPM's solver.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from torch import Tensor

from ..errors import InputError
from ..forms import Form, Node
from .base import Solver, Stepper, add_scaled, rescaled
from .runge_kutta import CLASSIC, EULER, HEUN, ExplicitRungeKutta

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


class AdamsBashforth(Solver):
    """Adams–Bashforth of order 1 to 4: one evaluation a step once it has started.

    The first ``order - 1`` steps are taken by a Runge–Kutta method (Heun for order 2, the classical one for 3
    and 4) whose first stages serve as the history, so the start costs no order.

    Args:
        order: 1, 2, 3 or 4 (1 is Euler).

    Raises:
        InputError: another order.
    """

    def __init__(self, order: int = 4) -> None:
        if order not in (1, 2, 3, 4) or isinstance(order, bool):
            raise InputError(f"AdamsBashforth has orders 1, 2, 3 and 4; got {order!r}")
        self.order = order
        tableau, starter_order = {1: (EULER, 1), 2: (HEUN, 2)}.get(order, (CLASSIC, 4))
        self.starter = ExplicitRungeKutta(tableau, starter_order)

    def __repr__(self) -> str:
        return f"AdamsBashforth({self.order})"

    def begin(self) -> Stepper:
        return _AdamsRun(self.order, self.starter)

    def evaluations(self, index: int) -> int:
        return self.starter.evaluations(index) if index < self.order - 1 else 1

    @property
    def aside(self) -> Solver:
        return self.starter


class _AdamsRun(Stepper):
    def __init__(self, order: int, starter: ExplicitRungeKutta) -> None:
        self.order, self.starter = order, starter
        self.history: deque[tuple[float, Tensor]] = deque(maxlen=order)

    def step(self, form: Form, x: Tensor, a: Node, b: Node) -> Tensor:
        drift = form.drift(x, a.t)
        self.history.append((a.s, drift))
        if len(self.history) < self.order:
            return self.starter.finish(form, x, a, b, drift)
        weights = adams_weights([s for s, _ in self.history], a.s, b.s)
        y = rescaled(x, 1 / form.scale(a.t))
        y = add_scaled(y, [(w, k) for w, (_, k) in zip(weights, self.history, strict=True)])
        return rescaled(y, form.scale(b.t))
