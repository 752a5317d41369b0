"""Whole-run gradient methods in autograd: the forward pass without a graph, then a sweep back over its intervals.

A run is one node of the outer graph, or one for each interval where the states between are handed to the user. A node
keeps what the method asks for, and its backward pass is the method's own way back over the node's intervals. Shared
tensors (weights, conditioning) do not pass through the nodes: a token threads them on one string, and the node at its
head hands over the sums (:class:`~backdrift.gradients.replay.Chain`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..scalars import add_scaled, rescaled
from ..solvers import State
from .accumulate import Sums
from .base import Job
from .calls import Calls
from .findings import Findings
from .legs import usable
from .numbers import dot
from .reach import describe
from .replay import Chain

Record = dict[tuple[Any, ...], Tensor]
ADJOINT = "the adjoint dL/dx"


@dataclass
class Task:
    """One backward pass over a run.

    Attributes:
        sums: of the shared tensors' gradients; None if none is asked for.
        timed: whether the gradient by the run's times is asked for.
        carry: what a method takes along from node to node.
    """

    sums: Sums | None
    findings: Findings | None
    timed: bool
    carry: dict[str, Any] = field(default_factory=dict)

    def at(self, step: int) -> None:
        """The sweep is in that step now."""
        if self.findings is not None:
            self.findings.step = step

    def restart(self) -> None:
        """The sweep begins once more: nothing of it counts."""
        if self.sums is not None:
            self.sums.clear()
        if self.findings is not None:
            self.findings.forget()
        self.carry.clear()

    def see(self, quantity: str, value: Tensor) -> Tensor:
        """``value``, noted under the current step."""
        if self.findings is not None:
            self.findings.see(quantity, value)
        return value


class Way(ABC):
    """One run of a whole-run method: how it goes back, and who asked for what.

    Args:
        job: the run.
        name: the method, for messages.

    Attributes:
        times: the run's nodes as a tensor with a graph, where a gradient by them may be asked for.
    """

    def __init__(self, job: Job, name: str) -> None:
        self.job, self.plan, self.name = job, job.plan, name
        # A view of its own, so that the engine can be asked whether its gradient is wanted.
        self.times = None if self.plan.graph is None else self.plan.graph.view_as(self.plan.graph)
        self.calls = Calls(job) if job.taken is None else job.taken.calls
        self.chain: Chain | None = None
        self._tasks: dict[int, Task] = {}

    @abstractmethod
    def back(self, first: int, last: int, record: Record, adjoint: Tensor, task: Task) -> Tensor:
        """The adjoint dL/dx at the start of interval ``first``.

        Args:
            first, last: the intervals of this node, ``first`` to ``last - 1``.
            record: what was kept of them.
            adjoint: dL/dx at the end of interval ``last - 1``.
            task: the backward pass.
        """

    def by_times(
        self, first: int, last: int, record: Record, ends: tuple[Tensor, Tensor], task: Task
    ) -> Tensor:
        """The gradient by the run's nodes, float64 (N + 1,), that these intervals add. Only asked of a method whose
        ``by_times`` is set.

        Args:
            ends: dL/dx at their start and at their end.
        """
        raise UnsupportedError(f"{self.name} gives no gradient by the grid's times")

    def task(self) -> Task:
        """The backward pass that is running. To be called inside it."""
        assert self.chain is not None
        number = torch._C._current_graph_task_id()
        if number not in self._tasks:
            findings = None
            if self.job.check_finite:
                findings = Findings(self.plan.times, raises=not self.calls.float16)
            wanted = self.chain.wanted(number)
            sums = Sums(self.calls.context.shared, wanted, findings) if wanted else None
            node = None if self.times is None else self.times.grad_fn
            timed = node is not None and torch._C._will_engine_execute_node(node)
            self._tasks[number] = Task(sums, findings, timed)
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._ended(number))
        return self._tasks[number]

    def finish(self, task: Task) -> None:
        """The sweep has come to the run's start: hand the sums over, and report what was not finite."""
        assert self.chain is not None
        if task.sums is not None:
            self.chain.put(torch._C._current_graph_task_id(), task.sums.buffers)
        self._report(task)

    def drop(self) -> None:
        """The backward pass has failed: let go of its sums."""
        self._tasks.pop(torch._C._current_graph_task_id(), None)

    def _open(self) -> Tensor | None:
        self.chain = Chain(self.calls.context.shared, self.job.stats)
        return self.chain.head()

    def _report(self, task: Task) -> None:
        if task.findings is not None:
            task.findings.report(lambda: self._spoiled(task.sums))

    def _spoiled(self, sums: Sums | None) -> list[str]:
        """The names of the shared tensors whose sums are not finite."""
        if sums is None:
            return []
        shared = self.calls.context.shared
        pairs = zip(sums.wanted, sums.buffers, strict=True)
        spoiled = [i for i, buffer in pairs if buffer is not None and not bool(buffer.isfinite().all())]
        return [self._name(shared[i], i) for i in spoiled]

    def _name(self, tensor: Tensor, index: int) -> str:
        conds = len(self.calls.context.trained_conds)
        if index < conds:
            return f"conditioning tensor {index} of shape {tuple(tensor.shape)}"
        return describe(self.calls.context.holders, tensor)

    def _ended(self, number: int) -> None:
        task = self._tasks.pop(number, None)
        if task is not None:
            self._report(task)


