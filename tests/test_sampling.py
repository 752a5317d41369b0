"""``sample``: what it returns, its defaults, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import backdrift as bd
from backdrift.errors import InputError, NonFiniteError
from problems import SCHEDULES, GaussianNetwork, condition, start_state, toy_denoiser, toy_inputs

SCHEDULE = SCHEDULES["linear"]


def gaussian() -> tuple[bd.Denoiser, GaussianNetwork, Tensor, Tensor]:
    network = GaussianNetwork(SCHEDULE, "epsilon")
    return bd.Denoiser(network, SCHEDULE), network, start_state(SCHEDULE, 1.0), condition()


def test_the_trajectory_follows_the_known_solution() -> None:
    model, network, x, c = gaussian()
    grid = bd.TimeGrid("logsnr", steps=200, start=1.0, end=0.02)
    solution = bd.sample(model, x, c, solver=bd.RK4(), grid=grid, trajectory=True)
    assert solution.trajectory is not None
    assert solution.trajectory[0] is x
    assert solution.trajectory[-1] is solution.x0
    assert torch.equal(solution.times, grid.nodes(SCHEDULE))
    assert solution.nfe == 800 == solution.stats.calls_forward
    for i in (50, 100, 200):
        known = network.solution(x, c, 1.0, float(solution.times[i]))
        torch.testing.assert_close(solution.trajectory[i], known, rtol=0, atol=1e-7)


def test_gradients_reach_every_latent_on_the_way() -> None:
    model, network, x, c = gaussian()
    grid = bd.TimeGrid("logsnr", steps=100, start=1.0, end=0.02)
    x.requires_grad_()
    solution = bd.sample(model, x, c, solver=bd.RK4(), grid=grid, gradient=bd.Exact("min"), trajectory=True)
    assert solution.trajectory is not None
    for i in (0, 40, 99):
        (found,) = torch.autograd.grad(solution.x0.sum(), solution.trajectory[i], retain_graph=True)
        latent = solution.trajectory[i].detach().requires_grad_()
        known = network.solution(latent, c, float(solution.times[i]), float(solution.times[-1]))
        torch.testing.assert_close(found, torch.autograd.grad(known.sum(), latent)[0], rtol=1e-5, atol=1e-6)


def test_the_trajectory_costs_no_bits() -> None:
    x, cond = toy_inputs()
    one, two = (bd.sample(toy_denoiser(), x, cond, trajectory=t).x0 for t in (False, True))
    assert torch.equal(one, two)


def test_defaults_are_ddim_and_flow_euler() -> None:
    model, _, x, c = gaussian()
    explicit = bd.sample(model, x, c, solver=bd.Euler(), grid=bd.TimeGrid("uniform", 20), form="exponential")
    assert torch.equal(bd.sample(model, x, c).x0, explicit.x0)
    flow = bd.Denoiser(lambda x, t, c: -x * t[:, None], bd.Flow(), "flow_prediction")
    by_hand = x
    for t in torch.linspace(1, 0, 21, dtype=torch.float64)[:-1]:
        by_hand = by_hand + 0.05 * by_hand * t
    torch.testing.assert_close(bd.sample(flow, x).x0, by_hand, rtol=1e-13, atol=0)
    times = [1.0, 0.6, 0.3]
    assert bd.sample(flow, x, grid=times).times.tolist() == times


def test_stats_go_on_counting_in_the_backward_pass() -> None:
    x, cond = toy_inputs()
    x.requires_grad_()
    solution = bd.sample(toy_denoiser(), x, cond, grid=bd.TimeGrid("uniform", 4), gradient=bd.Exact("min"))
    before = solution.stats.as_dict()
    assert (before["calls_forward"], before["calls_redone"], before["vjps"], before["calls_kept"]) == (
        4,
        0,
        0,
        1,
    )
    solution.x0.sum().backward()
    after = solution.stats.as_dict()
    assert (after["calls_forward"], after["calls_redone"], after["vjps"], solution.nfe) == (4, 3, 4, 4)
    assert after["seconds_backward"] >= after["seconds_redone"] > 0


def test_non_finite_states_name_the_step() -> None:
    def network(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return x / 0 if 0.3 < float(t[0]) < 0.5 else x

    model = bd.Denoiser(network, bd.Flow(), "flow_prediction")
    with pytest.raises(NonFiniteError, match=r"step 3 of 4, from t = 0\.4 to 0\.2"):
        bd.sample(model, torch.ones(1, 2), grid=[0.8, 0.6, 0.4, 0.2, 0.0])
    unchecked = bd.sample(model, torch.ones(1, 2), grid=[0.8, 0.6, 0.4, 0.2, 0.0], check_finite=False)
    assert not unchecked.x0.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_T": torch.ones(2, 2, dtype=torch.int64)}, "int64"),
        ({"x_T": torch.tensor(1.0)}, r"\(B"),
        ({"x_T": torch.ones(0, 2)}, "B >= 1"),
        ({"x_T": [1.0]}, "list"),
        ({"solver": bd.Euler}, "with brackets"),
        ({"solver": "euler"}, "must be a Solver"),
        ({"gradient": "exact"}, "must be a GradientMethod"),
        ({"model": torch.nn.Identity()}, "must be a Denoiser"),
        ({"form": "ddim"}, "original, exponential, data"),
        ({"grid": [0.5, 0.7]}, "fall strictly"),
    ],
)
def test_impossible_input_is_refused(change: dict[str, Any], message: str) -> None:
    model, _, x, c = gaussian()
    with pytest.raises(InputError, match=message):
        bd.sample(**{"model": model, "x_T": x, "cond": c, **change})
