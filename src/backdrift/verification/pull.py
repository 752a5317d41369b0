"""One gradient through one run, and what it took."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..accelerators import wait
from ..gradients import GradientMethod
from ..sampling import sample
from ..solvers import ReversibleSolver
from ..stats import RunStats
from .memory import Meter
from .problem import Problem
from .sampler import Sampler


@dataclass(frozen=True)
class Pulled:
    """A gradient and what it took.

    Attributes:
        gradient: by what is asked for, all of it as one float64 vector on the CPU.
        value: the loss.
        x0: the sample.
        on_x0: the loss's gradient by it.
        stats: the run's counts.
        seconds: of sampling, loss and way back together.
    """

    gradient: Tensor
    value: float
    x0: Tensor
    on_x0: Tensor
    stats: RunStats
    seconds: float

    @property
    def vjps(self) -> int:
        """Network calls that the way back went through; plain autograd's are not counted as it runs."""
        return self.stats.vjps or self.stats.calls_forward

    @property
    def growth(self) -> float:
        """How many times as large the adjoint is at the run's start as at its end."""
        size = float(self.on_x0.cpu().double().norm())
        return float(self.gradient.norm()) / size if size > 0 else float("nan")


@dataclass(frozen=True)
class Difference:
    """Between a gradient and the one it should be.

    Attributes:
        relative: ‖found - known‖ / ‖known‖.
        cosine: of the angle between the two.
    """

    relative: float
    cosine: float

    @classmethod
    def of(cls, found: Tensor, known: Tensor) -> Difference:
        """Of two vectors."""
        size, own = float(known.norm()), float(found.norm())
        if size == 0:
            return cls(0.0 if own == 0 else float("inf"), float("nan"))
        cosine = float(found @ known) / (size * own) if own > 0 else float("nan")
        return cls(float((found - known).norm()) / size, min(cosine, 1.0))


def pull(problem: Problem, sampler: Sampler, method: GradientMethod) -> Pulled:
    """The gradient of the problem's loss by that method."""
    wait(problem.device)
    start = time.perf_counter()
    x, cond, asked = problem.leaves()
    solution = sample(problem.model, x, cond, gradient=method, **sampler.arguments())
    value, on_x0 = problem.pull(solution.x0)
    found = _back(solution.x0, asked, on_x0)
    wait(problem.device)
    seconds = time.perf_counter() - start
    return Pulled(_vector(found), value, solution.x0.detach(), on_x0, solution.stats, seconds)


def peak_bytes(problem: Problem, sampler: Sampler, method: GradientMethod) -> tuple[int | None, int | None]:
    """The most bytes that :func:`pull` holds at once, and the part of it that is the run's.

    The first counts the loss and what it looks through (a decoder) as well: they are differentiated while the run's
    kept activations are held. The second is what sampling and the way back hold without it.
    """
    meter, held = Meter(problem.device), []
    x, cond, asked = problem.leaves()

    def forward() -> None:
        held.append(sample(problem.model, x, cond, gradient=method, **sampler.arguments()).x0)

    _, first = meter.peak(forward)
    (_, on_x0), second = meter.peak(lambda: problem.pull(held[0]))
    _, third = meter.peak(lambda: _back(held.pop(), asked, on_x0))
    if first is None or second is None or third is None:
        return None, None
    return max(first, second, third), max(first, third)


def adjoint_norms(
    problem: Problem, sampler: Sampler, method: GradientMethod, pulled: Pulled
) -> list[float] | None:
    """‖dL/dx‖ at every node, from the first (noise) to the last.

    It takes a run that hands out its states. Some methods go another way back then (one that stops at every node);
    if that leads to another gradient, None. Of a reversible solver's pairs, None.

    Args:
        pulled: the same gradient without the states.
    """
    if isinstance(sampler.solver, ReversibleSolver):
        return None
    x, cond, asked = problem.leaves()
    solution = sample(problem.model, x, cond, gradient=method, trajectory=True, **sampler.arguments())
    assert solution.trajectory is not None
    states = [state for state in solution.trajectory if state.requires_grad]
    found = _back(solution.x0, [*asked, *states[:-1]], pulled.on_x0)
    gradient = _vector(found[: len(asked)])
    if not Difference.of(gradient, pulled.gradient).relative < 1e-3:
        return None
    return [float(g.cpu().double().norm()) for g in (*found[len(asked) :], pulled.on_x0)]


def _back(x0: Tensor, asked: Sequence[Tensor], on_x0: Tensor) -> tuple[Tensor, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # Reversible's fallback, which stats tell
        found = torch.autograd.grad(x0, asked, on_x0, allow_unused=True)
    # A weight that the network has and does not use moves nothing.
    return tuple(torch.zeros_like(a) if g is None else g for a, g in zip(asked, found, strict=True))


def _vector(found: Sequence[Tensor]) -> Tensor:
    return torch.cat([g.detach().cpu().double().flatten() for g in found])
