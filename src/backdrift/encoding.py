"""``encode``: from data back to noise, by undoing a reversible solver's steps."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .conditioning import check_steps
from .denoiser import Denoiser
from .errors import InputError
from .gradients import Exact, GradientMethod, Job
from .sampling import Grid, check_arguments, check_asked, finite, plan_for, state_for
from .solvers import McCallumFoster, Pair, ReversibleSolver
from .stats import RunStats


def encode(
    model: Denoiser,
    x0: Tensor | Pair,
    cond: Any = None,
    *,
    solver: ReversibleSolver | None = None,
    grid: Grid = None,
    form: str | None = None,
    gradient: GradientMethod | None = None,
    check_finite: bool = True,
) -> Pair:
    """The pair of states at the first time from which :func:`~backdrift.sample` leads to ``x0``.

    The steps are undone in closed form, so sampling from the pair with the same solver, grid, form and ``cond`` gives
    back ``x0`` but for rounding; with other ones it gives something else. The noise is the *pair*: either member alone
    leads elsewhere.

    Args:
        model: network, schedule, prediction and guidance.
        x0: state at the grid's last time, (B, …), where alpha should be near 1: a clean picture or its latent. Or
            the :attr:`~backdrift.Solution.pair` of a run, which leads back to its ``x_T``.
        cond: the conditioning, any nest of tensors.
        solver: a reversible solver; :class:`~backdrift.McCallumFoster` on Heun's method if None.
        grid, form: as in :func:`~backdrift.sample`.
        gradient: ``Exact("auto")`` if None; the pair can be differentiated by ``x0``, ``cond`` and weights.
        check_finite: look for NaN and infinity in the states.

    Raises:
        InputError: the solver is not reversible, or an argument cannot be used.
        UnsupportedError: the grid's times require grad and the gradient method gives none by them.
        NonFiniteError: a state is not finite; names the first step.

    Example:
        >>> how = {"solver": McCallumFoster(), "grid": TimeGrid("logsnr", steps=50)}
        >>> pair = encode(model, picture, cond, **how)
        >>> sample(model, pair, cond, **how).x0  # the picture
    """
    solver, gradient = solver if solver is not None else McCallumFoster(), gradient or Exact()
    check_arguments(model, solver, gradient)
    if not gradient.takes_pairs:
        raise InputError(
            f"{gradient!r} steps from noise to data only: encode with gradient=Exact(), Plain() or Reversible()"
        )
    plan = plan_for(model, solver, grid, form).undone()
    check_asked(gradient, plan)
    check_steps((cond, model.uncond), len(plan.intervals))
    pair = state_for(plan, x0, gradient, "x0")
    assert isinstance(pair, Pair)  # the plan is reversible
    states = gradient.run(Job(plan, model, pair.first, cond, RunStats(), False, check_finite, pair))
    for state in finite(states, plan.times[::-1]) if check_finite else states:
        assert isinstance(state, Pair)  # from a method that takes pairs
        pair = state
    return pair
