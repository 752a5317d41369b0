"""The continuous adjoint: the true flow's gradient, at the least of the orders that take part."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from backdrift.conditioning import PerStep
from backdrift.denoiser import Denoiser
from backdrift.errors import InputError
from backdrift.forms import Form
from backdrift.gradients import ContinuousAdjoint, GradientMethod, Plain
from backdrift.gradients.paths import StoredPath
from backdrift.gradients.quadrature import evaluation_weights
from backdrift.grids import TimeGrid
from backdrift.sampling import sample
from backdrift.schedules import VP, Flow
from backdrift.solvers import (
    DEIS,
    RK4,
    AdamsBashforth,
    Ancestral,
    Euler,
    Heun,
    McCallumFoster,
    Solver,
)
from continuous_runs import errors, gaussian_truth, loss, mild, mild_grid, mixture_truth, orders, run
from problems import (
    SCHEDULES,
    GaussianNetwork,
    MixtureNetwork,
    condition,
    scaled_linear_table,
    start_state,
)


def slope(method: GradientMethod, truth: list[Tensor], steps: int, **settings: Any) -> float:
    """The measured order between ``steps`` and twice as many, over x_T, cond and weights together."""
    coarse, fine = (
        math.hypot(*errors(run("linear", n, method, **settings)[0], truth)) for n in (steps, 2 * steps)
    )
    return math.log2(coarse / fine)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("form", ["original", "exponential", "data"])
def test_order_two_on_every_schedule_and_form(schedule: str, form: str) -> None:
    found = [
        errors(
            run(schedule, n, ContinuousAdjoint(Heun()), GaussianNetwork, solver=Heun(), form=form)[0],
            gaussian_truth(schedule),
        )
        for n in (40, 80)
    ]
    assert orders(*found) == pytest.approx([2.0] * 3, abs=0.25)


@pytest.mark.parametrize("trajectory", ["stored", "recompute"])
@pytest.mark.parametrize(
    ("forward", "back", "order", "steps"),
    [
        (RK4(), RK4(), 4, 20),  # stages between nodes: the stored path's interpolation is of order 4 too
        (RK4(), Heun(), 2, 40),
        (Heun(), RK4(), 2, 40),
        (RK4(), Euler(), 1, 60),
        (Euler(), RK4(), 1, 60),
    ],
)
def test_the_order_is_the_least_of_those_that_take_part(
    forward: Solver, back: Solver, order: int, steps: int, trajectory: Any
) -> None:
    method = ContinuousAdjoint(back, trajectory=trajectory)
    assert abs(slope(method, mixture_truth(), steps, solver=forward) - order) <= 0.25


def test_the_stored_path_is_interpolated_at_order_four() -> None:
    """Between exact states of a known flow the error falls by 16 where the steps are halved."""
    schedule, c = SCHEDULES["linear"], condition()
    network = GaussianNetwork(schedule, "epsilon").requires_grad_(False)
    x = start_state(schedule, 0.6)

    def output(x: Tensor, t: float, interval: int) -> Tensor:
        return network(x, torch.full((2,), t, dtype=torch.float64), c)

    found = []
    for n in (10, 20):
        times = mild_grid(n).nodes(schedule).tolist()
        states = [network.solution(x, c, 0.6, t) for t in times]
        record = {("state", i): state for i, state in enumerate(states)}
        path = StoredPath(Form("exponential", schedule, "epsilon"), times, record, output)
        middles = [(i, (a + b) / 2) for i, (a, b) in enumerate(itertools.pairwise(times))]
        found.append(max(float((path.at(t, i) - network.solution(x, c, 0.6, t)).norm()) for i, t in middles))
        assert torch.equal(path.at(times[3], 2), states[3])
    assert abs(math.log2(found[0] / found[1]) - 4) <= 0.25


@pytest.mark.parametrize(
    ("back", "steps"), [(AdamsBashforth(2), 80), (AdamsBashforth(4), 120), (DEIS(2), 80)]
)
def test_a_multistep_way_back_keeps_its_order_in_every_sum(back: Solver, steps: int) -> None:
    """Each evaluation is added to the sums once, with the weight of all the steps that use it."""
    method = ContinuousAdjoint(back)
    found = [
        errors(run("linear", n, method, GaussianNetwork, solver=RK4())[0], gaussian_truth("linear"))
        for n in (steps, 2 * steps)
    ]
    assert min(orders(*found)) > back.order - 0.3


@pytest.mark.parametrize("back_form", ["original", "data"])
def test_the_way_back_may_use_another_form(back_form: str) -> None:
    method = ContinuousAdjoint(RK4(), back_form)
    assert abs(slope(method, mixture_truth(), 20, solver=RK4()) - 4) <= 0.25


@pytest.mark.parametrize("trajectory", ["stored", "recompute"])
def test_a_grid_of_its_own(trajectory: Any) -> None:
    """Nodes that are none of the run's, at fixed forward steps: the error is the way back's alone."""
    found = []
    for n in (40, 80):
        method = ContinuousAdjoint(Heun(), grid=TimeGrid("karras", n), trajectory=trajectory)
        gradient, solution = run("linear", 43, method, solver=RK4())
        assert solution.stats.vjps == 2 * n
        found.append(math.hypot(*errors(gradient, mixture_truth())))
    assert abs(math.log2(found[0] / found[1]) - 2) <= 0.25
    with pytest.raises(InputError, match="leave its ends open"):
        run("linear", 4, ContinuousAdjoint(grid=[1.0, 0.5]))


@pytest.mark.parametrize("trajectory", ["stored", "recompute"])
def test_losses_on_latents_add_to_the_adjoint_on_the_way(trajectory: Any) -> None:
    method = ContinuousAdjoint(RK4(), trajectory=trajectory)
    assert abs(slope(method, mixture_truth(True), 20, latents=True, solver=RK4()) - 4) <= 0.25


def test_conditioning_per_step_is_met_step_by_step() -> None:
    """Four pieces of conditioning that jump: order 4 holds, because the way back stops at every node."""
    pieces = [(condition() * (1 + i)).requires_grad_() for i in range(4)]

    def pieces_run(n: int, gradient: GradientMethod) -> list[Tensor]:
        network = mild(SCHEDULES["linear"], "epsilon")
        cond = PerStep([piece for piece in pieces for _ in range(n // 4)])
        x = start_state(SCHEDULES["linear"], 0.6).requires_grad_()
        x0 = sample(
            Denoiser(network, SCHEDULES["linear"]), x, cond, solver=RK4(), grid=mild_grid(n),
            form="exponential", gradient=gradient,
        ).x0  # fmt: skip
        return list(torch.autograd.grad(loss(x0), [x, *pieces, network.means]))

    # The pieces change where the coarser grids have nodes, so all grids see one and the same flow.
    nodes = mild_grid(4).nodes(SCHEDULES["linear"])
    assert torch.allclose(mild_grid(40).nodes(SCHEDULES["linear"])[::10], nodes)
    truth = pieces_run(200, Plain())
    for trajectory in ("stored", "recompute"):
        method = ContinuousAdjoint(RK4(), trajectory=trajectory)
        coarse, fine = (math.hypot(*errors(pieces_run(n, method), truth)) for n in (20, 40))
        assert abs(math.log2(coarse / fine) - 4) <= 0.25


def test_a_state_halfway_makes_the_path_a_quartic() -> None:
    """Through the values and slopes at both ends and one value between, a quartic is met exactly, a quintic is not."""
    schedule = SCHEDULES["linear"]
    form = Form("original", schedule, "epsilon")
    times, middle = [0.9, 0.4], 0.6

    def path(power: int) -> tuple[StoredPath, Any]:
        def value(t: float) -> Tensor:
            return torch.tensor([(t - 0.2) ** power], dtype=torch.float64)

        def output(x: Tensor, t: float, interval: int) -> Tensor:
            on_x, on_output = form.coefficients(t)
            return (power * (t - 0.2) ** (power - 1) - on_x * x) / on_output

        record = {("state", i): value(t) for i, t in enumerate(times)} | {("middle", 0): value(middle)}
        return StoredPath(form, times, record, output, {0: middle}), value

    for power in (4, 5):
        found, value = path(power)
        distance = max(float((found.at(t, 0) - value(t)).abs()) for t in (0.45, 0.6, 0.77))
        assert (distance < 1e-13) == (power == 4)
        assert float((found.at(middle, 0) - value(middle)).abs()) < 1e-13


@pytest.mark.parametrize("form", ["exponential", "data"])
@pytest.mark.parametrize("trajectory", ["stored", "recompute"])
def test_singular_ends_of_a_flow(form: str, trajectory: Any) -> None:
    """From alpha = 0 to sigma = 0 on forms that are infinite there: the gradient converges to the flow's."""
    network = GaussianNetwork(Flow(), "flow_prediction")
    x, c = start_state(Flow(), 1.0).requires_grad_(), condition().requires_grad_()
    truth = list(torch.autograd.grad(loss(network.solution(x, c, 1.0, 0.0)), [x, c, network.mean]))
    found = []
    for n in (20, 80):
        x0 = sample(
            Denoiser(network, Flow(), "flow_prediction"), x, c, solver=Heun(), grid=TimeGrid("uniform", n),
            form=form, gradient=ContinuousAdjoint(Heun(), trajectory=trajectory),
        ).x0  # fmt: skip
        found.append(max(errors(list(torch.autograd.grad(loss(x0), [x, c, network.mean])), truth)))
    assert found[1] < 5e-3
    assert found[0] / found[1] > 6


