"""The network calls of a whole-run method: forward without a graph, and again with one in the backward pass."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import nests
from ..ambient import Ambient
from ..carried import Carried
from ..conditioning import Branch
from ..repeats import Glimpse
from ..weights import Weights
from .accumulate import Sums
from .base import Job
from .context import NetworkContext
from .reach import sequence_number
from .replay import Trace


@dataclass(frozen=True)
class _Seen:
    """What was seen of one network call: its state and the network's output; and what else it depended on."""

    x: Glimpse | None
    branch: Branch
    ambient: Ambient
    carried: Carried | None
    out: Glimpse | None


class Calls:
    """The evaluations of one run. As ``calls(x, t)`` it is the forward pass's; :meth:`again` is the way back's.

    The first evaluation is made with a graph, which is looked through and dropped: what the network reaches is known
    from then on.

    Attributes:
        context: what the calls share.
        interval: the interval being stepped; the forward loop sets it.
        made: state, time and output of this interval's evaluations, while :attr:`recording`.
        noting: whether a few entries of the evaluations are kept, for :meth:`again` to see that it gives the same.
    """

    def __init__(self, job: Job) -> None:
        self.model, self.stats = job.model, job.stats
        self.context = NetworkContext(job.model, job.cond, len(job.x))
        self.interval = 0
        self.recording = False
        self.noting = True
        self.made: list[tuple[Tensor, float, Tensor]] = []
        self._opened = not torch.is_grad_enabled()
        self._ambients: dict[int, list[Ambient]] = {}
        self._carried: dict[int, list[Carried | None]] = {}
        self._weights: dict[int, Weights] = {}
        self._seen: dict[float, list[_Seen]] = {}  # by time
        self._last: Ambient | None = None

    @property
    def float16(self) -> bool:
        """Whether float16 is among the run's arithmetic: then gradients may overflow, and a gradient scaler reacts."""
        autocast = any(torch.float16 in a.autocast_dtypes for found in self._ambients.values() for a in found)
        return autocast or any(t.dtype == torch.float16 for t in self.context.weights.tensors)

    def branches(self, interval: int) -> tuple[Branch, ...]:
        """The network calls of one evaluation in that interval."""
        return self.context.conditions.at(interval)

    @property
    def varies(self) -> bool:
        """Whether the conditioning changes from step to step."""
        return self.context.conditions.steps is not None

    def output_at(self, x: Tensor, t: float) -> Tensor | None:
        """The output of this interval's evaluation at the state ``x`` and time ``t``, if there was one."""
        for state, time_, out in self.made:
            if time_ == t and state.data_ptr() == x.data_ptr():
                return out
        return None

    def enter(self, interval: int) -> None:
        """The forward pass begins an interval."""
        self.interval = interval
        self.made = []
        self._ambients[interval], self._carried[interval] = [], []
        self._weights[interval] = self.context.snapshot()

    def __call__(self, x: Tensor, t: float) -> Tensor:
        t = self.model.check_time(t)
        outputs = []
        for branch in self.branches(self.interval):
            self.model.nfe += 1
            self.stats.calls_forward += 1
            self._ambients[self.interval].append(self._surroundings(x, branch))
            self._carried[self.interval].append(self.context.snapshot().carried())
            out, seen = self.context.run(x, branch, t) if self._opened else self._open(x, t, branch)
            outputs.append(out)
            if self.noting:
                self._seen.setdefault(t, []).append(self._noted(x, branch, self.interval, -1, seen))
        out = self.model.combine(outputs)
        if self.recording:
            self.made.append((x, t, out))
        return out

    def evaluate(self, x: Tensor, t: float, interval: int) -> Tensor:
        """The network's output in a backward pass, without a graph, as in that interval."""
        t = self.model.check_time(t)
        outputs = []
        with torch.no_grad():
            for i, branch in enumerate(self.branches(interval)):
                self.stats.calls_redone += 1
                with self._as_it_was(interval, i):
                    out, seen = self.context.run(x, branch, t)
                outputs.append(out)
                self._check_repeats(t, self._noted(x, branch, interval, i, seen))
        return self.model.combine(outputs)

    def again(
        self, x: Tensor, t: float, interval: int, number: int = 0, *, timed: bool = False
    ) -> Evaluation:
        """One evaluation with a graph, in a backward pass.

        Args:
            x: state.
            t: time.
            interval: whose conditioning, weights and surroundings are used.
            number: as which of the interval's evaluations: it draws the same random numbers.
            timed: whether the derivative by ``t`` is wanted too.

        Raises:
            StateChangedError: weights, modes or conditioning have changed since; or this is the forward pass's own
                evaluation, at its state and time, and the network gives something else.
            MissingGradientError: the network uses a tensor that it did not use in the run's first call.
        """
        t = self.model.check_time(t)
        context, start = self.context, time.perf_counter()
        context.check_unchanged(self._weights[interval])
        branches = self.branches(interval)
        first = number * len(branches)
        if first >= len(self._ambients[interval]):
            first = 0
        traces, time_ = [], torch.tensor(t, dtype=torch.float64) if timed else t
        for i, branch in enumerate(branches):
            self.stats.calls_redone += 1
            with self._as_it_was(interval, first + i), torch.enable_grad():
                floor = sequence_number()
                traces.append(context.trace(x.detach().requires_grad_(), branch, time_))
            context.check_reach(traces[-1], floor)
            self._check_repeats(t, self._noted(x, branch, interval, first + i, traces[-1].seen))
        self.stats.seconds_redone += time.perf_counter() - start
        return Evaluation(self, traces)

    def _open(self, x: Tensor, t: float, branch: Branch) -> tuple[Tensor, Glimpse | None]:
        self._opened = True
        with torch.enable_grad():
            floor = sequence_number()
            trace = self.context.trace(x.detach().requires_grad_(), branch, t)
        self.context.adopt(trace, floor)
        return trace.out.detach(), trace.seen

    def _noted(self, x: Tensor, branch: Branch, interval: int, number: int, out: Glimpse | None) -> _Seen:
        """What is seen of a call in the surroundings of the interval's call of that number."""
        surroundings = self._ambients[interval][number], self._carried[interval][number]
        return _Seen(Glimpse.of(x), branch, *surroundings, out)

    def _check_repeats(self, t: float, now: _Seen) -> None:
        """Compare with the forward pass's calls that were the same one: at this state and time, in surroundings that
        are equal. Methods also ask at states of their own, where there is nothing to compare with."""
        for then in self._seen.get(t, ()):
            alike = then.branch is now.branch and then.ambient is now.ambient and then.carried is now.carried
            if alike and then.x is not None and now.x is not None:
                self.context.check_repeats(then.out, now.out, then.ambient, states=(then.x, now.x))

    @contextmanager
    def _as_it_was(self, interval: int, number: int) -> Iterator[None]:
        """Inside the block, what a call sees is as it was for the interval's call of that number."""
        carried = self._carried[interval][number]
        buffers = nullcontext() if carried is None else carried.restored()
        with buffers, self._ambients[interval][number].restored():
            yield

    def _surroundings(self, x: Tensor, branch: Branch) -> Ambient:
        # Calls made in the same surroundings share one snapshot: it holds 5 kB of random state.
        now = Ambient([x, *nests.tensors(branch.cond)], self.context.weights.devices)
        if self._last is None or not self._last.same_as(now):
            self._last = now
        return self._last