class WayBack(Way):
    """One run of a whole-run method on tensors: what it keeps of the forward pass, and how it goes back."""

    @abstractmethod
    def keep(self, index: int, start: Tensor, end: Tensor) -> Record:
        """What to keep of an interval, from the state ``start`` to ``end``; ``calls.made`` are its evaluations."""

    def states(self) -> Iterator[State]:
        """The forward pass: the states at the nodes after the first."""
        job, count = self.job, len(self.plan.intervals)
        inner, inside = self._forward(), job.x.detach()
        outer, token, record = job.x, None, Record()
        for index in range(count):
            with torch.no_grad():
                end = next(inner)
            if index == 0 and torch.is_grad_enabled():
                token = self._open()
            if self.chain is None or (token is None and self.times is None and not job.x.requires_grad):
                yield end
                continue
            record |= self.keep(index, inside, end.detach())
            if self.times is not None:
                record |= {("state", index): inside, ("state", index + 1): end.detach()}
            inside = end.detach()
            if job.trajectory or index == count - 1:
                first = index if job.trajectory else 0
                outer, token = link(self, first, index + 1, record, end, outer, token)
                record, end = {}, outer
            yield end
        if job.taken is not None:
            job.taken.drop()

    def _forward(self) -> Iterator[Tensor]:
        """The states at the nodes after the first, without a graph."""
        if (taken := self.job.taken) is not None:
            while taken.states:
                yield taken.states.popleft()
            return
        inner = self.plan.floating().states(self.job.x.detach(), self.calls)
        for index in range(len(self.plan.intervals)):
            self.calls.enter(index)
            yield next(inner)

    def boundary_terms(self, first: int, last: int, record: Record, ends: tuple[Tensor, Tensor]) -> Tensor:
        """:meth:`by_times` of the true flow: a · dx/dt at the end and -a · dx/dt at the start; 0 by all other nodes.

        NaN where dx/dt has no value: where it is infinite (sigma = 0 on most schedules) or the network cannot be asked.
        """
        total = torch.zeros(len(self.plan.times), dtype=torch.float64)
        form = self.plan.forms()["original"]
        for node, interval, adjoint, sign in ((last, last - 1, ends[1], 1.0), (first, first, ends[0], -1.0)):
            t, x = self.plan.times[node], record["state", node]
            if not usable(form, self.job.model, t):
                total[node] += torch.nan
                continue
            on_x, on_output = form.coefficients(t)
            slope = add_scaled(rescaled(self.calls.evaluate(x, t, interval), on_output), [(on_x, x)])
            total[node] += sign * dot(adjoint, slope).cpu()
        return total


def link(
    way: Way, first: int, last: int, record: Record, end: Tensor, outer: Tensor, token: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The state ``end`` with its place in the outer graph, and the next token.

    Args:
        way: goes back.
        first, last: the intervals ``first`` to ``last - 1`` lead to it.
        record: what the way back needs of them.
        end: the state, without a graph.
        outer: the state at the start of interval ``first``, with its graph.
        token: of the node before; None if nothing is shared.
    """
    made = _Link.apply(way, first, last, record, [end], outer, token, way.times)
    return (made, None) if token is None else made


class _Link(torch.autograd.Function):
    """Intervals ``first`` to ``last - 1`` as one node: (state, token) -> (state at the end, next token)."""

    @staticmethod
    def forward(
        ctx: Any,
        way: Way,
        first: int,
        last: int,
        record: Record,
        end: list[Tensor],
        x: Tensor,
        token: Tensor | None,
        times: Tensor | None,
    ) -> Any:
        ctx.way, ctx.first, ctx.last, ctx.keys = way, first, last, list(record)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*record.values())
        # In a list, so that autograd sees an output and not an input handed back.
        return end.pop() if token is None else (end.pop(), token.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        way: Way = ctx.way
        if torch.is_grad_enabled():
            raise UnsupportedError(
                f"{way.name} gives first derivatives only; this backward pass asked for more (create_graph=True): "
                "use gradient=Plain()"
            )
        if any(torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads if grad is not None):
            raise UnsupportedError(
                f"{way.name} takes one gradient at a time, not many at once (is_grads_batched, vectorize): ask for "
                "them one by one, or use gradient=Exact() or Plain()"
            )
        record = dict(zip(ctx.keys, ctx.saved_tensors, strict=True))
        task, found, on_times = way.task(), None, None
        try:
            if grads[0] is not None:
                task.at(ctx.last - 1)
                found = way.back(
                    ctx.first, ctx.last, record, task.see("the incoming gradient", grads[0]), task
                )
                if task.timed:
                    on_times = way.by_times(ctx.first, ctx.last, record, (found, grads[0]), task)
            if ctx.first == 0:
                way.finish(task)
        except BaseException:
            way.drop()
            raise
        return None, None, None, None, None, found, None, on_times
