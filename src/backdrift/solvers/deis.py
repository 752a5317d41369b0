"""DEIS with a polynomial in t: Zhang & Chen 2023 (Fast sampling with exponential integrator), tAB-DEIS.

    y_{n+1} = y_n + Σ_j w_j eps_{n-j},   w_j = ∫ ℓ_j drho over [rho_n, rho_{n+1}],   y = x/alpha, rho = sigma/alpha

The linear part of the ODE is solved exactly; eps is extrapolated by the polynomial through its last values. The
polynomial's variable is what tells the members of the family apart:

| the ℓ_j are polynomials in | method |
|---|---|
| t | tAB-DEIS: ``DEIS(order)`` |
| log rho = -lam | ``DEIS(order, clock="lam")``, which diffusers' DEISMultistepScheduler computes |
| rho | ρAB-DEIS: :class:`~backdrift.solvers.AdamsBashforth` on the exponential form |

They are one method at order 1 (DDIM), and where t = rho (EDM) the first and the last are one at every order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..forms import Form, Node
from .adams import Extrapolating, Start
from .base import Solver
from .runge_kutta import Euler

_POINTS, _MASSES = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(16))


class DEIS(Extrapolating):
    """DEIS: eps is extrapolated by a polynomial in t (tAB-DEIS, Zhang & Chen 2023) or in log rho.

    Orders 1 to 4, one evaluation a step; the first ``order - 1`` steps are taken by Heun's method (order 2) or the
    classical Runge–Kutta method, or rise in order (``start="rising"``, see :class:`~backdrift.solvers.AdamsBashforth`;
    so does diffusers' scheduler), and a step to sigma = 0 is Euler's (DDIM). Works on the exponential form.

    Args:
        order: 1, 2, 3 or 4 (1 is Euler).
        clock: the polynomial's variable, ``"t"`` or ``"lam"`` = -log rho. For rho itself take
            :class:`~backdrift.solvers.AdamsBashforth`.
        start: ``"runge-kutta"`` or ``"rising"``.

    Raises:
        InputError: another order, clock or start.
    """

    forms = ("exponential",)
    default_form = "exponential"

    def __init__(
        self, order: int = 3, clock: Literal["t", "lam"] = "t", start: Start = "runge-kutta"
    ) -> None:
        super().__init__(order, start)
        if clock not in ("t", "lam"):
            raise InputError(
                f"the clock of DEIS is 't' or 'lam'; got {clock!r} (AdamsBashforth is the one with rho itself)"
            )
        self.clock = clock

    def _settings(self) -> list[str]:
        return (["clock='lam'"] if self.clock == "lam" else []) + super()._settings()

    def spans(self, a: Node, b: Node) -> bool:
        return a.s > 0 and b.s > 0  # log rho is finite

    @property
    def aside(self) -> Solver:
        return Euler()

    def weights(self, form: Form, nodes: Sequence[Node], b: Node) -> list[float]:
        log_rho, mass = quadrature(nodes[-1].s, b.s)
        if self.clock == "t":
            clock, known = form.schedule.t_from_lam(-log_rho), [node.t for node in nodes]
        else:
            clock, known = log_rho, [math.log(node.s) for node in nodes]
        return [float((mass * value).sum()) for value in _lagrange(clock, known)]


def quadrature(start: float, stop: float) -> tuple[Tensor, Tensor]:
    """Points and masses for ∫ f(log rho) drho from ``start`` to ``stop``: (log rho, mass), each (points,) float64.

    Gauss–Legendre in log rho, 16 points for each unit of it. t as a function of log rho is analytic up to pi/2 off the
    real line on every closed-form schedule, so the rule is exact to rounding there.
    """
    low, high = math.log(start), math.log(stop)
    pieces = max(1, math.ceil(abs(high - low)))
    edges = torch.linspace(low, high, pieces + 1, dtype=torch.float64)
    half = edges.diff()[:, None] / 2
    log_rho = (edges[:-1, None] + half * (1 + _POINTS)).flatten()
    return log_rho, (half * _MASSES).flatten() * log_rho.exp()


def _lagrange(at: Tensor, nodes: Sequence[float]) -> list[Tensor]:
    """The Lagrange polynomials of ``nodes`` at the points ``at``."""
    return [
        math.prod(
            ((at - other) / (own - other) for other in nodes if other != own), start=torch.ones_like(at)
        )
        for own in nodes
    ]