@pytest.mark.parametrize("trajectory", ["stored", "recompute"])
def test_the_step_to_a_clean_end_is_differentiated_itself(trajectory: Any) -> None:
    """At t = -1 of a trained table the network cannot be asked; the rest of the way converges as ever."""
    schedule = VP.discrete(scaled_linear_table(), "spline")
    network = MixtureNetwork(schedule)

    def clean_run(n: int, solver: Solver, gradient: GradientMethod) -> list[Tensor]:
        nodes = TimeGrid("logsnr", n, start=900.0, end=20.0).nodes(schedule).tolist()
        x, c = start_state(schedule, 900.0).requires_grad_(), condition().requires_grad_()
        x0 = sample(
            Denoiser(network, schedule),
            x,
            c,
            solver=solver,
            grid=[*nodes, -1.0],
            form="exponential",
            gradient=gradient,
        ).x0
        return list(torch.autograd.grad(loss(x0), [x, c, network.means]))

    # The same states and the same last step; what differs is the way back over the others, of order 1 as the run is.
    method, found = ContinuousAdjoint(Euler(), trajectory=trajectory), []
    for n in (80, 160):
        found.append(max(errors(clean_run(n, Euler(), method), clean_run(n, Euler(), Plain()))))
    assert 1.6 < found[0] / found[1] < 2.6


