"""Gradients by the grid's times: each node's own, and those of the ends when the nodes between move by the rule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from backdrift.denoiser import Denoiser
from backdrift.errors import InputError, UnsupportedError
from backdrift.gradients import (
    AdjointDEIS,
    ContinuousAdjoint,
    Exact,
    GradientMethod,
    Plain,
    SymplecticAdjoint,
)
from backdrift.grids import TimeGrid
from backdrift.sampling import sample
from backdrift.schedules import VP
from backdrift.solvers import (
    DEIS,
    RK4,
    AdamsBashforth,
    AdaptiveDormandPrince,
    Ancestral,
    DPMSolver,
    DPMSolverPP,
    Euler,
    Heun,
    McCallumFoster,
    Solver,
)
from problems import (
    PREDICTIONS,
    SCHEDULES,
    GaussianNetwork,
    MixtureNetwork,
    condition,
    smooth_grid,
    start_state,
)

SPANS = {
    "linear": (0.9, 0.05),
    "cosine": (0.9, 0.05),
    "discrete": (900.0, 50.0),
    "edm": (8.0, 0.5),
    "flow": (0.9, 0.05),
}


def loss(schedule: str, times: Any, gradient: GradientMethod, **settings: Any) -> Tensor:
    network = MixtureNetwork(SCHEDULES[schedule], PREDICTIONS[schedule])
    model = Denoiser(network, SCHEDULES[schedule], PREDICTIONS[schedule])
    x, c = start_state(SCHEDULES[schedule], 0.9), condition()
    x0 = sample(model, x, c, grid=times, gradient=gradient, **settings).x0
    return (x0**2).sum() + x0.sin().sum()


def slopes(schedule: str, times: Tensor, **settings: Any) -> Tensor:
    """Central differences by each of the times."""
    found = []
    for i, t in enumerate(times.tolist()):
        step = torch.zeros_like(times)
        step[i] = 1e-5 * t
        with torch.no_grad():
            high, low = (loss(schedule, times + sign * step, Plain(), **settings) for sign in (1, -1))
        found.append((high - low) / (2e-5 * t))
    return torch.stack(found)


@pytest.mark.parametrize("schedule", SPANS)
@pytest.mark.parametrize("form", ["original", "exponential", "data"])
def test_each_node_has_its_own_gradient(schedule: str, form: str) -> None:
    times = torch.linspace(*SPANS[schedule], 5, dtype=torch.float64)
    numeric = slopes(schedule, times, solver=Heun(), form=form)
    times.requires_grad_()
    found = {
        gradient: torch.autograd.grad(loss(schedule, times, gradient, solver=Heun(), form=form), times)[0]
        for gradient in (Plain(), Exact("min"), SymplecticAdjoint(), SymplecticAdjoint("stored"))
    }
    plain, exact, *symplectic = found.values()
    torch.testing.assert_close(plain, numeric, rtol=2e-5, atol=1e-7)
    assert torch.equal(plain, exact)
    for other in symplectic:
        torch.testing.assert_close(other, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "solver", [Euler(), RK4(), AdamsBashforth(3), DPMSolver(3), DPMSolverPP(), McCallumFoster()]
)
def test_every_solvers_coefficients_are_differentiated(solver: Solver) -> None:
    form = "data" if isinstance(solver, DPMSolverPP) else "exponential"
    times = torch.tensor([0.9, 0.7, 0.5, 0.35, 0.1], dtype=torch.float64)
    numeric = slopes("linear", times, solver=solver, form=form)
    times.requires_grad_()
    methods = [Plain(), Exact("min")]
    if isinstance(solver, Euler | RK4 | DPMSolver):
        methods.append(SymplecticAdjoint())
    for gradient in methods:
        (found,) = torch.autograd.grad(loss("linear", times, gradient, solver=solver, form=form), times)
        torch.testing.assert_close(found, numeric, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("rule", ["uniform", "quadratic", "logsnr", "karras"])
def test_the_nodes_between_move_by_the_grids_rule(rule: str) -> None:
    """The ends' gradients are those of the whole run, inner nodes included; a fixed inner node gives another number."""

    def run(start: Any, end: Any, gradient: GradientMethod) -> Tensor:
        grid = TimeGrid(rule, steps=4, start=start, end=end)
        return loss("cosine", grid, gradient, solver=Heun(), form="exponential")

    ends = [torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in (0.9, 0.05)]
    with torch.no_grad():
        numeric = [
            float(run(0.9 + h, 0.05, Plain()) - run(0.9 - h, 0.05, Plain())) / (2 * h) for h in (1e-5,)
        ]
        numeric += [
            float(run(0.9, 0.05 + h, Plain()) - run(0.9, 0.05 - h, Plain())) / (2 * h) for h in (1e-6,)
        ]
    for gradient in (Plain(), Exact("min"), SymplecticAdjoint()):
        found = torch.autograd.grad(run(*ends, gradient), ends)
        assert [float(g) for g in found] == pytest.approx(numeric, rel=1e-6)
    nodes = TimeGrid(rule, steps=4, start=0.9, end=0.05).nodes(SCHEDULES["cosine"])
    fixed = torch.cat([ends[0][None], nodes[1:-1], ends[1][None]])
    alone = torch.autograd.grad(loss("cosine", fixed, Exact("min"), solver=Heun(), form="exponential"), ends)
    assert abs(float(alone[0]) - numeric[0]) > 1e-3 * abs(numeric[0])


