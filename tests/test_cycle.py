"""A picture as noises: it comes back to rounding, and an edit on Gaussian data is known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import backdrift as bd
from backdrift.errors import InputError
from backdrift.solvers import StochasticSolver
from problems import SCHEDULES, GaussianNetwork, MixtureNetwork, condition, smooth_grid

SOLVERS: dict[str, StochasticSolver] = {
    "ancestral": bd.Ancestral(),
    "ancestral half": bd.Ancestral(0.5),
    "large": bd.Ancestral(variance="large"),
    "euler-maruyama": bd.EulerMaruyama(),
    "exponential euler": bd.ExponentialEuler(),
    "sde-dpm++ 2m": bd.SDEDPMSolverPP(),
}


def picture(dtype: torch.dtype = torch.float64) -> Tensor:
    """Nothing that the models below would make."""
    return torch.tensor([[9.0, -7.0, 0.1], [0.0, 3.0, -4.0]], dtype=dtype)


@pytest.mark.parametrize("coupling", ["path", "independent"])
@pytest.mark.parametrize(
    ("schedule", "name"),
    [
        *(("linear", name) for name in SOLVERS),
        *((schedule, "ancestral") for schedule in SCHEDULES if schedule != "linear"),
    ],
)
def test_the_picture_comes_back(schedule: str, name: str, coupling: str) -> None:
    """50 steps in float64: sampling with the noises returns the picture and passes the drawn x_T."""
    process = SCHEDULES[schedule]
    prediction = "flow_prediction" if schedule == "flow" else "epsilon"
    model = bd.Denoiser(MixtureNetwork(process, prediction), process, prediction)
    how = {"solver": SOLVERS[name], "grid": smooth_grid(schedule, 50)}
    code = bd.cycle_encode(model, picture(), condition(), **how, seed=3, coupling=coupling)
    assert len(code.noises) == 50
    back = bd.sample(model, code.x_T, condition(), **how, noise=code.noises).x0
    torch.testing.assert_close(back.detach(), picture(), rtol=0, atol=1e-10)
    other = bd.sample(model, code.x_T, condition() + 0.5, **how, noise=code.noises).x0
    assert float((other.detach() - picture()).abs().max()) > 1e-3


def test_float32_comes_back_to_its_own_rounding() -> None:
    """The noises are found for the states that sampling will visit, so rounding does not add up over the steps."""
    process = SCHEDULES["linear"]
    model = bd.Denoiser(MixtureNetwork(process).float(), process)
    how = {"solver": bd.ExponentialEuler(), "grid": bd.TimeGrid("logsnr", steps=200)}
    code = bd.cycle_encode(model, picture(torch.float32), condition().float(), **how)
    back = bd.sample(model, code.x_T, condition().float(), **how, noise=code.noises).x0
    torch.testing.assert_close(back.detach(), picture(torch.float32), rtol=1e-6, atol=1e-6)


def test_runs_to_sigma_0_come_back_where_the_last_step_adds_noise() -> None:
    process = SCHEDULES["flow"]
    model = bd.Denoiser(GaussianNetwork(process, "flow_prediction"), process, "flow_prediction")
    how = {"solver": bd.EulerMaruyama(), "grid": bd.TimeGrid("uniform", steps=30, start=1.0, end=0.0)}
    code = bd.cycle_encode(model, picture(), condition(), **how)
    back = bd.sample(model, code.x_T, condition(), **how, noise=code.noises).x0
    torch.testing.assert_close(back.detach(), picture(), rtol=0, atol=1e-10)
    with pytest.raises(InputError, match="no noise in 1 of the 30 steps"):
        bd.cycle_encode(model, picture(), condition(), grid=how["grid"])


def test_an_edit_on_gaussian_data_is_the_known_shift() -> None:
    """On data N(mean + cond, s²) both runs have the same noise, and their difference obeys a linear ODE: a change d of
    cond moves the picture by alpha d (1 - (s² + rho_end²) / (s² + rho_start²))."""
    process = SCHEDULES["linear"]
    network = GaussianNetwork(process, "epsilon").requires_grad_(False)
    model = bd.Denoiser(network, process)
    change = torch.tensor([0.4, -0.3, 0.2], dtype=torch.float64)
    errors = []
    for steps in (100, 200):
        grid = smooth_grid("linear", steps)
        start, end = grid.nodes(process)[[0, -1]]
        how = {"solver": bd.ExponentialEuler(), "grid": grid}
        code = bd.cycle_encode(model, picture(), condition(), **how)
        edited = bd.sample(model, code.x_T, condition() + change, **how, noise=code.noises).x0
        s2 = network.log_variance.exp()
        shrink = (s2 + process.rho(end) ** 2) / (s2 + process.rho(start) ** 2)
        known = picture() + process.alpha(end) * change * (1 - shrink)
        errors.append(float((edited - known).norm() / (known - picture()).norm()))
    assert errors[1] < 1e-3
    assert abs(math.log2(errors[0] / errors[1]) - 1) < 0.25


@pytest.mark.parametrize("coupling", ["path", "independent"])
def test_noises_of_pictures_from_the_data_have_the_known_variance(coupling: str) -> None:
    """In y and v = rho² the step's mean is k y_a with k = 1 - 2 rho_a (rho_a - rho_b) / (s² + v_a), and (y_a, y_b) are
    jointly normal. Along a path the noises are standard normal but for the step's own error, and uncorrelated;
    drawn independently they are larger, and neighbouring ones of opposite sign."""
    process, rows = SCHEDULES["linear"], 2000
    network = GaussianNetwork(process, "epsilon").requires_grad_(False)
    grid = smooth_grid("linear", 30)
    times = grid.nodes(process)
    end, s2, rho = times[-1], network.log_variance.exp(), process.rho(times)[:, None]
    spread = (process.alpha(end) ** 2 * s2 + process.sigma(end) ** 2).sqrt()
    draws = torch.randn(rows, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x0 = process.alpha(end) * network.mean + spread * draws
    code = bd.cycle_encode(bd.Denoiser(network, process), x0, torch.zeros(3, dtype=torch.float64),
                           solver=bd.ExponentialEuler(), grid=grid, coupling=coupling)  # fmt: skip
    noises = torch.stack(code.noises)
    a, b, v_end = rho[:-1], rho[1:], rho[-1] ** 2
    keep = 1 - 2 * a * (a - b) / (s2 + a**2)
    if coupling == "path":
        joint = (1 - keep) ** 2 * (s2 + b**2) + keep**2 * (a**2 - b**2)
    else:
        joint = (1 - keep) ** 2 * (s2 + v_end) + keep**2 * (a**2 - v_end) + (b**2 - v_end)
    known = joint / (a**2 - b**2)
    assert float((noises.square().mean(1) / known - 1).abs().max()) < 5 * math.sqrt(2 / rows)
    neighbours = (noises[1:] * noises[:-1]).mean(1)
    if coupling == "path":
        assert float((known - 1).abs().max()) < 0.5
        assert float(neighbours.abs().max()) < 0.1
    else:
        assert float(known.mean()) > 2
        assert float(neighbours.mean()) < -0.5


def test_impossible_input_is_refused() -> None:
    process = SCHEDULES["linear"]
    model = bd.Denoiser(MixtureNetwork(process), process)
    with pytest.raises(InputError, match="adds no noise"):
        bd.cycle_encode(model, picture(), condition(), solver=bd.Heun())
    with pytest.raises(InputError, match="adds no noise"):
        bd.cycle_encode(model, picture(), condition(), solver=bd.SDEDPMSolverPP(eta=0.0))
    with pytest.raises(InputError, match="coupling is one of path, independent"):
        bd.cycle_encode(model, picture(), condition(), coupling="both")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="int64"):
        bd.cycle_encode(model, picture().long(), condition())
