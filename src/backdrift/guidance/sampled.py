"""The steps of :func:`backdrift.sample` as a host of guidance."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..conditioning import PerStep
from ..denoiser import Denoiser
from ..errors import InputError, MissingGradientError, UnsupportedError
from ..gradients import Job
from ..host import Continuation, Evaluation, Host, Level
from ..integrate import Plan
from ..nests import tensors
from ..solvers import ReversibleSolver, Stepper
from ..stats import RunStats
from .base import Guidance


class SampledStep(Host):
    """One interval of a run of :func:`backdrift.sample`.

    Args:
        run: that it belongs to.
        index: its number.
        x: the state at its beginning.
    """

    def __init__(self, run: _Run, index: int, x: Tensor) -> None:
        self.run, self.index, self.total, self.x = run, index, len(run.plan.intervals), x
        self.levels = run.levels
        self.start, self.end = run.levels[index]
        self._before = copy.deepcopy(run.steppers)
        self._known: Evaluation | None = None

    def evaluate(self, x: Tensor) -> Evaluation:
        if x is self.x and self._known is not None:
            return self._known
        with self._counted():
            found = self.run.evaluation(x, self.index, self.start)
        if x is self.x:
            self._known = found
        return found

    def step(self, x: Tensor, evaluation: Evaluation) -> Tensor:
        self.run.steppers = copy.deepcopy(self._before)
        with self._counted():
            return self.run.step(x, self.index, evaluation)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        before = self.run.stats.calls_forward
        yield
        self.calls += self.run.stats.calls_forward - before

    def continuation(self, evaluation: Evaluation) -> Continuation:
        return Continuation(*self.run.onwards, 1.0, tuple(self.run.plan.times[self.index :]))

    def decode(self, x0: Tensor) -> Tensor:
        if x0.ndim != 4 or x0.shape[1] != 3:
            raise InputError(
                f"the clean samples have shape {tuple(x0.shape)}, which is no batch of pictures (B, 3, H, W): give the "
                "guidance decode=, from clean samples to pictures in [0, 1]"
            )
        return x0


class _Run:
    """A guided run.

    Attributes:
        steppers: the solver's memory, by whether it steps aside.
    """

    def __init__(self, job: Job) -> None:
        self.plan: Plan = job.plan
        self.model, self.cond, self.stats = job.model, job.cond, RunStats()
        self.conditions = job.model.conditions(job.cond, len(job.x))
        self.steppers: dict[bool, Stepper] = {
            False: self.plan.solver.begin(),
            True: self.plan.solver.aside.begin(),
        }
        noise = self.plan.noise
        self.draw = None if noise is None else noise.path(self.plan.schedule, self.plan.times, job.x)

    @cached_property
    def levels(self) -> tuple[tuple[Level, Level], ...]:
        """Of each interval."""
        schedule = self.plan.schedule
        found = [Level(float(schedule.alpha(t)), float(schedule.sigma(t))) for t in self.plan.times]
        return tuple(itertools.pairwise(found))

    @cached_property
    def onwards(self) -> tuple[Denoiser, Any]:
        """Model and conditioning of the estimates: what is given per step holds in that step's times."""
        if not isinstance(self.cond, PerStep) and not isinstance(self.model.uncond, PerStep):
            return self.model, self.cond
        model = copy.copy(self.model)
        model.uncond = self._in_time(model.uncond)
        return model, self._in_time(self.cond)

    def _in_time(self, cond: Any) -> Any:
        if not isinstance(cond, PerStep):
            return cond
        ends = self.plan.times[1:-1]
        return lambda t: cond[sum(float(t) <= end for end in ends)]

    def evaluation(self, x: Tensor, index: int, level: Level) -> Evaluation:
        """What the network says at the state at the beginning of an interval."""
        halves = _Halves.of(self.model)
        t = self.plan.times[index]
        out = self.output(halves, x, t, index)
        scale = self.model.guidance_scale
        return Evaluation(x, out, self.model.prediction, level, t, halves.more, scale)

    def output(self, model: Denoiser, x: Tensor, t: float, index: int) -> Tensor:
        t = self.model.check_time(t)
        outputs = []
        for branch in self.conditions.at(index):
            self.model.nfe += 1
            self.stats.calls_forward += 1
            outputs.append(model.run(x, t, branch))
        return model.combine(outputs)

    def step(self, x: Tensor, index: int, evaluation: Evaluation) -> Tensor:
        """The solver's step, its first evaluation being the one given."""
        told: list[Evaluation] = [evaluation]

        def call(state: Tensor, t: float) -> Tensor:
            if told and t == evaluation.t:
                return told.pop().output
            return self.output(self.model, state, t, index)

        taken = self.plan.intervals[index]
        form = self.plan.forms(call, self.draw)[taken.form]
        start, end = self.plan.ends(index)
        return self.steppers[taken.aside].step(form, x, form.node(start), form.node(end))


class _Halves(Denoiser):
    """A denoiser that remembers what guidance was made of, conditional minus unconditional."""

    more: Tensor | None

    @classmethod
    def of(cls, model: Denoiser) -> _Halves:
        halves: _Halves = object.__new__(cls)
        halves.__dict__ |= model.__dict__
        halves.more = None
        return halves

    def _guide(self, uncond: Tensor, cond: Tensor) -> Tensor:
        self.more = cond - uncond
        return super()._guide(uncond, cond)


def states(job: Job, guidance: Guidance) -> Iterator[Tensor]:
    """The states at the nodes after the first of a guided run, without a graph.

    Raises:
        UnsupportedError: a reversible solver, or a run inside ``torch.func`` transforms.
        MissingGradientError: x_T or the conditioning requires grad.
        InputError: the guidance does not fit the run.
    """
    _check(job)
    guidance.begin(len(job.plan.intervals), len(job.x))
    run, x = _Run(job), job.x
    host = SampledStep(run, 0, x)
    guidance.rehearse(x / math.hypot(*host.start), host.decode, None)
    for index in range(host.total):
        with torch.no_grad():
            host = SampledStep(run, index, x)
            x = guidance.advance(host)
        calls = guidance.trace.calls
        job.stats.calls_forward, job.stats.calls_redone = calls.forward, calls.redone
        job.stats.vjps, job.stats.decodes = calls.vjps, guidance.trace.decodes
        yield x


def _check(job: Job) -> None:
    if isinstance(job.plan.solver, ReversibleSolver):
        raise UnsupportedError(
            f"{job.plan.solver!r} carries a pair of states, and guidance would break it: use another solver"
        )
    if torch._C._are_functorch_transforms_active():
        raise UnsupportedError("guidance does not work inside torch.func transforms")
    if torch.is_inference_mode_enabled():
        raise InputError("guidance inside torch.inference_mode(): leave that, it forbids gradients")
    if not torch.is_grad_enabled():
        return
    asked = {"x_T": [job.x], "cond": tensors(job.cond), "uncond": tensors(job.model.uncond)}
    if job.plan.graph is not None:
        asked["grid"] = [job.plan.graph]
    for name, found in asked.items():
        if any(tensor.requires_grad for tensor in found):
            raise MissingGradientError(
                f"{name} requires grad, but a guided run is not differentiated: detach it, or sample under "
                "torch.no_grad()"
            )
