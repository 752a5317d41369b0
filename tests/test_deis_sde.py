"""AdjointDEIS on the diffusion SDE: strong order 1 along given noise, beside the exact gradient of a fine run."""

from __future__ import annotations

import pytest
import torch

import backdrift as bd
from backdrift.errors import MissingGradientError, UnsupportedError
from backdrift.gradients import deis
from backdrift.gradients.deis import AdjointDEIS
from backdrift.schedules import Flow
from backdrift.solvers import StochasticSolver
from problems import SCHEDULES, GaussianNetwork, MixtureNetwork, condition
from strong_gradients import CASES, DOUBLINGS, errors
from strong_orders import regression


@pytest.mark.parametrize("name", CASES)
def test_strong_order_is_one_for_every_variant(name: str) -> None:
    """2000 scalar paths of a mixture's SDE, 6 doublings."""
    by_x, by_cond, by_weights = errors(*CASES[name], DOUBLINGS)
    for what in (by_x, by_cond):
        assert abs(regression(what) - 1) < 0.25, what
        assert what[-1] < 0.03, what
    # The weights' gradient is one sum over all paths, in which the noise's part of the error averages out.
    assert regression(by_weights) > 0.75, by_weights


def test_without_the_factor_nothing_converges(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ODE's adjoint along the SDE's states: V in place of (1 + eta²) V."""
    monkeypatch.setattr(deis, "noise_level", lambda plan: 0.0)
    by_x, by_cond, _ = errors(*CASES["2M"], [256])
    assert min(*by_x, *by_cond) > 0.15


@pytest.mark.parametrize("trajectory", ["stored", "recompute"])
@pytest.mark.parametrize(
    "solver",
    [bd.Ancestral(), bd.Ancestral(0.5), bd.SDEDPMSolverPP(2), bd.ExponentialEuler(), bd.EulerMaruyama(0.7)],
    ids=repr,
)
def test_steps_at_singular_ends_are_differentiated_exactly(solver: StochasticSolver, trajectory: str) -> None:
    """Two steps, from alpha = 0 and to sigma = 0: no adjoint equation can be solved on either."""
    found = []
    for method in (bd.Plain(), AdjointDEIS(1, trajectory=trajectory)):
        network = GaussianNetwork(Flow(), "flow_prediction")
        x = torch.tensor([[1.0, -0.4, 0.7], [-0.3, 0.8, -1.1]], dtype=torch.float64, requires_grad=True)
        cond = condition().requires_grad_()
        model = bd.Denoiser(network, Flow(), "flow_prediction")
        x0 = bd.sample(model, x, cond, solver=solver, grid=[1.0, 0.4, 0.0], seed=2, gradient=method).x0
        found.append(torch.autograd.grad((x0**2).sum(), [x, cond, network.mean, network.log_variance]))
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_states_are_recomputed_along_the_noise_of_the_run() -> None:
    """The stored and the recomputed way back differ by the states' own error alone, whatever the noise's source."""
    process = SCHEDULES["linear"]
    cond = condition()
    differences = []
    for steps in (100, 200):
        grid = bd.TimeGrid(
            "logsnr", steps, start=process.t_from_rho(4.0).item(), end=process.t_from_rho(0.1).item()
        )
        found = []
        for trajectory in ("stored", "recompute"):
            x = torch.tensor([[1.0, -0.4, 0.7], [-0.3, 0.8, -1.1]], dtype=torch.float64, requires_grad=True)
            method = AdjointDEIS(1, trajectory=trajectory)
            model = bd.Denoiser(MixtureNetwork(process), process)
            x0 = bd.sample(
                model, x, cond, solver=bd.ExponentialEuler(), grid=grid, seed=5, gradient=method
            ).x0
            found.append(torch.autograd.grad((x0**2).sum(), x)[0])
        differences.append(float((found[0] - found[1]).norm() / found[0].norm()))
    assert 0 < differences[1] < 0.05
    assert differences[1] < 0.75 * differences[0]


def test_an_inner_point_has_its_part_of_the_steps_noise() -> None:
    """Where the network says 0 a path is its noises alone. Between the nodes it is straight in rho, solved back as well
    as stored."""
    process, asked = SCHEDULES["linear"], list[tuple[float, torch.Tensor]]()

    def silent(x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        asked.append((float(t[0]), x.detach().clone()))
        return 0 * x

    ways = []
    for trajectory in ("stored", "recompute"):
        x = torch.tensor([[1.0, -0.4, 0.7], [-0.3, 0.8, -1.1]], dtype=torch.float64, requires_grad=True)
        method = AdjointDEIS(2, "S", r=0.4, trajectory=trajectory)
        model, how = bd.Denoiser(silent, process), {"solver": bd.ExponentialEuler(), "grid": [0.8, 0.5, 0.2]}
        solution = bd.sample(model, x, condition(), seed=5, gradient=method, trajectory=True, **how)
        asked.clear()
        solution.x0.sum().backward()
        ways.append(list(asked))
    assert solution.trajectory is not None
    assert len(ways[0]) == 4
    for (t, stored), (again, recomputed) in zip(*ways, strict=True):
        assert t == again
        torch.testing.assert_close(recomputed, stored, rtol=1e-12, atol=1e-12)
    inner = {t: x / process.alpha(t) for t, x in ways[1] if t not in how["grid"]}
    for (t, y), a, b in zip(inner.items(), (1, 0), (2, 1), strict=True):
        rho = [float(process.rho(s)) for s in (how["grid"][a], t, how["grid"][b])]
        ends = [solution.trajectory[i] / process.alpha(how["grid"][i]) for i in (a, b)]
        straight = ends[0] + (rho[1] - rho[0]) / (rho[2] - rho[0]) * (ends[1] - ends[0])
        torch.testing.assert_close(y, straight, rtol=1e-12, atol=1e-12)


def test_noises_that_want_gradients_are_refused() -> None:
    process = SCHEDULES["linear"]
    model = bd.Denoiser(MixtureNetwork(process), process)
    x = torch.zeros(1, 3, dtype=torch.float64)
    noises = [torch.zeros_like(x), torch.zeros_like(x).requires_grad_()]
    with pytest.raises(MissingGradientError, match="noise 1 requires grad"):
        bd.sample(model, x, torch.zeros(1, 3), solver=bd.ExponentialEuler(), grid=[0.9, 0.5, 0.2], noise=noises,
                  gradient=AdjointDEIS())  # fmt: skip


def test_times_that_want_gradients_are_refused() -> None:
    """By every method: a step's noise has no derivative by its times."""
    process = SCHEDULES["linear"]
    model = bd.Denoiser(MixtureNetwork(process), process)
    x, times = torch.zeros(1, 3, dtype=torch.float64), torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)
    for solver in (bd.ExponentialEuler(), bd.Ancestral(), bd.EulerMaruyama(), bd.SDEDPMSolverPP()):
        for method in (AdjointDEIS(), bd.Exact(), bd.Plain()):
            with pytest.raises(UnsupportedError, match="no derivative by the grid's times"):
                bd.sample(model, x, torch.zeros(1, 3), solver=solver, grid=times.requires_grad_(), seed=0,
                          gradient=method)  # fmt: skip
