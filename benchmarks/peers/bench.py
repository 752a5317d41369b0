"""The measurements: errors and counts, peak memory, and time. Each is saved as soon as it is made."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import backdrift as bd
from backdrift.errors import BackdriftError

from ..measure import peak_bytes, seconds
from ..record import Record
from . import ours, sde
from .lineup import all_methods, line_up
from .method import Method
from .problems import PROBLEMS, relative_errors, true_gradients
from .reach import STEPS, search
from .work import QUANTITIES, Work

CPU = torch.device("cpu")
KINDS = ("errors", "memory", "times")
SDE_STEPS = (8, 16, 32, 64, 128, 256, 512, 1024)
# For time and memory: numbers of steps, and tolerances of the adaptive ones.
TIMED_STEPS = {"mixture": (8, 16, 32, 64), "digits": (5, 10, 20, 50), "unet": (10,), "small": (3,)}
TIMED_TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5)
# Fourth-order steps of the true flow's solution; the difference to half as many is recorded.
TRUE_STEPS = {"mixture": 800, "digits": 200}


def make(problem: str, wants: tuple[str, ...] = QUANTITIES) -> Work:
    """A problem's work."""
    return sde.work() if problem == "sde" else PROBLEMS[problem](wants=wants)


@cache
def truth(problem: str) -> tuple[dict[str, Tensor], float]:
    """The true flow's gradients and their own error, from half as many steps."""
    if problem == "sde":
        found, coarse = sde.true_gradients(), sde.true_gradients(sde.FINEST // 2)
        # The scheme is of order 1 along a path, so that the difference to half as many steps is the error.
    else:
        steps = TRUE_STEPS[problem]
        found, coarse = (true_gradients(PROBLEMS[problem], n) for n in (steps, steps // 2))
    return found, max(relative_errors(coarse, found).values())


def _rounded(value: Any) -> Any:
    """To four digits."""
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


class Bench:
    """Measurements of one problem.

    Args:
        problem: its name.
        record: where cells go: :data:`KINDS`.
        only: parts of methods' keys; empty for all.
    """

    def __init__(self, problem: str, record: Record, only: Iterable[str] = ()) -> None:
        self.problem, self.record, self.only = problem, record, tuple(only)

    def errors(self) -> None:
        """Errors, calls and products of every method, until its error is far below the target."""
        known, doubt = truth(self.problem)
        self.record.data["truth"] = {"relative_error": doubt}
        for method in self._chosen(all_methods(self.problem)):
            work = make(self.problem)
            began = time.perf_counter()
            steps = SDE_STEPS if self.problem == "sde" else STEPS
            try:
                if self.problem == "sde":
                    for n in steps:
                        self._error(method, work, n, known)
                else:
                    search(partial(self._error, method, work, known=known), method.knob, steps)
            except _Unfit as error:
                print(f"{method.key}: left out from there on, {error}", flush=True)
            print(f"{method.key}: {time.perf_counter() - began:.1f} s", flush=True)

    def memory(self) -> None:
        """Peak bytes, and errors, of the line-up."""
        for wants in self._wants():
            for method in self._chosen(line_up(self.problem)):
                for value in self._values(method):
                    if not self._there("memory", wants, method, value):
                        self._memory(wants, method, value)

    def times(self, repeats: int) -> None:
        """Seconds of the line-up, interleaved: every repeat runs every method once, in an order that turns."""
        for wants in self._wants():
            jobs = [(m, v) for m in self._chosen(line_up(self.problem)) for v in self._values(m)]
            work = make(self.problem, wants)
            warm: set[str] = set()
            for repeat in range(repeats):
                turn = repeat % len(jobs) if jobs else 0
                for method, value in jobs[turn:] + jobs[:turn]:
                    if self._there("times", wants, method, value, repeat=repeat):
                        continue
                    job = method.prepare(work, value)
                    if method.key not in warm or method.package == "diffrax":
                        job.differentiate()  # compiles, fills caches
                        warm.add(method.key)
                    took = seconds(job.differentiate, CPU)
                    self._add("times", wants, method, value, repeat=repeat, seconds=took)

    def _error(self, method: Method, work: Work, value: float, known: dict[str, Tensor]) -> float:
        cells = self._there("errors", QUANTITIES, method, value)
        if not cells:
            job = method.prepare(work, value)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Reversible says that states drift; it is measured here
                try:
                    (job.counted or job.differentiate)()
                except (AssertionError, RuntimeError, BackdriftError) as error:
                    raise _Unfit(
                        str(error).splitlines()[0] if str(error) else type(error).__name__
                    ) from error
            found = job.gradients()
            errors = relative_errors(found, known)
            errors = {k: e if math.isfinite(e) else 1e300 for k, e in errors.items()}
            calls, products = job.counts()
            self._add("errors", QUANTITIES, method, value, calls=calls, products=products, errors=errors)
            cells = self._there("errors", QUANTITIES, method, value)
        return max(cells[0]["errors"].values())

    def _memory(self, wants: tuple[str, ...], method: Method, value: float) -> None:
        work = make(self.problem, wants)
        work.clear()
        job = method.prepare(work, value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if job.peak_bytes is not None:
                job.differentiate()
                peak = job.peak_bytes()
            else:
                peak = peak_bytes(job.differentiate, CPU)
        found, counts = job.gradients(), job.counts()
        cell: dict[str, Any] = {"peak_bytes": peak, "calls": counts.calls, "products": counts.products}
        if self.problem in TRUE_STEPS:
            known = {k: v for k, v in truth(self.problem)[0].items() if k in wants}
            cell["errors"] = relative_errors(found, known)
        if method.sampler is not None:
            own = self._own(method.sampler, int(value), wants)
            cell["own_errors"] = relative_errors(found, own)
            cell["same_bits"] = all(torch.equal(found[k], own[k]) for k in own)
        self._add("memory", wants, method, value, **cell)

    def _own(self, sampler: str, steps: int, wants: tuple[str, ...] = QUANTITIES) -> dict[str, Tensor]:
        """Plain autograd's gradient through the sampler's steps."""
        return _own(self.problem, sampler, steps, wants)

    def _wants(self) -> list[tuple[str, ...]]:
        return [QUANTITIES, ("x_T",)] if self.problem in ("unet", "small") else [QUANTITIES]

    def _values(self, method: Method) -> tuple[float, ...]:
        return TIMED_TOLERANCES if method.knob == "tolerance" else TIMED_STEPS[self.problem]

    def _chosen(self, methods: list[Method]) -> list[Method]:
        return [m for m in methods if not self.only or any(part in m.key for part in self.only)]

    def _there(
        self, kind: str, wants: tuple[str, ...], method: Method, value: float, **more: Any
    ) -> list[dict[str, Any]]:
        return self.record.find(kind, method=method.key, value=value, wants="+".join(wants), **more)

    def _add(self, kind: str, wants: tuple[str, ...], method: Method, value: float, **cell: Any) -> None:
        self.record.add(kind, method=method.key, value=value, wants="+".join(wants), **_rounded(cell))
        shown = {k: v for k, v in cell.items() if k in ("calls", "products", "peak_bytes", "seconds")}
        print(f"{kind:7} {method.key} @ {value:g}: {shown} {cell.get('errors', '')}", flush=True)


class _Unfit(Exception):
    """A method cannot do the work at that setting."""


@cache
def _own(problem: str, sampler: str, steps: int, wants: tuple[str, ...]) -> dict[str, Tensor]:
    work = make(problem, wants)
    solver = {**ours.SOLVERS, **ours.COUPLED}[sampler]
    work.clear()
    work.loss(ours.run(solver, bd.Plain())(work, steps)).backward()
    return work.gradients()
