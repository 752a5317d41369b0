"""The only time loop: a solver, on a form, along a grid's nodes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import InputError, UnsupportedError
from .forms import FORMS, Call, Form
from .noises import Draw, Noise
from .scalars import graphed
from .schedules import Schedule
from .solvers import AdaptiveDormandPrince, Leg, Pair, ReversibleSolver, Solver, StochasticSolver
from .solvers.adaptive import Stretch, Witness
from .solvers.coupled import linked


@dataclass(frozen=True)
class Interval:
    """One step: from time ``start`` to ``end`` on the form of that name; ``aside`` where another form than the run's
    own is used, or the solver does not span it: its own ``aside`` takes the step."""

    start: float
    end: float
    form: str
    aside: bool


class Settled(NamedTuple):
    """An adaptive solver's run, on the steps it accepted.

    Attributes:
        plan: on their nodes.
        states: x at the nodes after the first.
        middles: time and x halfway through each step; None where they were not asked for or there is none.
    """

    plan: Plan
    states: list[Tensor]
    middles: list[tuple[float, Tensor] | None]


class Plan:
    """Which form each interval is stepped on, settled before the first network call.

    Args:
        solver: the method.
        form: name of the run's form.
        schedule, prediction: the model's.
        times: falling nodes.
        noise: what a stochastic solver adds.
        graph: the same times as a float64 tensor with a graph, where a gradient by them is wanted.

    Attributes:
        solver: the method, fitted to the number of steps.
        intervals: one per step, from the first node on.
        back: whether the steps are undone instead, from the last node to the first.

    Raises:
        InputError: the solver does not work on the form, needs a noise and has none or has one and needs none, an
            interval is singular for every form, or the network's prediction is blind at the first node.
        UnsupportedError: the solver is stochastic and a gradient by the times is wanted.
    """

    def __init__(
        self,
        solver: Solver,
        form: str,
        schedule: Schedule,
        prediction: str,
        times: Sequence[float],
        noise: Noise | None = None,
        graph: Tensor | None = None,
    ) -> None:
        self.graph = graph
        self.form, self.schedule, self.prediction, self.times = form, schedule, prediction, list(times)
        own = Form(form, schedule, prediction)
        solver.check_form(form)
        _check_noise(solver, noise, graph)
        self.noise = noise
        self.solver = solver.fitted(len(self.times) - 1)
        self.back = False
        self.intervals: list[Interval] = []
        for start, end in zip(self.times[:-1], self.times[1:], strict=True):
            used = own.aside(start, end)
            used.coefficients(start)
            aside = used is not own or not self.solver.spans(used.node(start), used.node(end))
            self.intervals.append(Interval(start, end, used.name, aside))

    @property
    def evaluations(self) -> int:
        """Evaluations of the model that the whole run makes."""
        return self.evaluations_in(range(len(self.intervals)))

    def evaluations_in(self, steps: Collection[int]) -> int:
        """Evaluations of the model that some of the run's steps make."""
        made = own = 0
        for index, interval in enumerate(self.intervals):
            count = self.solver.aside.evaluations(0) if interval.aside else self.solver.evaluations(own)
            own += not interval.aside
            made += count if index in steps else 0
        return made

    def states(self, x: Tensor, call: Call) -> Iterator[Tensor]:
        """The states at the nodes after the first, one by one, from ``x`` at the first.

        Each is on the path to the next, so a gradient reaches it too; of a reversible solver's pairs (see
        :meth:`pairs`) they are the first members, from twice ``x``.

        Args:
            x: state at the first node.
            call: ``call(x, t)`` -> the network's output, of x's shape.
        """
        if isinstance(self.solver, ReversibleSolver):
            yield from (pair.first for pair in self.pairs(Pair(x, x), call))
            return
        draw = None if self.noise is None else self.noise.path(self.schedule, self.times, x)
        forms = self.forms(call, draw)
        run, aside = self.solver.begin(), self.solver.aside.begin()
        for index, interval in enumerate(self.intervals):
            form = forms[interval.form]
            stepper = aside if interval.aside else run
            start, end = self.ends(index)
            x = stepper.step(form, x, form.node(start), form.node(end))
            yield x

    def ends(self, index: int) -> tuple[Any, Any]:
        """The times at which interval ``index`` starts and ends: floats, or numbers with a graph."""
        if self.graph is None:
            return self.times[index], self.times[index + 1]
        return graphed(self.graph[index]), graphed(self.graph[index + 1])

    def floating(self) -> Plan:
        """The plan without its times' graph."""
        plan = copy.copy(self)
        plan.graph = None
        return plan

    def settled(
        self, x: Tensor, call: Call, witness: Witness | None = None, *, middles: bool = False
    ) -> Settled:
        """The run on the steps that an adaptive solver accepts, found by one run without gradients.

        Args:
            x: state at the first node.
            call: ``call(x, t)`` -> the network's output, of x's shape.
            witness: told of every step, one to a singular end among them.
            middles: whether the states halfway through the steps are wanted.
        """
        solver, forms = self.solver, self.forms(call)
        if not isinstance(solver, AdaptiveDormandPrince):
            raise InputError(
                f"{solver!r} steps on the grid's nodes; only an adaptive solver looks for others"
            )
        fixed, times, states, last = solver.fixed, self.times[:1], [x], None
        between: list[tuple[float, Tensor] | None] = []
        with torch.no_grad():
            for interval in self.intervals:
                form = forms[interval.form]
                a, b = form.node(interval.start), form.node(interval.end)
                if interval.aside:
                    found = Stretch([b.t], [fixed.begin().step(form, states[-1], a, b)], [None], None)
                    if witness is not None:
                        witness.beside()
                else:
                    found = solver.accepted(form, states[-1], a, b, last, witness=witness, middles=middles)
                times, states, last = times + found.times, states + found.states, found.last
                between += found.middles
        graph = None
        if self.graph is not None:  # the nodes given move, the accepted ones between them do not
            given = dict(zip(self.times, self.graph, strict=True))
            graph = torch.stack([given[t] if t in given else self.graph.new_tensor(t) for t in times])
        plan = Plan(fixed, self.form, self.schedule, self.prediction, times, graph=graph)
        return Settled(plan, states[1:], between)

    def forms(self, call: Call | None = None, draw: Draw | None = None) -> dict[str, Form]:
        """The forms on the run's model and noise, by name."""
        return {name: Form(name, self.schedule, self.prediction, call, draw) for name in FORMS}

    def reversible(self) -> ReversibleSolver:
        """The solver.

        Raises:
            InputError: it is not reversible.
        """
        if not isinstance(self.solver, ReversibleSolver):
            raise InputError(
                f"{self.solver!r} cannot be undone step by step: use a reversible solver, McCallumFoster(...), "
                "ReversibleHeun() or EDICT()"
            )
        return self.solver

    def undone(self) -> Plan:
        """The plan that a reversible solver goes back by, from the last node to the first.

        Raises:
            InputError: the solver is not reversible.
        """
        self.reversible()
        plan = copy.copy(self)
        plan.back = not self.back
        return plan

    def legs(self) -> list[Leg]:
        """A reversible solver's steps, in the order they are taken.

        Raises:
            InputError: the solver is not reversible.
        """
        solver, forms, legs = self.reversible(), self.forms(), []
        for index, interval in enumerate(self.intervals):
            form = forms[interval.form]
            used = solver.aside if interval.aside else solver
            start, end = self.ends(index)
            legs.append(used.leg(index, form.name, form.node(start), form.node(end)))
        return linked([leg.inverse() for leg in reversed(legs)] if self.back else legs)

    def pairs(self, pair: Pair, call: Call, enter: Callable[[int], None] | None = None) -> Iterator[Pair]:
        """A reversible solver's pairs of states at the nodes after the one it starts from, one by one.

        Each is on the path to the next, so a gradient reaches it too.

        Args:
            pair: at the first node; at the last where the plan is :meth:`undone`.
            call: ``call(x, t)`` -> the network's output, of x's shape.
            enter: told the number of the interval whose conditioning the next calls are made with.

        Raises:
            InputError: the solver is not reversible.
        """
        legs, forms = self.legs(), self.forms(call)
        run = self.reversible().begin(pair)
        for leg in legs:
            yield run.take(forms[leg.form], leg, enter)


def _check_noise(solver: Solver, noise: Noise | None, graph: Tensor | None) -> None:
    wanted = isinstance(solver, StochasticSolver) and solver.eta > 0
    if wanted and noise is None:
        raise InputError(
            f"{solver!r} adds noise: give sample(seed=0), or noise= with tensors or a Brownian(seed)"
        )
    if noise is not None and not wanted:
        raise InputError(f"{solver!r} adds no noise, but {noise!r} was given: leave noise and seed out")
    if isinstance(solver, StochasticSolver) and graph is not None:
        raise UnsupportedError(
            f"{solver!r} steps along a Brownian path, which has no derivative by the grid's times: detach them, or use "
            "a solver of the ODE"
        )
