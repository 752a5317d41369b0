"""Explicit Runge–Kutta methods: one loop over a tableau.

k_i = drift(Y + h Σ_j a_ij k_j, s + c_i h),   Y' = Y + h Σ_i b_i k_i
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..errors import InputError
from ..forms import Form, Node
from .base import Solver, Stepper, add_scaled, rescaled


@dataclass(frozen=True)
class Tableau:
    """Butcher's tableau of an explicit method.

    Args:
        a: the rows below the diagonal; row i has i entries.
        b: weights of the stages.
        c: where each stage stands in the step; c_i = Σ_j a_ij.

    Raises:
        InputError: the rows are not those of a consistent explicit method.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]

    def __post_init__(self) -> None:
        rows_fit = [len(row) for row in self.a] == list(range(len(self.b))) and len(self.c) == len(self.b)
        if not rows_fit:
            raise InputError(
                "an explicit tableau has stages × stages entries below its diagonal, and b, c of that length"
            )
        if not math.isclose(sum(self.b), 1.0, abs_tol=1e-12):
            raise InputError(f"the weights b of a consistent method sum to 1; got {sum(self.b)!r}")
        if not all(math.isclose(sum(row), c, abs_tol=1e-12) for row, c in zip(self.a, self.c, strict=True)):
            raise InputError("each c must be the sum of its row of a")


EULER = Tableau(((),), (1.0,), (0.0,))
HEUN = Tableau(((), (1.0,)), (0.5, 0.5), (0.0, 1.0))
CLASSIC = Tableau(
    ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), (0.0, 0.5, 0.5, 1.0)
)


class ExplicitRungeKutta(Solver, Stepper):
    """Any explicit Runge–Kutta method. It remembers nothing, so it is its own stepper.

    Args:
        tableau: its coefficients.
        order: its global order.
    """

    def __init__(self, tableau: Tableau, order: int) -> None:
        self.tableau = tableau
        self.order = order

    def begin(self) -> Stepper:
        return self

    def evaluations(self, index: int) -> int:
        return len(self.tableau.b)

    @property
    def aside(self) -> Solver:
        return self

    def step(self, form: Form, x: Tensor, a: Node, b: Node) -> Tensor:
        return self.finish(form, x, a, b, form.drift(x, a.t))

    def finish(self, form: Form, x: Tensor, a: Node, b: Node, first: Tensor) -> Tensor:
        """The step, given its first stage (the drift at ``a``)."""
        h = b.s - a.s
        y = rescaled(x, 1 / form.scale(a.t))
        stages = self._stages(form, y, a, b, first)
        y = add_scaled(y, [(h * w, k) for w, k in zip(self.tableau.b, stages, strict=True)])
        return rescaled(y, form.scale(b.t))

    def increment(self, form: Form, y: Tensor, a: Node, b: Node, first: Tensor) -> Tensor:
        """What the step adds to Y = x / scale, given Y and the first stage at ``a``; without Y's own rounding."""
        h = b.s - a.s
        terms = zip(self.tableau.b, self._stages(form, y, a, b, first), strict=True)
        (w, k), *rest = [(w, k) for w, k in terms if w != 0]
        return add_scaled(rescaled(k, h * w), [(h * w, k) for w, k in rest])

    def _stages(self, form: Form, y: Tensor, a: Node, b: Node, first: Tensor) -> list[Tensor]:
        h = b.s - a.s
        stages = [first]
        for row, c in zip(self.tableau.a[1:], self.tableau.c[1:], strict=True):
            node = b if c == 1 else a if c == 0 else form.between(a.s + c * h)
            inner = add_scaled(y, [(h * w, k) for w, k in zip(row, stages, strict=True)])
            stages.append(form.drift(rescaled(inner, form.scale(node.t)), node.t))
        return stages


class Euler(ExplicitRungeKutta):
    """Euler's method, order 1, one evaluation a step. On the exponential form it is DDIM with eta = 0
    (Song et al. 2021, Eq. 12)."""

    def __init__(self) -> None:
        super().__init__(EULER, 1)


class Heun(ExplicitRungeKutta):
    """Heun's method, order 2, two evaluations a step (the second at the step's end)."""

    def __init__(self) -> None:
        super().__init__(HEUN, 2)


class RK4(ExplicitRungeKutta):
    """The classical Runge–Kutta method, order 4, four evaluations a step."""

    def __init__(self) -> None:
        super().__init__(CLASSIC, 4)