def known(start: Tensor, end: Tensor) -> tuple[Tensor, ...]:
    network = GaussianNetwork(SCHEDULES["linear"], "epsilon")
    x0 = network.solution(start_state(SCHEDULES["linear"], 1.0), condition(), start, end)  # type: ignore[arg-type]
    return torch.autograd.grad((x0**2).sum(), [start, end])


@pytest.mark.parametrize(
    ("gradient", "order", "steps"),
    [
        (ContinuousAdjoint(RK4()), 4, 20),
        (ContinuousAdjoint(RK4(), trajectory="recompute"), 4, 20),
        (AdjointDEIS(2, "S"), 2, 40),
    ],
)
def test_continuous_methods_give_the_flows_boundary_terms(
    gradient: GradientMethod, order: int, steps: int
) -> None:
    """a · dx/dt at the end and -a · dx/dt at the start, at the method's order; nothing by the nodes between."""
    schedule = SCHEDULES["linear"]
    ends = [torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in (1.0, 0.05)]
    truth = known(*ends)
    errors = []
    for n in (steps, 2 * steps):
        grid = TimeGrid("logsnr", n, start=ends[0], end=ends[1])
        model = Denoiser(GaussianNetwork(schedule, "epsilon"), schedule)
        solution = sample(
            model, start_state(schedule, 1.0), condition(), solver=RK4(), grid=grid, form="exponential",
            gradient=gradient,
        )  # fmt: skip
        nodes = torch.autograd.grad((solution.x0**2).sum(), solution.times, retain_graph=True)[0]
        assert (nodes[1:-1] == 0).all()
        found = torch.autograd.grad((solution.x0**2).sum(), ends)
        errors.append([abs(float((f - t) / t)) for f, t in zip(found, truth, strict=True)])
    at_start, at_end = (math.log2(coarse / fine) for coarse, fine in zip(*errors, strict=True))
    assert abs(at_start - order) <= 0.3
    # At the end the adjoint is the loss's own gradient; only the forward pass (order 4) is to blame.
    assert abs(at_end - 4) <= 0.3


def test_a_loss_on_a_latent_gives_the_boundary_term_there() -> None:
    """By the time of a node in between, the flow's gradient is that of the losses on the state there alone."""
    schedule = SCHEDULES["linear"]
    times = smooth_grid("linear", 40).nodes(schedule).requires_grad_()
    network = GaussianNetwork(schedule, "epsilon")
    solution = sample(
        Denoiser(network, schedule), start_state(schedule, 1.0), condition(), solver=RK4(), grid=times,
        form="exponential", gradient=ContinuousAdjoint(RK4()), trajectory=True,
    )  # fmt: skip
    assert solution.trajectory is not None
    value = (solution.x0**2).sum() + (solution.trajectory[20] ** 3).sum()
    (found,) = torch.autograd.grad(value, times)
    inner = times[20].detach().requires_grad_()
    state = network.solution(start_state(schedule, 1.0), condition(), 1.0, inner)  # type: ignore[arg-type]
    (truth,) = torch.autograd.grad((state**3).sum(), inner)
    assert float(found[20]) == pytest.approx(float(truth), rel=1e-5)
    assert (found[1:20] == 0).all()
    assert (found[21:40] == 0).all()


def test_where_the_state_has_no_derivative_by_time_the_gradient_is_nan() -> None:
    """sigma' is infinite at t = 0 on VP schedules, so the end's gradient is; the start's is what it is."""
    schedule = VP.linear()
    model = Denoiser(GaussianNetwork(schedule, "epsilon"), schedule)
    times = torch.tensor([0.9, 0.5, 0.2, 0.0], dtype=torch.float64, requires_grad=True)
    x0 = sample(
        model,
        start_state(schedule, 0.9),
        condition(),
        solver=Heun(),
        grid=times,
        gradient=ContinuousAdjoint(),
    ).x0
    (found,) = torch.autograd.grad((x0**2).sum(), times)
    assert found.isnan().tolist() == [False, False, False, True]


def test_what_gives_no_gradient_by_times_says_so() -> None:
    times = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64, requires_grad=True)
    with pytest.raises(UnsupportedError, match="plain numbers"):
        loss("linear", times, Plain(), solver=DEIS(2))
    with pytest.raises(UnsupportedError, match="no derivative by the grid's times"):
        loss("linear", times, Exact("min"), solver=Ancestral(), seed=0)
    loss("linear", times, ContinuousAdjoint(Heun()), solver=DEIS(2)).backward()
    assert times.grad is not None
    assert times.grad.abs().min() >= 0
    with torch.no_grad():
        assert not loss("linear", times, Plain()).requires_grad
    with pytest.raises(InputError, match="one time"):
        TimeGrid("uniform", 4, start=torch.ones(2))


def test_an_adaptive_runs_accepted_nodes_stay() -> None:
    pytest.importorskip("torchdiffeq")
    times = torch.tensor([0.9, 0.4, 0.1], dtype=torch.float64, requires_grad=True)
    value = loss("linear", times, ContinuousAdjoint(RK4()), solver=AdaptiveDormandPrince(1e-7, 1e-7))
    (found,) = torch.autograd.grad(value, times)
    numeric = slopes("linear", times.detach()[[0, 2]], solver=AdaptiveDormandPrince(1e-8, 1e-8))
    torch.testing.assert_close(found[[0, 2]], numeric, rtol=1e-4, atol=0)
    assert found[1] == 0
