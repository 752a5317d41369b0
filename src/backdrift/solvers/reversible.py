"""The reversible solvers: McCallum–Foster coupling, reversible Heun, and EDICT.

Each takes the pair (y, z) from node a to b; h = s_b - s_a, f the drift, and Ψ the increment of a one-step method.

* :class:`McCallumFoster`: ``y' = ζ y + (1-ζ) z + Ψ_{a→b}(z),  z' = z - Ψ_{b→a}(y')``
* :class:`ReversibleHeun`: ``z' = 2 y - z + h f_a(z),  y' = y + h/2 (f_a(z) + f_b(z'))``
* :class:`EDICT`: ``y° = y + h f_a(z), z° = z + h f_a(y°);  y' = p y° + (1-p) z°, z' = p z° + (1-p) y'``

| solver | order | evaluations a step | rounding, undone over N steps, grows by |
|---|---|---|---|
| McCallumFoster | the base's | twice the base's | ζ^(-N): 10 by default |
| ReversibleHeun | 2 | 1, and 2 in the first | nothing of its own |
| EDICT | 1 | 2 | p^(-2N): 1.4e3 at p = 0.93 and N = 50 |
"""

from __future__ import annotations

from ..errors import InputError
from ..forms import Node
from .base import Solver
from .coupled import Kick, ReversibleSolver
from .runge_kutta import Euler, Heun


class McCallumFoster(ReversibleSolver):
    """The reversible coupling of any explicit one-step method (McCallum & Foster 2024).

    Two of the base method's steps a step, the second backwards from the step's end.

    Args:
        base: the one-step method; :class:`~backdrift.solvers.Heun` if None.
        zeta: the coupling 0 < ζ <= 1. If None, 10^(-1/N) for a run of N steps: undoing them loses one digit
            whatever N is.

    Raises:
        InputError: a multistep base, or another ζ.
    """

    def __init__(self, base: Solver | None = None, zeta: float | None = None) -> None:
        self.base = self._one_step(base if base is not None else Heun(), "McCallumFoster")
        self.order, self.forms, self.default_form = self.base.order, self.base.forms, self.base.default_form
        if zeta is not None:
            _check_share("zeta", zeta)
        self.zeta = zeta

    def __repr__(self) -> str:
        return f"McCallumFoster({self.base!r}, zeta={self.zeta})"

    def fitted(self, steps: int) -> Solver:
        return McCallumFoster(self.base, 10 ** (-1 / steps)) if self.zeta is None else self

    def evaluations(self, index: int) -> int:
        return 2 * self.base.evaluations(index)

    @property
    def aside(self) -> ReversibleSolver:
        own = self.base.aside is self.base
        return self if own else McCallumFoster(self.base.aside, self.zeta)

    def kicks(self, a: Node, b: Node, index: int) -> tuple[Kick, ...]:
        if self.zeta is None:
            raise InputError(
                "McCallumFoster's default zeta depends on the number of steps: take fitted(steps)"
            )
        return (
            Kick(0, self.zeta, 1 - self.zeta, 1.0, self.base, a, b),
            Kick(1, 1.0, 0.0, -1.0, self.base, b, a),
        )


class ReversibleHeun(ReversibleSolver):
    """The reversible Heun method (Kidger et al. 2021), order 2, one evaluation a step after the first.

    Its inverse divides by nothing, so rounding is not amplified by the method itself.
    """

    order = 2

    def evaluations(self, index: int) -> int:
        return 2 if index == 0 else 1

    def kicks(self, a: Node, b: Node, index: int) -> tuple[Kick, ...]:
        # The published step, in three: half of the old slope, a reflection (2 y + h f - z), half of the new slope.
        # The slope at a node serves both steps that meet there, with the conditioning of the one that ends there.
        slope = Euler()
        return (
            Kick(0, 1.0, 0.0, 0.5, slope, a, b, lag=1),
            Kick(1, -1.0, 2.0, 0.0, slope, a, b),
            Kick(0, 1.0, 0.0, -0.5, slope, b, a),
        )


class EDICT(ReversibleSolver):
    """Exact diffusion inversion by coupled transformations (Wallace et al. 2023), as DOODL uses it.

    On the exponential form its two affine layers are DDIM steps, and it is the published method; the two
    change roles at every step, as in the authors' code. Order 1, with a large constant: p pulls the two together, and
    what p leaves apart is an error of the sample.

    Args:
        p: the mixing weight, 0 < p <= 1. Rounding grows by p^(-2N) on the way back: 1.4e3 in 50 steps at the
            published 0.93.

    Raises:
        InputError: another p.
    """

    order = 1

    def __init__(self, p: float = 0.93) -> None:
        _check_share("p", p)
        self.p = p

    def __repr__(self) -> str:
        return f"EDICT(p={self.p})"

    def evaluations(self, index: int) -> int:
        return 2

    def kicks(self, a: Node, b: Node, index: int) -> tuple[Kick, ...]:
        one, two, ddim = index % 2, 1 - index % 2, Euler()
        return (
            Kick(one, 1.0, 0.0, 1.0, ddim, a, b),
            Kick(two, 1.0, 0.0, 1.0, ddim, a, b),
            Kick(one, self.p, 1 - self.p, 0.0, ddim, a, b),
            Kick(two, self.p, 1 - self.p, 0.0, ddim, a, b),
        )


def _check_share(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise InputError(f"{name} must be a number above 0 and at most 1; got {value!r}")
