"""The true flow's gradient: many steps of a high-order solver, and how far that itself is to be trusted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..gradients import Exact
from .problem import Problem
from .pull import Difference, pull
from .sampler import Sampler


@dataclass(frozen=True)
class FlowGradient:
    """The flow's gradient as well as it is known.

    Attributes:
        gradient: (n,), float64: the finer of the last two.
        value: the loss there.
        uncertainty: relative difference of the last two; the finer one's own error is less while it converges.
        sampler: of the finer one.
        history: steps and the difference to the half as many, from the coarsest on.
        calls: network calls that all of it took.
        seconds: likewise.
    """

    gradient: Tensor
    value: float
    uncertainty: float
    sampler: Sampler
    history: tuple[tuple[int, float], ...]
    calls: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For a record: all but the gradient."""
        return {
            "solver": repr(self.sampler.solver),
            "steps": self.sampler.steps,
            "loss": self.value,
            "uncertainty": self.uncertainty,
            "history": [{"steps": steps, "difference": change} for steps, change in self.history],
            "network_calls": self.calls,
            "seconds": self.seconds,
        }


def flow_gradient(
    problem: Problem, sampler: Callable[[int], Sampler], first: int, last: int, goal: float
) -> Iterator[str | FlowGradient]:
    """The flow's gradient by doubling the steps until the last two agree.

    Args:
        sampler: the reference's with that many steps.
        first: steps of the coarsest.
        last: the most steps.
        goal: the relative difference at which to stop.

    Yields:
        What is being done, and at the end the result.
    """
    steps, history, calls, seconds = first, [], 0, 0.0
    yield f"flow, {steps} steps"
    before = pull(problem, sampler(steps), Exact())
    while True:
        calls, seconds = calls + before.stats.network_calls, seconds + before.seconds
        steps *= 2
        yield f"flow, {steps} steps"
        after = pull(problem, sampler(steps), Exact())
        change = Difference.of(before.gradient, after.gradient).relative
        history.append((steps, change))
        if change <= goal or 2 * steps > last:
            break
        before = after
    calls, seconds = calls + after.stats.network_calls, seconds + after.seconds
    yield FlowGradient(after.gradient, after.value, change, sampler(steps), tuple(history), calls, seconds)
