"""``sample``: from noise to data with a chosen solver, grid, form and gradient."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .denoiser import Denoiser
from .errors import InputError, NonFiniteError
from .gradients import Exact, GradientMethod, Job
from .grids import TimeGrid
from .integrate import Plan
from .noises import Brownian, GivenNoise, Noise
from .schedules import Flow
from .solvers import Euler, Solver
from .stats import RunStats


@dataclass(frozen=True)
class Solution:
    """What :func:`sample` returns.

    Attributes:
        x0: state at the last time, (B, …). At sigma = 0 it is the sample; elsewhere the state there.
        times: the grid's nodes (N + 1,), float64, falling.
        trajectory: the states at all nodes, ``x_T`` first and ``x0`` last, or None if not asked for. Each lies on the
            path to ``x0``, so ``torch.autograd.grad(loss(x0), trajectory[i])`` is the gradient from that
            latent on; a multistep solver's earlier evaluations count as given there.
        nfe: network calls of the forward run.
        stats: calls, redone calls, bytes and seconds; goes on counting during backward passes.
    """

    x0: Tensor
    times: Tensor
    trajectory: tuple[Tensor, ...] | None
    nfe: int
    stats: RunStats


def sample(
    model: Denoiser,
    x_T: Tensor,
    cond: Any = None,
    *,
    solver: Solver | None = None,
    grid: TimeGrid | Sequence[float] | Tensor | None = None,
    form: str | None = None,
    gradient: GradientMethod | None = None,
    noise: Noise | Sequence[Tensor] | Tensor | None = None,
    seed: int | Sequence[int] | None = None,
    trajectory: bool = False,
    check_finite: bool = True,
) -> Solution:
    """Solve the probability-flow ODE of ``model`` from ``x_T``; the diffusion SDE with a stochastic solver.

    Args:
        model: network, schedule, prediction and guidance.
        x_T: state at the grid's first time, (B, …): ``alpha * x0 + sigma * noise`` there, so plain noise for
            variance-preserving schedules and flows, ``sigma(T) * noise`` for EDM. A half-precision ``x_T`` is raised to
            float32; whatever the network's dtype, the state keeps its own.
        cond: the network's conditioning, any nest of tensors.
        solver: :class:`~backdrift.solvers.Euler` (DDIM) if None.
        grid: a :class:`TimeGrid`, or falling times; 20 uniform steps if None.
        form: ``"original"``, ``"exponential"`` or ``"data"``; if None, the solver's own, else ``"original"`` for
            rectified flow (dx/dt = u) and ``"exponential"`` otherwise. Beside an end where the form is singular
            one step is taken on a form that is regular there.
        gradient: ``Exact("auto")`` if None. Gradients flow when ``x_T``, ``cond`` or weights require them.
        noise: what a stochastic solver adds: a :class:`~backdrift.noises.Brownian` path, or one tensor of x_T's shape
            per step (gradients reach those that require grad).
        seed: short for ``noise=Brownian(seed)``.
        trajectory: keep the states at all nodes.
        check_finite: look for NaN and infinity in the states (one synchronisation, at the end).

    Raises:
        InputError: an argument cannot be used, or no regular form leads over an interval.
        BudgetError: the gradient's memory budget is too small.
        MissingGradientError: the network uses a tensor whose gradient would be lost.
        NonFiniteError: a state is not finite; names the first step.

    Example:
        >>> model = Denoiser(network, VP.linear())
        >>> solution = sample(model, x_T, solver=AdamsBashforth(4), grid=TimeGrid("logsnr", steps=20))
        >>> loss(solution.x0).backward()
    """
    solver, gradient = solver or Euler(), gradient or Exact()
    _check(model, x_T, solver, gradient)
    if not isinstance(grid, TimeGrid):
        grid = TimeGrid("uniform", steps=20) if grid is None else TimeGrid(grid)
    if form is None:
        form = solver.default_form or ("original" if isinstance(model.schedule, Flow) else "exponential")
    times = grid.nodes(model.schedule)
    source = _noise(noise, seed)
    plan = Plan(solver, form, model.schedule, model.prediction, times.tolist(), source)
    x = x_T if x_T.dtype in (torch.float32, torch.float64) else x_T.float()

    stats, start, before = RunStats(), time.perf_counter(), model.nfe
    path, finite = [x], []
    for state in gradient.run(Job(plan, model, x, cond, stats, trajectory, check_finite)):
        x = state
        if trajectory:
            path.append(x)
        if check_finite:
            finite.append(x.detach().isfinite().all())
    _check_finite(finite, times)
    stats.seconds_forward += time.perf_counter() - start
    return Solution(x, times, tuple(path) if trajectory else None, model.nfe - before, stats)


def _check(model: Denoiser, x_T: Tensor, solver: Solver, gradient: GradientMethod) -> None:
    wanted = ((model, Denoiser, "model"), (solver, Solver, "solver"), (gradient, GradientMethod, "gradient"))
    for value, kind, name in wanted:
        if not isinstance(value, kind):
            hint = " (an instance, so with brackets)" if isinstance(value, type) else ""
            raise InputError(f"{name} must be a {kind.__name__}{hint}; got {value!r}")
    if not isinstance(x_T, Tensor) or not x_T.is_floating_point() or x_T.ndim == 0 or not len(x_T):
        shown = f"{x_T.dtype} {tuple(x_T.shape)}" if isinstance(x_T, Tensor) else type(x_T).__name__
        raise InputError(f"x_T must be a floating tensor (B, …) with B >= 1; got {shown}")


def _noise(noise: Noise | Sequence[Tensor] | Tensor | None, seed: int | Sequence[int] | None) -> Noise | None:
    if noise is not None and seed is not None:
        raise InputError(f"seed={seed!r} is short for noise=Brownian({seed!r}): give one of noise and seed")
    if seed is not None:
        return Brownian(seed)
    return noise if noise is None or isinstance(noise, Noise) else GivenNoise(noise)


def _check_finite(finite: list[Tensor], times: Tensor) -> None:
    if not finite or bool(torch.stack(finite).all()):
        return
    step = [bool(ok) for ok in finite].index(False)
    raise NonFiniteError(
        f"the state became NaN or infinite in step {step + 1} of {len(finite)}, from t = {times[step].item():g} to "
        f"{times[step + 1].item():g}: the network's output or x_T is not finite, or the step is far too large"
    )
