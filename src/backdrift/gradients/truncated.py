"""A run whose gradient flows through some steps only, made call by call: the equations are in :mod:`..through`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..trace import Watch

if TYPE_CHECKING:
    from .base import Evaluator, Job


class Truncated:
    """Another evaluator's evaluations: with a graph in the steps that carry the gradient, without one in the others.

    Args:
        inner: makes them.
        watch: of the run; it has begun.

    Attributes:
        interval: the interval being stepped; set by the run.
    """

    def __init__(self, inner: Evaluator, watch: Watch) -> None:
        self.inner, self.watch = inner, watch
        self.interval = 0
        self._made = 0

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """The network's guided output at the state ``x`` (B, …) and time ``t``, of x's shape."""
        self.inner.interval = self.interval
        self._made += 1
        if self.interval not in self.watch.chosen.steps:
            with torch.no_grad():
                return self.inner(x.detach(), t)
        out = self.inner(self.watch.trace.through.input_of(x), t)
        self.watch.output(self.interval, out, self._made)
        return out


def states(job: Job, inner: Evaluator, watch: Watch) -> Iterator[Tensor]:
    """The states at the nodes after the first, their boundaries watched, cut off where the choice says so."""
    call = Truncated(inner, watch)
    path = job.plan.states(job.x, call)
    watch.boundary(0, job.x)
    for index in range(len(job.plan.intervals)):
        call.interval = index
        with torch.no_grad() if index < watch.chosen.cut else nullcontext():
            x = next(path)
        watch.boundary(index + 1, x)
        yield x
