"""The only time loop: a solver, on a form, along a grid's nodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from .forms import FORMS, Call, Form
from .schedules import Schedule
from .solvers import Solver


@dataclass(frozen=True)
class Interval:
    """One step: from time ``start`` to ``end`` on the form of that name; ``aside`` where it is not the run's own."""

    start: float
    end: float
    form: str
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

    def __init__(
        self, solver: Solver, form: str, schedule: Schedule, prediction: str, times: Sequence[float]
    ) -> None:
        self.solver, self.schedule, self.prediction, self.times = solver, schedule, prediction, list(times)
        own = Form(form, schedule, prediction)
        solver.check_form(form)
        self.intervals: list[Interval] = []
        for start, end in zip(self.times[:-1], self.times[1:], strict=True):
            used = own.aside(start, end)
            used.coefficients(start)
            self.intervals.append(Interval(start, end, used.name, used is not own))

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
        forms = {name: Form(name, self.schedule, self.prediction, call) for name in FORMS}
        run, aside = self.solver.begin(), self.solver.aside.begin()
        for interval in self.intervals:
            form = forms[interval.form]
            stepper = aside if interval.aside else run
            x = stepper.step(form, x, form.node(interval.start), form.node(interval.end))
            yield x
