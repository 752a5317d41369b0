"""What an adaptive solver's search leaves to a whole-run method: the run itself, so that no call is made twice.

The search (:mod:`backdrift.solvers.adaptive`) is made with the method's own :class:`~.calls.Calls`, and what it accepts
are the run's steps. A method that needs no more of its forward pass than states and outputs at the nodes has them then.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from ..integrate import Settled
from ..solvers.adaptive import Witness
from .calls import Calls

if TYPE_CHECKING:
    from .base import Job


@dataclass
class Taken:
    """A forward pass that has been made.

    Attributes:
        calls: those it was made with.
        states: at the nodes after the first.
        outputs: the network's at the nodes, as far as they are known and wanted.
        middles: time and state halfway through the steps, as far as they are wanted.
    """

    calls: Calls
    states: deque[Tensor]
    outputs: dict[int, Tensor]
    middles: dict[int, tuple[float, Tensor]]

    def drop(self) -> None:
        """Let go of the tensors: who needs one has it by now."""
        self.states.clear()
        self.outputs.clear()
        self.middles.clear()


def settle(job: Job, *, between: bool) -> Job:
    """The job on the steps that its adaptive solver accepts, with the run that they are.

    Args:
        between: whether outputs at the nodes and states halfway are wanted, to interpolate by.
    """
    calls = Calls(job)
    watch = _Recorder(calls, between)
    settled: Settled = job.plan.settled(job.x.detach(), watch.call, watch, middles=between)
    middles = {i: middle for i, middle in enumerate(settled.middles) if middle is not None}
    taken = Taken(calls, deque(settled.states), watch.outputs, middles)
    return replace(job, plan=settled.plan, taken=taken)


class _Recorder(Witness):
    """Makes the search's calls, each in the interval that it belongs to, and keeps the outputs at the nodes."""

    def __init__(self, calls: Calls, keeping: bool) -> None:
        self.calls, self.keeping = calls, keeping
        self.outputs: dict[int, Tensor] = {}
        self._index = 0
        self._last: Tensor | None = None
        calls.enter(0)

    def call(self, x: Tensor, t: float) -> Tensor:
        out = self.calls(x, t)
        if self.keeping:
            # The first call of an interval of the grid is at its first node.
            self.outputs.setdefault(self._index, out)
            self._last = out
        return out

    def accepted(self, step: float) -> None:
        self._next()
        if self._last is not None:  # the step's last call is at the state it ends in
            self.outputs[self._index] = self._last

    def beside(self) -> None:
        self._next()

    def _next(self) -> None:
        self._index += 1
        self.calls.enter(self._index)
