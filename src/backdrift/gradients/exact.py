"""Exact gradients of the discretised run: every network call is either kept or redone, by a memory plan."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import nests
from ..ambient import Ambient
from ..budget import available_bytes, format_size
from ..carried import Carried
from ..conditioning import Branch
from ..denoiser import Denoiser
from ..errors import BudgetError
from ..memory import MemoryPlan
from ..repeats import Glimpse
from ..stats import RunStats
from ..weights import Weights
from .base import Evaluator, GradientMethod
from .context import NetworkContext
from .reach import sequence_number
from .replay import Chain, Replay, Trace, measuring

# Beside what calls hold, gradients in flight while one is differentiated, in largest saved tensors.
_IN_FLIGHT = 4


class Exact(GradientMethod):
    """The gradient of the run as it was computed: bit for bit plain autograd's on a CPU in eval mode.

    Gradients reach ``x_T``, the conditioning, the network's weights, any latent of the trajectory, and any leaf
    tensor that the network uses. What is not asked for (weights without requires_grad, or left out of
    ``torch.autograd.grad``'s inputs) costs nothing.

    Args:
        memory: ``"min"``: one call's activations at a time; the last call's are kept, all others are
            redone. ``"max"``: all are kept. Bytes or a size such as ``"6GiB"``: those of the last k calls are kept, k
            as large as fits beside the run's latents, gradients in flight and the gradients of the weights.
            ``"auto"``: a budget from the memory that is free when the run begins.

    Raises:
        BudgetError: ``memory`` is not a memory plan (and, when a run begins, if it is too small for one call).

    In the backward pass :class:`~backdrift.errors.StateChangedError` is raised where the redone call would not be
    the first one: a weight, the conditioning, an adapter, a requires_grad flag or a module's train/eval mode has
    changed, or its output is another one, as where a network counts its calls (:mod:`~backdrift.repeats`). Second
    derivatives are refused (:class:`~backdrift.errors.UnsupportedError`).
    """

    takes_pairs = by_times = True

    def __init__(self, memory: MemoryPlan | str | int = "auto") -> None:
        self.plan = MemoryPlan.parse(memory)

    def __repr__(self) -> str:
        return f"Exact(memory={self.plan.budget if self.plan.mode == 'bytes' else self.plan.mode!r})"

    def begin(self, model: Denoiser, x: Tensor, cond: Any, evaluations: int, stats: RunStats) -> Evaluator:
        return _Run(model, x, cond, evaluations, self.plan, stats)


class _NetworkCall:
    """One network call of a run, as it was made the first time."""

    def __init__(
        self,
        context: NetworkContext,
        branch: Branch,
        t: float,
        ambient: Ambient,
        weights: Weights,
        carried: Carried | None,
        keep: bool,
    ) -> None:
        self.context, self.branch, self.t, self.ambient, self.keep = context, branch, t, ambient, keep
        self.carried = carried
        self.weights = weights
        self.kept: Trace | None = None
        self.seen: Glimpse | None = None

    def first(self, x: Tensor) -> Tensor:
        trace = self.kept  # the run's first call was traced to see what it reaches
        if trace is None and not self.keep:
            out, self.seen = self.context.run(x, self.branch, self.t)
            return out
        if trace is None:
            trace = self.context.trace(x, self.branch, self.t)
        self.kept, self.seen = trace if self.keep else None, trace.seen
        return trace.out.detach()

    def check(self) -> None:
        self.context.check_unchanged(self.weights)

    def again(self, x: Tensor) -> Trace:
        buffers = nullcontext() if self.carried is None else self.carried.restored()
        with buffers, self.ambient.restored(), torch.enable_grad():
            floor = sequence_number()
            trace = self.context.trace(x, self.branch, self.t)
        self.context.check_reach(trace, floor)
        self.context.check_repeats(self.seen, trace.seen, self.ambient)
        return trace


class _Run(Evaluator):
    """The evaluations of one run. Owns the token, which leads to the whole graph; no call refers back to it."""

    def __init__(
        self, model: Denoiser, x: Tensor, cond: Any, evaluations: int, plan: MemoryPlan, stats: RunStats
    ) -> None:
        self.model, self.plan, self.stats = model, plan, stats
        self.context = NetworkContext(model, cond, len(x))
        self.total = evaluations * self.context.conditions.calls
        self.chain: Chain | None = None
        self.token: Tensor | None = None
        self.made = 0
        self.keep = 1
        self.ambient: Ambient | None = None

    def __call__(self, x: Tensor, t: float) -> Tensor:
        t = self.model.check_time(t)
        return self.model.combine(
            [self._call(x, t, branch) for branch in self.context.conditions.at(self.interval)]
        )

    def _call(self, x: Tensor, t: float, branch: Branch) -> Tensor:
        self.model.nfe += 1
        self.stats.calls_forward += 1
        if not torch.is_grad_enabled():
            return self.model.run(x, t, branch)
        index, self.made = self.made, self.made + 1
        ambient, weights = self._surroundings(x, branch), self.context.snapshot()
        carried = weights.carried()
        chain, traced = (self.chain, None) if self.chain is not None else self._open(x, t, branch)
        if not x.requires_grad and self.token is None and not isinstance(t, Tensor):
            return self._without_graph(x, t, branch, traced)
        time = t if isinstance(t, Tensor) else None
        call = _NetworkCall(
            self.context,
            branch,
            t if time is None else time.detach(),
            ambient,
            weights,
            carried,
            index >= self.total - self.keep,
        )
        call.kept = traced
        self.stats.calls_kept += call.keep
        if self.token is None:
            return Replay.apply(chain, call, x, None, time)
        out, self.token = Replay.apply(chain, call, x, self.token, time)
        return out

    def _without_graph(self, x: Tensor, t: float, branch: Branch, traced: Trace | None) -> Tensor:
        with torch.no_grad():
            return traced.out.detach() if traced else self.model.run(x, t, branch)

    def _open(self, x: Tensor, t: float, branch: Branch) -> tuple[Chain, Trace]:
        """Make the first call with a graph: see what it reaches and holds, settle the plan, begin the chain."""
        context, saved = self.context, dict[int, int]()
        exists = {x.untyped_storage()._cdata, *(c.untyped_storage()._cdata for c in context.conds)}
        floor = sequence_number()
        with measuring(context.weights.storages | exists, saved):
            trace = context.trace(x, branch, t)
        context.adopt(trace, floor)
        self.keep = self._settle(sum(saved.values()), max(saved.values(), default=0), x)
        chain = self.chain = Chain(context.shared, self.stats)
        self.token = chain.head()
        return chain, trace

    def _settle(self, per_call: int, largest: int, x: Tensor) -> int:
        """How many of the last calls are kept."""
        keep = self.total if self.plan.mode == "max" else 1
        if self.plan.mode in ("bytes", "auto"):
            budget = self.plan.budget or available_bytes(x.device)
            gradients = sum(t.nbytes for t in self.context.leaves)
            fixed = self.total * x.nbytes + _IN_FLIGHT * largest + gradients
            keep = min(self.total, (budget - fixed) // max(per_call, 1))
            if keep < 1 and self.plan.mode == "bytes":
                raise BudgetError(
                    f"memory={format_size(budget)} is too small: one network call holds {format_size(per_call)}, the "
                    f"run's {self.total} latents and the gradients in flight {format_size(fixed)}; the smallest budget "
                    f'that works is {format_size(per_call + fixed)}. memory="min" holds as little as possible'
                )
            keep = max(keep, 1)
        self.stats.peak_bytes = max(self.stats.peak_bytes, keep * per_call + self.total * x.nbytes)
        return keep

    def _surroundings(self, x: Tensor, branch: Branch) -> Ambient:
        # Calls made in the same surroundings share one snapshot: it holds 5 kB of random state.
        now = Ambient([x, *nests.tensors(branch.cond)], self.context.weights.devices)
        if self.ambient is None or not self.ambient.same_as(now):
            self.ambient = now
        return self.ambient