class Evaluation:
    """One evaluation with its graph: the network's output, and vector–Jacobian products with it.

    Attributes:
        out: the guided output, without a graph, of x's shape.
        on_t: the products by the time, summed over :meth:`pull` calls: float64, (). 0 if it was not asked for.
    """

    def __init__(self, calls: Calls, traces: Sequence[Trace]) -> None:
        self._calls, self._traces = calls, list(traces)
        self.out = calls.model.combine([trace.out.detach() for trace in traces])
        self.on_t = torch.zeros((), dtype=torch.float64)

    def pull(self, cotangent: Tensor, sums: Sums | None, *, keep: bool = False) -> Tensor:
        """``cotangent`` times the Jacobian by x; those by the shared tensors are added to ``sums``.

        Args:
            cotangent: of x's shape.
            sums: where to, or None if nothing but x is asked for.
            keep: whether more products will be asked for; otherwise the graph is freed.
        """
        total: Tensor | None = None
        for trace, part in zip(self._traces, self._parts(cotangent), strict=True):
            if trace.out.requires_grad:
                self._calls.stats.vjps += 1
                on_x, on_t = _product(trace, part, sums, keep)
                if on_x is not None:
                    total = on_x if total is None else total + on_x
                if on_t is not None:
                    self.on_t = self.on_t + on_t
        if not keep:
            self._traces = []
        return torch.zeros_like(cotangent) if total is None else total

    def _parts(self, cotangent: Tensor) -> Sequence[Tensor]:
        # Guidance is linear in the branches' outputs, so where they are does not matter.
        if len(self._traces) == 1:
            return [cotangent]
        with torch.enable_grad():
            outputs = [torch.zeros_like(cotangent).requires_grad_() for _ in self._traces]
            return torch.autograd.grad(self._calls.model.combine(outputs), outputs, cotangent)


def _product(
    trace: Trace, cotangent: Tensor, sums: Sums | None, keep: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The products by x and by t."""
    own = [trace.x] if trace.t is None else [trace.x, trace.t]
    nothing: AbstractContextManager[list[Tensor]] = nullcontext([])
    with nothing if sums is None else sums.collecting(trace.leaves) as leaves:
        found = torch.autograd.grad(
            trace.out, [*own, *leaves], cotangent, retain_graph=keep, allow_unused=True
        )
    return found[0], found[1] if trace.t is not None else None
