"""What is compared: solver, form of the ODE, grid, and how many steps come nearest to a number of network calls."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from torch import Tensor

import backdrift as bd
from backdrift.forms import Form, Node
from backdrift.solvers import Solver
from backdrift.solvers.adams import adams_weights
from backdrift.solvers.base import Stepper, add_scaled, rescaled

TARGETS = (5, 10, 20, 50)
GRIDS = ("uniform", "logsnr")


class RisingAdams(Solver):
    """Adams–Bashforth of order 1, 2, 3, then 4: one evaluation a step from the first on.

    ``AdamsBashforth(4)`` spends 12 evaluations on its start, three Runge–Kutta steps, so within 10 it is
    RK4. This one is an Adams–Bashforth method at any number of steps. Its Euler step leaves it at global order 2.
    """

    order = 2

    def begin(self) -> Stepper:
        return _RisingRun()

    def evaluations(self, index: int) -> int:
        return 1

    @property
    def aside(self) -> Solver:
        return bd.Euler()


class _RisingRun(Stepper):
    def __init__(self) -> None:
        self.history: deque[tuple[Node, Tensor]] = deque(maxlen=4)

    def step(self, form: Form, x: Tensor, a: Node, b: Node) -> Tensor:
        self.history.append((a, form.drift(x, a.t)))
        weights = adams_weights([node.s for node, _ in self.history], a.s, b.s)
        y = rescaled(x, 1 / form.scale(a.t))
        y = add_scaled(y, [(w, k) for w, (_, k) in zip(weights, self.history, strict=True)])
        return rescaled(y, form.scale(b.t))


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    name: str
    form: str
    solver: Solver

    def calls(self, steps: int) -> int:
        """Network calls of that many steps."""
        return sum(self.solver.evaluations(index) for index in range(steps))

    def steps(self, target: int) -> int:
        """How many steps come nearest to ``target`` calls; the fewer of two."""
        return min(range(1, target + 1), key=lambda n: (abs(self.calls(n) - target), n))


METHODS = (
    Method("original, Euler", "original", bd.Euler()),
    Method("original, RK4", "original", bd.RK4()),
    Method("original, AB4", "original", bd.AdamsBashforth(4)),
    Method("original, AB4 rising", "original", RisingAdams()),
    Method("exponential, Euler (DDIM)", "exponential", bd.Euler()),
    Method("exponential, RK4", "exponential", bd.RK4()),
    Method("exponential, AB4", "exponential", bd.AdamsBashforth(4)),
    Method("exponential, AB4 rising", "exponential", RisingAdams()),
    Method("DPM-Solver-2", "exponential", bd.DPMSolver(2)),
    Method("DPM-Solver-3", "exponential", bd.DPMSolver(3)),
    Method("DPM-Solver++(2M)", "data", bd.DPMSolverPP()),
)