def test_weights_of_evaluations_are_the_methods_own() -> None:
    form = Form("original", VP.linear(), "epsilon")
    nodes = [form.node(t) for t in (0.1, 0.25, 0.3, 0.5, 0.8)]
    for solver in (Euler(), Heun(), RK4(), AdamsBashforth(2), AdamsBashforth(4)):
        times, weights = evaluation_weights(solver, form, nodes)
        assert len(times) == sum(solver.evaluations(i) for i in range(4))
        for power in range(min(solver.order, 4)):
            if isinstance(solver, AdamsBashforth) and power >= 2 and solver.order == 2:
                continue
            integral = (0.8 ** (power + 1) - 0.1 ** (power + 1)) / (power + 1)
            total = sum(w * t**power for w, t in zip(weights, times, strict=True))
            assert total == pytest.approx(integral, rel=1e-12), (solver, power)


def test_stored_stages_between_nodes_cost_no_network_call() -> None:
    """RK4 back over 12 steps: 4 evaluations a step, none more for the path between the nodes."""
    for trajectory in ("stored", "recompute"):
        _, solution = run("linear", 12, ContinuousAdjoint(RK4(), trajectory=trajectory), solver=RK4())
        assert solution.stats.calls_redone == solution.stats.vjps == 48


def test_what_it_cannot_be_used_with_is_refused() -> None:
    with pytest.raises(InputError, match="solves the SDE"):
        run("linear", 4, ContinuousAdjoint(), solver=Ancestral(), form="data", seed=0)
    for solver in (Ancestral(), McCallumFoster(), Euler):
        with pytest.raises(InputError, match="deterministic solver"):
            ContinuousAdjoint(solver)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="original, exponential, data"):
        ContinuousAdjoint(form="ddim")
    with pytest.raises(InputError, match="'stored' or 'recompute'"):
        ContinuousAdjoint(trajectory="none")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="exponential"):
        run("linear", 4, ContinuousAdjoint(DEIS(2), "data"))
