"""The only time loop: a solver, on a form, along a grid's nodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from .errors import InputError
from .forms import Call, Form
from .schedules import Schedule
from .solvers import Solver


@dataclass(frozen=True)
class Interval:
    """One step: from time ``start`` to ``end`` on ``form``; ``aside`` where that is not the run's own form."""

    start: float
    end: float
    form: Form
    aside: bool


class Plan:
    """Which form each interval is stepped on, settled before the first network call.

    Args:
        solver: the method.
        form: name of the run's form.
        schedule, prediction: the model's.
        times: falling nodes.

    Raises:
        InputError: the solver does not work on the form, an interval is singular for every form, or the
            network's prediction is blind at the first node.
    """

    def __init__(self, solver: Solver, form: str, schedule: Schedule, prediction: str, times: Sequence[float]) -> None:
        self.solver, self.times = solver, list(times)
        self._call: Call | None = None
        own = Form(form, schedule, prediction, self._evaluate)
        solver.check_form(form)
        self.intervals: list[Interval] = []
        for start, end in zip(self.times[:-1], self.times[1:], strict=True):
            used = own.aside(start, end)
            self.intervals.append(Interval(start, end, used, used is not own))
        self.intervals[0].form.coefficients(self.times[0])

    @property
    def evaluations(self) -> int:
        """Evaluations of the model that the whole run makes."""
        asides = sum(self.solver.aside.evaluations(0) for i in self.intervals if i.aside)
        own = sum(1 for i in self.intervals if not i.aside)
        return asides + sum(self.solver.evaluations(index) for index in range(own))

    def states(self, x: Tensor, call: Call) -> Iterator[Tensor]:
        """The states at the nodes after the first, one by one, from ``x`` at the first.

        Each is on the path to the next, so a gradient reaches it too.

        Args:
            x: state at the first node.
            call: ``call(x, t)`` -> the network's output, of x's shape.
        """
        self._call = call
        run, aside = self.solver.begin(), self.solver.aside.begin()
        for interval in self.intervals:
            form = interval.form
            stepper = aside if interval.aside else run
            x = stepper.step(form, x, form.node(interval.start), form.node(interval.end))
            yield x

    def _evaluate(self, x: Tensor, t: float) -> Tensor:
        if self._call is None:
            raise InputError("a plan evaluates the model only while states() runs")
        return self._call(x, t)
