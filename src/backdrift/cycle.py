"""``cycle_encode``: a picture as noises, from which a stochastic solver leads back to it (Cycle-SDE).

The forward process is drawn from the picture, x_i at every node of the grid; then each step
x_b = mean(x_a) + std noise is solved for its noise. Sampling with these noises is the same arithmetic, so it ends at
the picture whatever the network says; with another conditioning it ends at an edit. This is CycleDiffusion's
DPM-Encoder (Wu & De la Torre 2023) for any stochastic solver, and with independent states the edit-friendly DDPM
inversion of Huberman-Spiegelglas et al. (2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .denoiser import Denoiser
from .errors import InputError
from .gradients import Plain
from .grids import TimeGrid
from .noises import Brownian
from .noises.toward import Toward
from .sampling import sample
from .schedules import Schedule
from .solvers import Ancestral, Solver, StochasticSolver

COUPLINGS = ("path", "independent")


@dataclass(frozen=True)
class CycleNoises:
    """What a picture was encoded into: ``sample(model, code.x_T, cond, solver=…, grid=code.times, noise=code.noises)``.

    Attributes:
        x_T: state at the first time (B, …).
        noises: one per step, each of x_T's shape.
        times: the grid's nodes (N + 1,), float64, falling.
    """

    x_T: Tensor
    noises: tuple[Tensor, ...]
    times: Tensor


def cycle_encode(
    model: Denoiser,
    x0: Tensor,
    cond: Any = None,
    *,
    solver: Solver | None = None,
    grid: TimeGrid | Sequence[float] | Tensor | None = None,
    form: str | None = None,
    seed: int | Sequence[int] = 0,
    coupling: Literal["path", "independent"] = "path",
) -> CycleNoises:
    """The noises with which :func:`~backdrift.sample` leads to ``x0``, to rounding, given the same model, ``cond``,
    solver, grid and form. Made without gradients, one network call a step.

    Args:
        model: network, schedule, prediction and guidance.
        x0: what to encode: the state at the grid's last time (B, …).
        cond: the network's conditioning.
        solver: a stochastic solver; :class:`~backdrift.Ancestral` if None.
        grid: a :class:`TimeGrid`, or falling times; 20 uniform steps if None. Its last step must add noise: for all
            solvers but those that add noise on the way to sigma = 0, it ends at sigma > 0.
        form: as in :func:`~backdrift.sample`.
        seed: which noisy states the picture is led through: those of ``Brownian(seed)``.
        coupling: ``"path"``: the states are one run of the forward process, so the noises are standard normal where
            the network is right. ``"independent"``: each state is noised on its own; the noises are then larger
            and keep more of the picture when ``cond`` is changed.

    Raises:
        InputError: the solver adds no noise, or none in some step; the state is not a floating batch; an
            argument cannot be used.
        NonFiniteError: a state is not finite.

    Example:
        >>> code = cycle_encode(model, picture, cond, solver=Ancestral(), grid=TimeGrid("logsnr", 50))
        >>> how = {"solver": Ancestral(), "grid": code.times, "noise": code.noises}
        >>> sample(model, code.x_T, cond, **how).x0  # the picture
        >>> sample(model, code.x_T, other_cond, **how).x0  # an edit of it
    """
    solver = solver or Ancestral()
    if not isinstance(solver, StochasticSolver) or solver.eta == 0:
        raise InputError(f"{solver!r} adds no noise to encode a picture into: use Ancestral(), or encode()")
    if coupling not in COUPLINGS:
        raise InputError(f"coupling is one of {', '.join(COUPLINGS)}; got {coupling!r}")
    if not isinstance(x0, Tensor) or not x0.is_floating_point() or x0.ndim == 0 or not len(x0):
        shown = f"{x0.dtype} {tuple(x0.shape)}" if isinstance(x0, Tensor) else type(x0).__name__
        raise InputError(f"x0 must be a floating tensor (B, …) with B >= 1; got {shown}")
    if not isinstance(grid, TimeGrid):
        grid = TimeGrid("uniform", steps=20) if grid is None else TimeGrid(grid)
    times = grid.nodes(model.schedule)
    with torch.no_grad():
        x = x0 if x0.dtype in (torch.float32, torch.float64) else x0.float()
        states = _forward_states(model.schedule, times.tolist(), x, seed, coupling)
        noise = Toward(states[1:])
        kwargs: dict[str, Any] = {"solver": solver, "grid": times, "form": form, "noise": noise}
        sample(model, states[0], cond, **kwargs, gradient=Plain())
    if len(noise.found) != len(times) - 1:
        raise InputError(
            f"{solver!r} adds no noise in {len(times) - 1 - len(noise.found)} of the {len(times) - 1} steps, so those "
            f"cannot be led to the picture; the grid ends at t = {times[-1].item():g}: end it where sigma > 0 "
            "(TimeGrid(..., end=…) without clean_end), or use ExponentialEuler()"
        )
    return CycleNoises(states[0], tuple(noise.found), times)


def _forward_states(
    schedule: Schedule, times: list[float], x: Tensor, seed: int | Sequence[int], coupling: str
) -> list[Tensor]:
    """States of the forward process at the nodes, the noisiest first, given ``x`` at the last.

    From t_b to the noisier t_a it is x_a = alpha_a/alpha_b x_b + sqrt(sigma_a² - (alpha_a/alpha_b)² sigma_b²) noise.
    """
    draw = Brownian(seed).path(schedule, times, x)
    scales = [(float(schedule.alpha(t)), float(schedule.sigma(t))) for t in times]
    states = [x]
    for i in reversed(range(len(times) - 1)):
        given, known = (i + 1, states[0]) if coupling == "path" else (len(times) - 1, x)
        (alpha_a, sigma_a), (alpha_b, sigma_b) = scales[i], scales[given]
        ratio = alpha_a / alpha_b
        std = math.sqrt((sigma_a - ratio * sigma_b) * (sigma_a + ratio * sigma_b))
        mean = ratio * known
        states.insert(0, mean.add(draw(mean, std, times[i], times[i + 1]), alpha=std))
    return states
