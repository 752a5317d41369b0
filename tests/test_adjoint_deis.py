"""AdjointDEIS on the ODE: orders 1 and 2 by both variants, from stored and from recomputed states."""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from backdrift.conditioning import PerStep
from backdrift.denoiser import Denoiser
from backdrift.errors import InputError
from backdrift.gradients import AdjointDEIS, ContinuousAdjoint, GradientMethod, Plain
from backdrift.grids import TimeGrid
from backdrift.sampling import Solution, sample
from backdrift.schedules import VP
from backdrift.solvers import RK4, Euler, Heun
from problems import SCHEDULES, MixtureNetwork, condition, scaled_linear_table, start_state

SCHEDULE = SCHEDULES["linear"]


def run(
    steps: int, gradient: GradientMethod, *, latents: bool = False, **settings: Any
) -> tuple[list[Tensor], Solution]:
    """Gradients by x_T, cond and the weights on a wide mixture, whose flow is asymptotic at few steps."""
    network = MixtureNetwork(SCHEDULE, width=1.0)
    x, c = start_state(SCHEDULE, 0.6).requires_grad_(), condition().requires_grad_()
    grid = TimeGrid("logsnr", steps, start=0.6, end=0.05)
    settings = {"solver": RK4(), "grid": grid, "form": "exponential", **settings}
    solution = sample(Denoiser(network, SCHEDULE), x, c, gradient=gradient, trajectory=latents, **settings)
    value = (solution.x0**2).sum() + solution.x0.sin().sum()
    if latents:
        assert solution.trajectory is not None
        value = (
            value + (solution.trajectory[steps // 2] ** 2).sum() + solution.trajectory[steps // 4].sin().sum()
        )
    return list(torch.autograd.grad(value, [x, c, network.means])), solution


@cache
def truth(latents: bool) -> list[Tensor]:
    return run(160, Plain(), latents=latents)[0]


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    return math.hypot(*(float((f - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True)))


@pytest.mark.parametrize("latents", [False, True])
@pytest.mark.parametrize("trajectory", ["stored", "recompute"])
@pytest.mark.parametrize(
    ("settings", "order"),
    [({"order": 1}, 1), ({"order": 2}, 2), ({"variant": "S"}, 2), ({"variant": "S", "r": 0.5}, 2)],
)
def test_declared_order_is_measured(settings: Any, order: int, trajectory: Any, latents: bool) -> None:
    """Also where losses on latents make the adjoint jump: the multistep variant starts those parts with order 1."""
    method = AdjointDEIS(**settings, trajectory=trajectory)
    coarse, fine = (error(run(n, method, latents=latents)[0], truth(latents)) for n in (40, 80))
    assert abs(math.log2(coarse / fine) - order) <= 0.25


def test_order_one_is_adjoint_dpm_with_euler() -> None:
    """With stored states the two are one method, on whatever forward solver."""
    for solver in (Euler(), Heun()):
        deis, _ = run(9, AdjointDEIS(1), solver=solver)
        dpm, _ = run(9, ContinuousAdjoint(Euler(), "exponential"), solver=solver)
        assert error(deis, dpm) < 1e-13


def test_order_one_is_its_published_recursion() -> None:
    """a_s' = (α_t/α_s) a_t + σ_s (e^h - 1) (α_t²/α_s²) a_t · ∂ε/∂x at (x_t, t), and the like for the conditioning."""
    network = MixtureNetwork(SCHEDULE, width=1.0)
    grid = TimeGrid("logsnr", 6, start=0.6, end=0.05)
    x, c = start_state(SCHEDULE, 0.6).requires_grad_(), condition().requires_grad_()
    solution = sample(
        Denoiser(network, SCHEDULE),
        x,
        c,
        grid=grid,
        form="exponential",
        gradient=AdjointDEIS(1),
        trajectory=True,
    )
    assert solution.trajectory is not None
    found = torch.autograd.grad((solution.x0**2).sum(), [x, c])
    a, on_c = 2 * solution.x0.detach(), torch.zeros_like(c)
    nodes = list(zip(solution.times, solution.trajectory, strict=True))
    for (noisy, _), (clean, state) in reversed(list(itertools.pairwise(nodes))):
        at, given = state.detach().requires_grad_(), c.detach().requires_grad_()
        eps = network(at, clean.expand(2), given)
        by_x, by_c = torch.autograd.grad(eps, [at, given], a)
        ratio = SCHEDULE.alpha(clean) / SCHEDULE.alpha(noisy)
        weight = SCHEDULE.sigma(noisy) * torch.expm1(SCHEDULE.lam(noisy) - SCHEDULE.lam(clean))
        a, on_c = ratio * a + weight * ratio**2 * by_x, on_c + weight * ratio * by_c
    torch.testing.assert_close(found[0], a, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found[1], on_c, rtol=1e-12, atol=1e-14)


def test_what_each_variant_costs() -> None:
    """One evaluation and one product a step; the singlestep variant at r = 1 shares the node's evaluation."""
    costs = {
        (AdjointDEIS(1), 12, 12),
        (AdjointDEIS(2), 12, 12),
        (AdjointDEIS(2, "S"), 13, 24),
        (AdjointDEIS(2, "S", r=0.5), 24, 24),
        (AdjointDEIS(2, "S", trajectory="recompute"), 24, 24),
    }
    for method, calls, products in costs:
        stats = run(12, method)[1].stats
        assert (stats.calls_redone, stats.vjps) == (calls, products), method


def test_conditioning_per_step() -> None:
    """The singlestep variant keeps order 2 over jumps of the conditioning; the multistep one refuses them."""
    pieces = [(condition() * (1 + i)).requires_grad_() for i in range(4)]

    def pieces_run(n: int, gradient: GradientMethod) -> list[Tensor]:
        network = MixtureNetwork(SCHEDULE, width=1.0)
        cond = PerStep([piece for piece in pieces for _ in range(n // 4)])
        x = start_state(SCHEDULE, 0.6).requires_grad_()
        grid = TimeGrid("logsnr", n, start=0.6, end=0.05)
        solution = sample(
            Denoiser(network, SCHEDULE),
            x,
            cond,
            solver=RK4(),
            grid=grid,
            form="exponential",
            gradient=gradient,
        )
        return list(torch.autograd.grad((solution.x0**2).sum(), [x, *pieces, network.means]))

    expected = pieces_run(160, Plain())
    coarse, fine = (error(pieces_run(n, AdjointDEIS(2, "S")), expected) for n in (40, 80))
    assert abs(math.log2(coarse / fine) - 2) <= 0.25
    with pytest.raises(InputError, match="variant='S'"):
        pieces_run(8, AdjointDEIS(2, "M"))


@pytest.mark.parametrize("method", [AdjointDEIS(1), AdjointDEIS(2), AdjointDEIS(2, "S")])
def test_a_step_to_the_clean_end_is_differentiated_itself(method: AdjointDEIS) -> None:
    """lam is infinite at sigma = 0. That step alone gets plain autograd's gradient; with steps before it the two
    differ by what the adjoint equation and Euler's method differ by, which halves with the steps."""
    schedule = VP.discrete(scaled_linear_table(), "spline")
    network = MixtureNetwork(schedule, width=1.0)

    def distance(grid: list[float]) -> float:
        x, c = start_state(schedule, grid[0]).requires_grad_(), condition().requires_grad_()
        results = []
        for gradient in (method, Plain()):
            x0 = sample(
                Denoiser(network, schedule), x, c, grid=grid, form="exponential", gradient=gradient
            ).x0
            results.append(list(torch.autograd.grad((x0**2).sum(), [x, c, network.means])))
        return error(*results)

    assert distance([0.0, -1.0]) < 1e-14
    grids = [TimeGrid("logsnr", n, start=600.0, end=20.0).nodes(schedule).tolist() for n in (40, 80)]
    coarse, fine = (distance([*nodes, -1.0]) for nodes in grids)
    assert 1.6 < coarse / fine < 2.6


def test_impossible_settings_are_refused() -> None:
    for settings, message in (
        ({"order": 3}, "orders 1 and 2"),
        ({"variant": "T"}, "multistep"),
        ({"r": 0.0}, "above 0"),
        ({"r": 1.5}, "at most 1"),
        ({"trajectory": "none"}, "'stored' or 'recompute'"),
    ):
        with pytest.raises(InputError, match=message):
            AdjointDEIS(**settings)  # type: ignore[arg-type]
