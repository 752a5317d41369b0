"""The symplectic adjoint: the gradient of the run as computed, by the Runge–Kutta method's own partner."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from ..errors import InputError
from ..solvers import Solver, State
from ..solvers.runge_kutta import RungeKutta
from .base import GradientMethod, Job
from .partner import own_step
from .sweep import ADJOINT, Record, Task, WayBack

Stages = Literal["recompute", "stored"]


class SymplecticAdjoint(GradientMethod):
    """The adjoint equation solved by the partitioned partner of the run's own explicit Runge–Kutta method.

    It equals plain autograd to rounding, for any tableau (:mod:`backdrift.gradients.partner` has the formulas;
    Matsubara et al. 2021, and for Euler's method SAG's Eqs. 7 and 8). The forward pass keeps one state per step. The
    way back evaluates each stage once, with a graph: as many network calls as the forward pass, fewer where a
    stage has no influence.

    Args:
        stages: ``"recompute"``: a step's stages are computed again from its first state, and the graphs of all of them
            are held at once. ``"stored"``: the forward pass keeps every stage's state, and one graph at a time is held,
            which is less memory where activations outweigh latents. The same for methods of one stage.

    Raises:
        InputError: ``stages`` is neither; or, when a run begins, the solver is not an explicit Runge–Kutta method
            (multistep methods have no such partner: use ``Exact()``).
    """

    by_times = True

    def __init__(self, stages: Stages = "recompute") -> None:
        if stages not in ("recompute", "stored"):
            raise InputError(f"stages is 'recompute' or 'stored'; got {stages!r}")
        self.stages = stages

    def __repr__(self) -> str:
        return f"SymplecticAdjoint(stages={self.stages!r})"

    def check_solver(self, solver: Solver) -> None:
        """Raise unless the method has a partner for ``solver``.

        Raises:
            InputError: it is not an explicit Runge–Kutta method.
        """
        if not isinstance(solver, RungeKutta):
            raise InputError(
                f"SymplecticAdjoint needs an explicit Runge–Kutta method such as Euler(), Heun() or RK4(); {solver!r} "
                "has no partner of its kind: use gradient=Exact(), which is exact for every solver"
            )

    def run(self, job: Job) -> Iterator[State]:
        for solver in {job.plan.solver, job.plan.solver.aside}:
            self.check_solver(solver)
        return _SymplecticRun(job, repr(self), self.stages).states()


class _SymplecticRun(WayBack):
    def __init__(self, job: Job, name: str, stages: Stages) -> None:
        super().__init__(job, name)
        self.stored = stages == "stored"
        self.calls.recording = self.stored

    def keep(self, index: int, start: Tensor, end: Tensor) -> Record:
        if not self.stored:
            return {("state", index): start}
        live = own_step(self.plan, index, self.calls).live
        return {("stage", index, i): self.calls.made[i][0] for i in live}

    def back(self, first: int, last: int, record: Record, adjoint: Tensor, task: Task) -> Tensor:
        for index in reversed(range(first, last)):
            task.at(index)
            step = own_step(self.plan, index, self.calls, timed=task.timed)
            if self.stored:
                states = [record[key] for key in record if key[:2] == ("stage", index)]
                adjoint = step.back_over(states, adjoint, task.sums)
            else:
                adjoint = step.back(record["state", index], adjoint, task.sums)
            task.see(ADJOINT, adjoint)
            if step.on_ends is not None:
                task.carry.setdefault("on_times", {})[index] = step.on_ends
        return adjoint

    def by_times(
        self, first: int, last: int, record: Record, ends: tuple[Tensor, Tensor], task: Task
    ) -> Tensor:
        total = torch.zeros(len(self.plan.times), dtype=torch.float64)
        for index, on_ends in task.carry.pop("on_times").items():
            total[index : index + 2] += on_ends
        return total
