"""The gradient of a reversible run: the states are not stored but rebuilt, by undoing the steps in closed form."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import InputError
from ..solvers import Pair, State
from .base import GradientMethod, Job
from .sweep import ADJOINT, Record, Task, Way, link
from .undoing import Undoing


class Reversible(GradientMethod):
    """Plain autograd's gradient with memory that does not grow with the number of steps, not even by the states.

    Needs a reversible solver (:class:`~backdrift.McCallumFoster`, :class:`~backdrift.ReversibleHeun`,
    :class:`~backdrift.EDICT`). The way back undoes each step in closed form, so it makes as many network calls as the
    forward pass. In exact arithmetic the states are those of the forward pass; in floating point they drift from
    them, by far less than 1e-9 in float64. The forward pass keeps the first pair, the last one, and a few between;
    when the way back comes to one, it notes the distance in ``solution.stats.drift`` and goes on from the kept one.

    With ``sample(trajectory=True)`` the states exist anyway and are used; nothing drifts.

    Args:
        tolerance: the largest relative distance (of one sample's state, in the Euclidean norm) that is accepted.
            Beyond it the backward pass warns, naming it, and starts anew from the states of all steps, which it
            computes again from the first pair and stores: it is then slower and takes memory that grows.
        checkpoints: how many pairs are kept between the first and the last.
        stages: ``"together"``: the graphs of all of a push's evaluations are held at once (as many as the coupled
            method has stages). ``"apart"``: one at a time; all but a push's last evaluation are then made
            once more.

    Raises:
        InputError: an argument is out of range; when a run begins, the solver is not reversible.
    """

    takes_pairs = True

    def __init__(self, tolerance: float = 1e-3, *, checkpoints: int = 3, stages: str = "together") -> None:
        if not isinstance(tolerance, int | float) or not tolerance > 0:
            raise InputError(f"tolerance must be positive; got {tolerance!r}")
        if not isinstance(checkpoints, int) or isinstance(checkpoints, bool) or checkpoints < 0:
            raise InputError(f"checkpoints must be a whole number >= 0; got {checkpoints!r}")
        if stages not in ("together", "apart"):
            raise InputError(f"stages is 'together' or 'apart'; got {stages!r}")
        self.tolerance, self.checkpoints, self.together = float(tolerance), checkpoints, stages == "together"

    def __repr__(self) -> str:
        stages = "" if self.together else ", stages='apart'"
        return f"Reversible({self.tolerance:g}, checkpoints={self.checkpoints}{stages})"

    def run(self, job: Job) -> Iterator[State]:
        job.plan.reversible()
        return _ReversibleRun(job, self).states()


class _ReversibleRun(Way):
    """One run. As one tensor, a pair is (2, B, …)."""

    def __init__(self, job: Job, method: Reversible) -> None:
        super().__init__(job, repr(method))
        self.method, self.count = method, len(self.plan.intervals)
        self.legs = self.plan.floating().legs()
        marks = range(1, method.checkpoints + 1)
        self.marks = {round(self.count * m / (method.checkpoints + 1)) for m in marks} | {self.count}

    def states(self) -> Iterator[State]:
        job, pair = self.job, self.job.pair
        assert pair is not None  # sample gives one to every reversible solver
        for interval in range(self.count):
            self.calls.enter(interval)
        inside = Pair(*(x.detach() for x in pair))
        inner = self.plan.floating().pairs(inside, self.calls, self._interval)
        outer, token, record = torch.stack(pair), None, Record()
        for index in range(self.count):
            # A way back comes to states of the forward pass's own only here: nothing else is to be kept.
            self.calls.noting = job.trajectory or index + 1 in self.marks
            with torch.no_grad():
                end = next(inner)
            if index == 0 and torch.is_grad_enabled():
                token = self._open()
            if self.chain is None or (token is None and not outer.requires_grad):
                yield end
                continue
            if index == 0 and not job.trajectory:
                record[0,] = torch.stack(inside)
            if job.trajectory or index + 1 in self.marks:
                record[index + 1,] = torch.stack(end)
            if job.trajectory or index == self.count - 1:
                first = index if job.trajectory else 0
                made, token = link(self, first, index + 1, record, record[index + 1,].detach(), outer, token)
                end, record = Pair(*made.unbind()), Record()
                outer = torch.stack(end) if job.trajectory else made
            yield end

    def back(self, first: int, last: int, record: Record, adjoint: Tensor, task: Task) -> Tensor:
        known = {key[0]: Pair(*pair.unbind()) for key, pair in record.items()}
        found = self._sweep(first, last, known, adjoint, task)
        if found is None:
            task.restart()
            known |= dict(enumerate(self._undoing(task).forward(known[0]), 1))
            found = self._sweep(first, last, known, adjoint, task)
            assert found is not None  # nothing is rebuilt over more than one step
        return torch.stack(found)

    def _undoing(self, task: Task) -> Undoing:
        if "undoing" not in task.carry:
            task.carry["undoing"] = Undoing(self.plan, self.legs, self.calls, task.sums, self.method.together)
        return task.carry["undoing"]

    def _sweep(
        self, first: int, last: int, known: dict[int, Pair], adjoint: Tensor, task: Task
    ) -> Pair | None:
        """The adjoints at the start of step ``first``; None if the rebuilt states have drifted too far."""
        undoing, pair, gs, since = self._undoing(task), known[last], Pair(*adjoint.unbind()), last
        for index in reversed(range(first, last)):
            task.at(self.legs[index].interval)
            pair, gs = undoing.over(index, pair, gs)
            task.see(ADJOINT, gs.first)
            task.see(ADJOINT, gs.second)
            if index in known:
                # A single step rebuilds to the last digit, and where all pairs are known there is nothing to ask.
                if since - index > 1 and not self._close(pair, known[index], index, since):
                    return None
                pair, since = known[index], index
        return gs

    def _close(self, pair: Pair, known: Pair, index: int, since: int) -> bool:
        stats = self.job.stats
        drift = max(_distance(a, b) for a, b in zip(pair, known, strict=True))
        stats.drift = max(stats.drift or 0.0, drift)
        if drift <= self.method.tolerance:
            return True
        stats.drift = drift if math.isnan(drift) else stats.drift
        stats.fell_back = True
        warnings.warn(
            f"{self.name}: undoing {since - index} steps of {self.plan.solver!r} led to a state that is off by "
            f"{drift:.2g} (relative; the tolerance is {self.method.tolerance:g}), so this backward pass starts anew "
            "from stored states. Use more checkpoints, fewer steps, float64, a solver that amplifies rounding less, "
            "or gradient=Exact()",
            RuntimeWarning,
            stacklevel=2,
        )
        return False

    def _interval(self, interval: int) -> None:
        self.calls.interval = interval


def _distance(x: Tensor, known: Tensor) -> float:
    """The largest ‖x - known‖ / ‖known‖ of the batch's samples."""
    gap, size = ((v.flatten(1) if v.ndim > 1 else v[:, None]).norm(dim=1) for v in (x - known, known))
    return float((gap / size.clamp_min(torch.finfo(size.dtype).tiny)).max())
