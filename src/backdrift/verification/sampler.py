"""A sampler: solver, form and grid with a number of steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..denoiser import Denoiser
from ..errors import InputError
from ..grids import TimeGrid
from ..integrate import Plan
from ..schedules import Schedule
from ..solvers import Solver


@dataclass(frozen=True)
class Sampler:
    """How a run is stepped.

    Attributes:
        solver: the method.
        form: name of the form; None for the run's default.
        grid: with its number of steps.
    """

    solver: Solver
    form: str | None
    grid: TimeGrid

    @property
    def steps(self) -> int:
        """Intervals of the grid."""
        return self.grid.steps

    @property
    def name(self) -> str:
        """Solver and steps, to read."""
        return f"{self.solver!r}, {self.steps} steps"

    @property
    def key(self) -> tuple[str, int]:
        """What tells it from the other samplers of a certificate."""
        return repr(self.solver), self.steps

    def arguments(self) -> dict[str, Any]:
        """The keywords of :func:`~backdrift.sample`."""
        return {"solver": self.solver, "form": self.form, "grid": self.grid}

    def plan(self, model: Denoiser) -> Plan:
        """The run's plan.

        Raises:
            InputError: the settings do not go together.
        """
        from ..sampling import plan_for

        return plan_for(model, self.solver, self.grid, self.form)


def grid_with(grid: TimeGrid | str | None, schedule: Schedule, steps: int) -> TimeGrid:
    """The grid of that rule with that many steps, from the noisiest to the cleanest time.

    Args:
        grid: a rule, or a TimeGrid whose rule and ends are kept; if None equal steps in log-SNR where that is finite at
            both ends of the schedule's range, else equal steps in t.

    Raises:
        InputError: an unknown rule, too few steps, or a grid of given times, which has one number of steps.
    """
    if grid is None:
        ends = schedule.rho([schedule.start, schedule.end])
        grid = "logsnr" if bool(ends.isfinite().all()) and float(ends.min()) > 0 else "uniform"
    if isinstance(grid, str):
        return TimeGrid(grid, steps)
    if not isinstance(grid, TimeGrid):
        raise InputError(f"grid must be a rule such as 'logsnr', or a TimeGrid; got {grid!r}")
    if grid.rule == "explicit":
        raise InputError(
            "a grid of given times has one number of steps, and the true flow's gradient needs many: give a rule, "
            "TimeGrid('logsnr', steps, start=..., end=...)"
        )
    return TimeGrid(
        grid.rule, steps, start=grid.start, end=grid.end, clean_end=grid.clean_end, exponent=grid.exponent
    )
