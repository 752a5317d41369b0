"""The continuous adjoint: the adjoint equation of the flow, solved backwards by a solver of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..conditioning import PerStep
from ..errors import InputError
from ..forms import FORMS
from ..grids import TimeGrid
from ..scalars import rescaled
from ..solvers import (
    RK4,
    AdaptiveDormandPrince,
    Euler,
    Heun,
    ReversibleSolver,
    Solver,
    State,
    StochasticSolver,
)
from .base import GradientMethod, Job
from .equation import AdjointForm
from .legs import Leg, legs_of, own_nodes
from .partner import own_step
from .paths import StoredPath
from .quadrature import Evaluations, evaluation_weights
from .sweep import ADJOINT, Record, Task, WayBack
from .taken import settle

Trajectory = Literal["stored", "recompute"]


class ContinuousAdjoint(GradientMethod):
    """The gradient of the ODE's true flow, by the adjoint equation (AdjointDPM, Algorithms 1 to 3).

    In a form's variables (dY/ds = F, x = scale Y) the adjoint p = dL/dY = scale dL/dx obeys

        dp/ds = -p · ∂F/∂Y,    dL_c/ds = -p · ∂F/∂c    (weights alike),

    solved from the run's end back to its start. With ``form="exponential"`` it is AdjointDPM's (dp/drho = -p · alpha
    ∂eps/∂x), with ``"original"`` the vanilla adjoint of a neural ODE. L_c and L_theta never feed back: they are sums,
    one buffer each, and take no part in an adaptive solver's error.

    The gradient is that of the flow, not of the steps the sampler took: it approaches the true one at the least of the
    orders of the forward solver, the backward solver and, between stored states, 4. At few steps it is *not* the
    sampler's own gradient; :class:`~backdrift.gradients.Exact` is.

    Args:
        solver: for the way back: any deterministic one, an adaptive one
            (:class:`~backdrift.solvers.AdaptiveDormandPrince`) among them. If None: Euler, Heun or RK4, of the run's
            own order up to 4.
        form: for the way back; the run's own if None.
        trajectory: ``"stored"``: the states at the nodes are kept (and, where the solver asks between them, the
            network's outputs there), and interpolated. ``"recompute"``: only the last state is kept and the path is
            solved back alongside: no memory for states, but what a contracting flow has lost is not found again.
        grid: the nodes of the way back: a :class:`~backdrift.grids.TimeGrid` or falling times with the run's own ends;
            the run's nodes if None (for an adaptive solver its ends).

    Where the states at all nodes are asked for (``trajectory=True`` in ``sample``), and where the conditioning
    changes from step to step, the way back stops at every node, and a multistep solver starts anew there. Beside an
    end where the form is singular, or where the network cannot be asked, the interval's own step is
    differentiated, exactly.

    Raises:
        InputError: an argument cannot be used; when a run begins, if its solver is stochastic.
    """

    def __init__(
        self,
        solver: Solver | None = None,
        form: str | None = None,
        trajectory: Trajectory = "stored",
        grid: TimeGrid | Sequence[float] | Tensor | None = None,
    ) -> None:
        if solver is not None and (
            not isinstance(solver, Solver) or isinstance(solver, StochasticSolver | ReversibleSolver)
        ):
            raise InputError(
                f"the way back needs a deterministic solver such as Heun() or AdaptiveDormandPrince(); got {solver!r}"
            )
        if form is not None and form not in FORMS:
            raise InputError(f"form must be one of {', '.join(FORMS)}; got {form!r}")
        if trajectory not in ("stored", "recompute"):
            raise InputError(f"trajectory is 'stored' or 'recompute'; got {trajectory!r}")
        self.solver, self.form, self.trajectory = solver, form, trajectory
        self.grid = grid if grid is None or isinstance(grid, TimeGrid) else TimeGrid(grid)

    def __repr__(self) -> str:
        return f"ContinuousAdjoint({self.solver!r}, {self.form!r}, {self.trajectory!r}, {self.grid!r})"

    by_times = True

    def settled(self, job: Job) -> Job:
        if any(isinstance(c, PerStep) for c in (job.cond, job.model.uncond)):
            return super().settled(job)  # which fits no run whose steps are yet to be found
        return settle(job, between=self.trajectory == "stored")

    def run(self, job: Job) -> Iterator[State]:
        if isinstance(job.plan.solver, StochasticSolver):
            raise InputError(
                f"ContinuousAdjoint is for the probability-flow ODE, and {job.plan.solver!r} solves the SDE: use "
                "gradient=Exact() or AdjointDEIS()"
            )
        order = job.plan.solver.order
        solver = self.solver or (Euler() if order == 1 else Heun() if order == 2 else RK4())
        form = self.form or job.plan.form
        solver.check_form(form)
        return _ContinuousRun(job, repr(self), solver, form, self.trajectory, self.grid).states()


class _ContinuousRun(WayBack):
    def __init__(
        self, job: Job, name: str, solver: Solver, form: str, trajectory: Trajectory, grid: TimeGrid | None
    ) -> None:
        super().__init__(job, name)
        self.solver, self.stored, self.form = solver, trajectory == "stored", self.plan.forms()[form]
        stops = job.trajectory or self.calls.varies
        own = own_nodes(grid, self.plan)
        legs = legs_of(self.plan, job.model, self.form, solver, own, stops)
        self.legs = {leg.last: leg for leg in legs}
        self.evaluations = {leg.last: self._evaluations(leg) for leg in legs}
        nodes = set(self.plan.times)
        asked = (t for found in self.evaluations.values() for t in (found.times if found else ()))
        adaptive = isinstance(solver, AdaptiveDormandPrince)
        self.between = self.stored and (adaptive or not nodes.issuperset(asked))
        taken = job.taken
        self.calls.recording = self.between and taken is None
        self.middles = {} if taken is None else {i: t for i, (t, _) in taken.middles.items()}

    def keep(self, index: int, start: Tensor, end: Tensor) -> Record:
        record: Record = {}
        if self.stored or self._leg_over(index).times == ():
            record["state", index] = start
        if self.stored or self.job.trajectory or index + 1 == len(self.plan.intervals):
            record["state", index + 1] = end
        if not self.between:
            return record
        if (taken := self.job.taken) is not None:
            record |= {("output", i): taken.outputs[i] for i in (index, index + 1) if i in taken.outputs}
            if index in taken.middles:
                record["middle", index] = taken.middles[index][1]
            return record
        out = self.calls.output_at(start, self.plan.times[index])
        if out is not None:
            record["output", index] = out
        return record

    def back(self, first: int, last: int, record: Record, adjoint: Tensor, task: Task) -> Tensor:
        path = StoredPath(self.form, self.plan.times, record, self.calls.evaluate, self.middles)
        x: Tensor | None = None
        while last > first:
            leg = self.legs[last]
            if leg.times:
                x = record.get(("state", last), x)
                adjoint, x = self._along(leg, adjoint, path if self.stored else x, task)
            else:
                task.at(leg.first)
                x = record["state", leg.first]
                adjoint = own_step(self.plan, leg.first, self.calls).back(x, adjoint, task.sums)
                task.see(ADJOINT, adjoint)
            last = leg.first
        return adjoint

    def by_times(
        self, first: int, last: int, record: Record, ends: tuple[Tensor, Tensor], task: Task
    ) -> Tensor:
        return self.boundary_terms(first, last, record, ends)

    def _along(
        self, leg: Leg, adjoint: Tensor, states: StoredPath | Tensor | None, task: Task
    ) -> tuple[Tensor, Tensor | None]:
        """The adjoint at the leg's start, and the state there if it is computed alongside."""
        form, (low, high) = self.form, (leg.times[0], leg.times[-1])
        z = rescaled(adjoint, form.scale(low))
        if isinstance(states, Tensor):
            z = torch.stack([rescaled(states, 1 / form.scale(low)), z])
        path = states if isinstance(states, StoredPath) else None
        equation = AdjointForm(form, leg, self.plan.times, path, self.calls, task)
        found = self.evaluations[leg.last]
        if found is None:
            assert isinstance(self.solver, AdaptiveDormandPrince)
            z = equation.adaptively(self.solver, leg.times, z, self._guess(leg))
        else:
            z = equation.solve(self.solver, leg.times, z, found)
        y, p = (None, z) if path is not None else (z[0], z[1])
        return rescaled(p, 1 / form.scale(high)), None if y is None else rescaled(y, form.scale(high))

    def _guess(self, leg: Leg) -> float | None:
        """A first step for an adaptive way back: the length of the run's own last steps, where it chose them."""
        if self.job.taken is None:
            return None
        clocks = [self.form.node(t).s for t in self.plan.times[max(leg.last - 2, leg.first) : leg.last + 1]]
        return max(abs(b - a) for a, b in itertools.pairwise(clocks))

    def _leg_over(self, index: int) -> Leg:
        return next(leg for leg in self.legs.values() if leg.first <= index < leg.last)

    def _evaluations(self, leg: Leg) -> Evaluations | None:
        """Those of a leg, as far as they are known beforehand."""
        if isinstance(self.solver, AdaptiveDormandPrince):
            return None
        return evaluation_weights(self.solver, self.form, [self.form.node(t) for t in leg.times])
