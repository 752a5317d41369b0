"""Explicit Runge–Kutta methods: one loop over a tableau.

k_i = drift(Y + h Σ_j a_ij k_j, s + c_i h),   Y' = Y + h Σ_i b_i k_i

| method | stages | order | |
|---|---|---|---|
| :class:`Euler` | 1 | 1 | DDIM on the exponential and on the data form |
| :class:`Midpoint` | 2 | 2 | asks at the middle of the step, not at its end |
| :class:`Heun` | 2 | 2 | EDM's sampler |
| :class:`Ralston` | 2 | 2 | the least bound on the local error of all with two stages |
| :class:`BogackiShampine` | 3 | 3 | the propagating formula of the 3(2) pair |
| :class:`RK4` | 4 | 4 | |
| :class:`ThreeEighths` | 4 | 4 | Kutta's other one |
| :class:`DormandPrince` | 6 | 5 | the propagating formula of the 5(4) pair |

A pair's last stage serves its error estimate only (its weight is 0), so it is left out here.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from ..errors import InputError
from ..forms import Form, Node
from ..scalars import value
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
        if not math.isclose(value(sum(self.b)), 1.0, abs_tol=1e-12):
            raise InputError(f"the weights b of a consistent method sum to 1; got {sum(self.b)!r}")
        rows = zip(self.a, self.c, strict=True)
        if not all(math.isclose(value(sum(row)), value(c), abs_tol=1e-12) for row, c in rows):
            raise InputError("each c must be the sum of its row of a")


EULER = Tableau(((),), (1.0,), (0.0,))
MIDPOINT = Tableau(((), (1 / 2,)), (0.0, 1.0), (0.0, 1 / 2))
HEUN = Tableau(((), (1.0,)), (0.5, 0.5), (0.0, 1.0))
RALSTON = Tableau(((), (2 / 3,)), (1 / 4, 3 / 4), (0.0, 2 / 3))
BOGACKI_SHAMPINE = Tableau(((), (1 / 2,), (0.0, 3 / 4)), (2 / 9, 1 / 3, 4 / 9), (0.0, 1 / 2, 3 / 4))
CLASSIC = Tableau(
    ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), (0.0, 0.5, 0.5, 1.0)
)
THREE_EIGHTHS = Tableau(
    ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8), (0.0, 1 / 3, 2 / 3, 1.0)
)
DORMAND_PRINCE = Tableau(
    (
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    ),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0),
)


class RungeKutta(Solver, Stepper):
    """An explicit one-step method whose coefficients may depend on the step's nodes.

    It remembers nothing, so it is its own stepper.

    Attributes:
        stages: evaluations a step.
    """

    stages: int

    @abstractmethod
    def tableau_at(self, a: Node, b: Node) -> Tableau:
        """The coefficients of the step from ``a`` to ``b``, in the form's clock."""

    def begin(self) -> Stepper:
        return self

    def evaluations(self, index: int) -> int:
        return self.stages

    @property
    def aside(self) -> Solver:
        return self

    def step(self, form: Form, x: Tensor, a: Node, b: Node) -> Tensor:
        return self.finish(form, x, a, b, form.drift(x, a.t))

    def finish(self, form: Form, x: Tensor, a: Node, b: Node, first: Tensor) -> Tensor:
        """The step, given its first stage (the drift at ``a``)."""
        h, tableau = b.s - a.s, self.tableau_at(a, b)
        y = rescaled(x, 1 / form.scale(a.t))
        stages = _stages(tableau, form, y, a, b, first)
        y = add_scaled(y, [(h * w, k) for w, k in zip(tableau.b, stages, strict=True)])
        return rescaled(y, form.scale(b.t))

    def increment(self, form: Form, y: Tensor, a: Node, b: Node, first: Tensor) -> Tensor:
        """What the step adds to Y = x / scale, given Y and the first stage at ``a``; without Y's own rounding."""
        h, tableau = b.s - a.s, self.tableau_at(a, b)
        terms = zip(tableau.b, _stages(tableau, form, y, a, b, first), strict=True)
        (w, k), *rest = [(w, k) for w, k in terms if w != 0]
        return add_scaled(rescaled(k, h * w), [(h * w, k) for w, k in rest])


def _stages(tableau: Tableau, form: Form, y: Tensor, a: Node, b: Node, first: Tensor) -> list[Tensor]:
    h = b.s - a.s
    stages = [first]
    for row, c in zip(tableau.a[1:], tableau.c[1:], strict=True):
        node = b if c == 1 else a if c == 0 else form.between(a.s + c * h)
        inner = add_scaled(y, [(h * w, k) for w, k in zip(row, stages, strict=True)])
        stages.append(form.drift(rescaled(inner, form.scale(node.t)), node.t))
    return stages


class ExplicitRungeKutta(RungeKutta):
    """Any explicit Runge–Kutta method.

    Args:
        tableau: its coefficients.
        order: its global order.
    """

    def __init__(self, tableau: Tableau, order: int) -> None:
        self.tableau = tableau
        self.order, self.stages = order, len(tableau.b)

    def tableau_at(self, a: Node, b: Node) -> Tableau:
        return self.tableau


class Euler(ExplicitRungeKutta):
    """Euler's method. On the exponential and on the data form it is DDIM with eta = 0 (Song et al. 2021, Eq. 12)."""

    def __init__(self) -> None:
        super().__init__(EULER, 1)


class Midpoint(ExplicitRungeKutta):
    """The explicit midpoint method: an Euler step to the middle, and the whole step with the drift found there."""

    def __init__(self) -> None:
        super().__init__(MIDPOINT, 2)


class Heun(ExplicitRungeKutta):
    """Heun's method: the mean of the drifts at both ends of an Euler step (Karras et al. 2022, Algorithm 1)."""

    def __init__(self) -> None:
        super().__init__(HEUN, 2)


class Ralston(ExplicitRungeKutta):
    """Ralston's method (1962): second stage at 2/3 of the step."""

    def __init__(self) -> None:
        super().__init__(RALSTON, 2)


class BogackiShampine(ExplicitRungeKutta):
    """The third-order method of Bogacki and Shampine's 3(2) pair (1989), on the grid's own steps."""

    def __init__(self) -> None:
        super().__init__(BOGACKI_SHAMPINE, 3)


class RK4(ExplicitRungeKutta):
    """The classical Runge–Kutta method."""

    def __init__(self) -> None:
        super().__init__(CLASSIC, 4)


class ThreeEighths(ExplicitRungeKutta):
    """Kutta's 3/8 rule (1901), the other classical method of order 4."""

    def __init__(self) -> None:
        super().__init__(THREE_EIGHTHS, 4)


class DormandPrince(ExplicitRungeKutta):
    """The fifth-order method of Dormand and Prince's 5(4) pair (1980), on the grid's own steps."""

    def __init__(self) -> None:
        super().__init__(DORMAND_PRINCE, 5)
