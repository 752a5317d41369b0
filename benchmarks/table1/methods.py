"""What is compared: solver, form of the ODE, grid, and how many steps come nearest to a number of network calls."""

from __future__ import annotations

from dataclasses import dataclass

import backdrift as bd
from backdrift.solvers import Solver

TARGETS = (5, 10, 20, 50)
GRIDS = ("uniform", "logsnr")


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
    Method("original, AB4 rising", "original", bd.AdamsBashforth(4, start="rising")),
    Method("exponential, Euler (DDIM)", "exponential", bd.Euler()),
    Method("exponential, RK4", "exponential", bd.RK4()),
    Method("exponential, AB4", "exponential", bd.AdamsBashforth(4)),
    Method("exponential, AB4 rising", "exponential", bd.AdamsBashforth(4, start="rising")),
    Method("DPM-Solver-2", "exponential", bd.DPMSolver(2)),
    Method("DPM-Solver-3", "exponential", bd.DPMSolver(3)),
    Method("DPM-Solver++(2M)", "data", bd.DPMSolverPP()),
)
