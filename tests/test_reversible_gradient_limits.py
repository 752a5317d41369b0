"""The gradient by undoing steps at its limits: drift, what it holds, and what it refuses."""

from __future__ import annotations

import gc
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import backdrift as bd
from backdrift.errors import (
    InputError,
    MissingGradientError,
    NonFiniteError,
    StateChangedError,
    UnsupportedError,
)
from backdrift.gradients import GradientMethod
from backdrift.solvers import RK4, Euler, ReversibleSolver
from live_bytes import LiveBytes
from problems import ToyNetwork, toy_denoiser, toy_inputs
from reversible_runs import SOLVERS, difference, gradients, grid


@pytest.mark.parametrize("name", SOLVERS)
def test_in_float32_the_drift_is_measured_and_the_gradient_is_near_plain_autograds(name: str) -> None:
    _, plain = gradients(bd.Plain(), SOLVERS[name], 50, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution, found = gradients(bd.Reversible(), SOLVERS[name], 50, dtype=torch.float32)
    assert solution.stats.drift is not None
    assert 1e-8 < solution.stats.drift < 1e-4
    assert difference(found, plain) < 1e-4
    assert solution.stats.as_dict()["drift"] == solution.stats.drift


def test_beyond_the_tolerance_it_says_so_and_falls_back_to_stored_states() -> None:
    """EDICT's rounding grows by p^(-2N), here 2e11: nothing is left of float32 states."""
    solver, steps = bd.EDICT(0.85), 80
    _, plain = gradients(bd.Plain(), solver, steps, dtype=torch.float32)
    loose = bd.Reversible(1e30, checkpoints=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drifted, wrong = gradients(loose, solver, steps, dtype=torch.float32)
    assert drifted.stats.drift is not None
    assert drifted.stats.drift > 0.01
    assert difference(wrong, plain) > 1e-3
    with pytest.warns(RuntimeWarning, match=r"undoing 80 steps of EDICT.*the tolerance is 0\.001") as caught:
        solution, found = gradients(bd.Reversible(checkpoints=0), solver, steps, dtype=torch.float32)
    assert difference(found, plain) < 2e-5
    assert solution.stats.fell_back
    shown = re.search(r"off by ([\d.e+-]+) ", str(caught[0].message))
    assert shown is not None
    assert float(shown.group(1)) == pytest.approx(solution.stats.drift, rel=0.06)
    # Undone once in vain, computed once more, undone again from stored states.
    assert solution.stats.calls_redone == 3 * 2 * steps


def test_states_that_are_lost_altogether_fall_back_as_well() -> None:
    """With p = 0.5 the rebuilt states are infinite or NaN after 100 steps; no NaN reaches the gradient."""
    solver, steps = bd.EDICT(0.5), 100
    _, plain = gradients(bd.Plain(), solver, steps, dtype=torch.float32)
    with pytest.warns(RuntimeWarning, match="undoing 100 steps"):
        solution, found = gradients(bd.Reversible(checkpoints=0), solver, steps, dtype=torch.float32)
    assert solution.stats.drift is not None
    assert not solution.stats.drift <= 1
    assert difference(found, plain) < 1e-4


def test_a_tight_tolerance_and_checkpoints_between() -> None:
    """The states between two checkpoints are as near as those of so many steps."""
    drifts = []
    for checkpoints in (0, 1, 7):
        solution, _ = gradients(
            bd.Reversible(checkpoints=checkpoints), SOLVERS["MF(Euler)"], 64, dtype=torch.float32
        )
        drifts.append(solution.stats.drift or 0.0)
    assert drifts[0] > 2 * drifts[1] > 4 * drifts[2] > 0
    with pytest.warns(RuntimeWarning, match="starts anew from stored states"):
        solution, _ = gradients(bd.Reversible(1e-9), SOLVERS["MF(Euler)"], 16, dtype=torch.float32)
    assert solution.stats.fell_back


class WideNetwork(nn.Module):
    """Few weights, wide states: what a run holds is states."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return torch.tanh(self.scale * x)


def peak(gradient: GradientMethod, solver: ReversibleSolver, steps: int) -> int:
    """Most bytes of tensors alive in a run and its backward pass, in units of one state."""
    x = torch.randn(1, 1 << 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    model = bd.Denoiser(WideNetwork(), bd.VP.linear())

    def work() -> None:
        x.grad = None
        solution = bd.sample(model, x, solver=solver, grid=grid(steps), gradient=gradient)
        (solution.x0**2).sum().backward()

    work()
    gc.collect()
    gc.disable()  # what a cycle keeps alive is counted
    try:
        with LiveBytes() as live:
            work()
    finally:
        gc.enable()
    assert live.left < 1.1 * x.nbytes  # x.grad
    return round(live.peak / x.nbytes)


@pytest.mark.parametrize("name", ["MF(Heun)", "EDICT", "ReversibleHeun"])
def test_memory_does_not_grow_with_the_steps_not_even_by_the_states(name: str) -> None:
    solver = SOLVERS[name]
    few, many = (peak(bd.Reversible(), solver, steps) for steps in (8, 24))
    assert many <= few + 1
    assert peak(bd.Exact("min"), solver, 24) > peak(bd.Exact("min"), solver, 8) + 14


def test_stages_apart_hold_one_graph_at_a_time() -> None:
    together, apart = (peak(bd.Reversible(stages=s), SOLVERS["MF(RK4)"], 8) for s in ("together", "apart"))
    assert apart < together


@pytest.mark.parametrize("solver", [Euler(), RK4(), bd.AdamsBashforth(4), bd.DPMSolverPP()])
def test_solvers_that_cannot_be_undone_are_refused_by_name(solver: Any) -> None:
    x, cond = toy_inputs()
    with pytest.raises(InputError, match=re.escape(repr(solver)) + " cannot be undone"):
        bd.sample(toy_denoiser(), x, cond, solver=solver, grid=grid(4), gradient=bd.Reversible())


def test_times_that_require_grad_are_refused() -> None:
    x, cond = toy_inputs()
    times = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64, requires_grad=True)
    how: dict[str, Any] = {"solver": bd.EDICT(), "grid": bd.TimeGrid(times), "gradient": bd.Reversible()}
    for run in (bd.sample, bd.encode):
        with pytest.raises(UnsupportedError, match="no gradient by the grid's times"):
            run(toy_denoiser(), x, cond, **how)


def test_impossible_settings_are_refused() -> None:
    for settings in ({"tolerance": 0}, {"checkpoints": -1}, {"checkpoints": 1.5}, {"stages": "all"}):
        with pytest.raises(InputError, match=next(iter(settings))):
            bd.Reversible(**settings)  # type: ignore[arg-type]


def test_no_gradient_is_lost_in_silence() -> None:
    x, cond = toy_inputs()
    x.requires_grad_()
    hidden = torch.ones(4, dtype=torch.float64, requires_grad=True) * 2
    inner = ToyNetwork()

    def closed_over(x: Tensor, t: Tensor, c: Any) -> Tensor:
        return inner(x, t, c) + hidden

    with pytest.raises(MissingGradientError, match="hidden"):
        bd.sample(
            toy_denoiser(closed_over), x, cond, solver=bd.EDICT(), grid=grid(4), gradient=bd.Reversible()
        )

    def edited(solution: bd.Solution) -> None:
        with torch.no_grad():
            inner.scale += 1
        solution.x0.sum().backward()

    solution = bd.sample(
        toy_denoiser(inner), x, cond, solver=bd.EDICT(), grid=grid(4), gradient=bd.Reversible()
    )
    with pytest.raises(StateChangedError, match="scale was modified in place"):
        edited(solution)
    solution = bd.sample(
        toy_denoiser(inner), x, cond, solver=bd.EDICT(), grid=grid(4), gradient=bd.Reversible()
    )
    with pytest.raises(UnsupportedError, match="first derivatives only"):
        torch.autograd.grad(solution.x0.sum(), x, create_graph=True)


class Spoiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * float("nan")


def test_a_gradient_that_is_not_finite_names_the_step() -> None:
    x, _ = toy_inputs()
    x.requires_grad_()

    def network(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return Spoiled.apply(x) if 0.3 < float(t[0]) < 0.5 else x

    times = [0.9, 0.7, 0.45, 0.2]
    solution = bd.sample(toy_denoiser(network), x, solver=bd.EDICT(), grid=times, gradient=bd.Reversible())
    with pytest.raises(NonFiniteError, match=r"step 3 of 3 \(from t = 0\.45 to 0\.2\)"):
        solution.x0.sum().backward()
