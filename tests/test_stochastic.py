"""Stochastic solvers: strong orders along known paths, exact means and variances, and others' steps, to rounding."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor, nn

import backdrift as bd
from backdrift.errors import InputError
from backdrift.schedules import VP, Flow
from backdrift.solvers import StochasticSolver
from problems import (
    PREDICTIONS,
    SCHEDULES,
    GaussianNetwork,
    MixtureNetwork,
    ScalarPaths,
    condition,
    scaled_linear_table,
    smooth_grid,
    start_state,
    toy_denoiser,
    toy_inputs,
)
from strong_orders import SOLVERS, known_paths, moment_errors, regression, strong_errors


@pytest.mark.parametrize(
    ("schedule", "name"),
    [
        *(("linear", name) for name in SOLVERS),
        ("cosine", "euler-maruyama"),
        ("edm", "exponential euler"),
        ("edm", "sde-dpm++ 2m"),
        ("flow", "euler-maruyama"),
        ("flow", "ancestral"),
    ],
)
def test_strong_order_along_known_paths(schedule: str, name: str) -> None:
    """2000 scalar paths, 6 doublings, the solution along each path in closed form."""
    solver = SOLVERS[name]
    errors = strong_errors(schedule, solver)
    assert abs(regression(errors) - solver.order) < 0.2, errors
    assert abs(math.log2(errors[-2] / errors[-1]) - solver.order) < 0.1, errors
    assert errors[-1] < 4e-3


def test_the_known_paths_are_those_of_the_brownian_source() -> None:
    """The coarse noises of the problem are sums of the finest; those of the source are read where the grid stands."""
    problem, process = known_paths(1.0), SCHEDULES["linear"]
    model = bd.Denoiser(problem.network(process), process)
    x_T, _ = problem.ends(process)
    for steps in (4, 64):
        run = {"solver": bd.ExponentialEuler(), "grid": problem.times(process, steps)}
        given = bd.sample(model, x_T, torch.zeros(1), noise=problem.noises(steps), **run).x0
        read = bd.sample(model, x_T, torch.zeros(1), seed=0, **run).x0
        assert 0 < float((given - read).abs().max()) < 1e-4


def test_large_variance_is_exact_on_standard_normal_data() -> None:
    """DDPM's choice of sigma² = beta is the best one there (Ho et al. 2020, Section 3.2); on this path, to rounding."""

    class StandardPaths(ScalarPaths):
        mean, variance = 0.0, 1.0

    problem = StandardPaths(rows=100, finest=64)
    errors = []
    for steps in (4, 64):
        process = SCHEDULES["linear"]
        model = bd.Denoiser(problem.network(process), process)
        x_T, truth = problem.ends(process)
        found = bd.sample(model, x_T, torch.zeros(1), solver=bd.Ancestral(variance="large"),
                          grid=problem.times(process, steps), noise=problem.noises(steps)).x0  # fmt: skip
        errors.append(float((found - truth).abs().max()))
    assert max(errors) < 1e-12


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("name", "order"),
    [("ancestral", 1), ("ancestral half", 1), ("ancestral large", 1), ("euler-maruyama", 1),
     ("sde-dpm++ 2m", 2), ("sde-dpm++ 2m half", 2)],
)  # fmt: skip
def test_means_and_variances_converge_at_the_weak_order(schedule: str, name: str, order: int) -> None:
    coarse, fine = (moment_errors(schedule, SOLVERS[name], steps) for steps in (40, 80))
    assert abs(math.log2(float(coarse[1].norm() / fine[1].norm())) - order) < 0.2
    if name.startswith("euler-maruyama") and float(fine[0].norm()) > 1e-12:
        assert abs(math.log2(float(coarse[0].norm() / fine[0].norm())) - order) < 0.1
    else:  # the others move the mean like the ODE of a point, which they solve exactly
        assert float(fine[0].norm()) < 1e-12


def test_exponential_euler_has_weak_order_one() -> None:
    """At eta = 1 the variance's leading error all but vanishes on some data; EDM's is an ordinary case."""
    for name in ("exponential euler", "exponential euler half"):
        coarse, fine = (moment_errors("edm", SOLVERS[name], steps)[1] for steps in (200, 400))
        assert abs(math.log2(float(coarse.norm() / fine.norm())) - 1) < 0.1


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ancestral_is_diffusers_ddpm(variance: str) -> None:
    table = scaled_linear_table()
    scheduler = DDPMScheduler(
        clip_sample=False, variance_type=f"fixed_{variance}", timestep_spacing="leading"
    )
    scheduler.alphas_cumprod = table
    scheduler.set_timesteps(10)
    process = VP.discrete(table)
    network = MixtureNetwork(process)
    x, c = start_state(process, 900.0), condition()
    noises = [
        torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        for i in range(10)
    ]
    times = [*scheduler.timesteps.tolist(), process.t_clean]
    with torch.no_grad():
        ours = bd.sample(bd.Denoiser(network, process), x, c, solver=bd.Ancestral(variance=variance), grid=times,
                         noise=noises).x0  # fmt: skip
        for i, t in enumerate(scheduler.timesteps):
            eps = network(x, t.double().expand(2), c)
            x = scheduler.step(eps, t, x, generator=torch.Generator().manual_seed(i)).prev_sample
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver_order", [1, 2])
def test_sde_dpm_solver_pp_is_diffusers(solver_order: int) -> None:
    """Its update rules in float64 (its ``step`` goes through float32), the last one to sigma = 0 of first order."""
    table = scaled_linear_table()
    scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=solver_order)
    process = VP.discrete(table)
    network = MixtureNetwork(process)
    times = [999.0, 900.0, 700.0, 650.0, 300.0, 20.0, process.t_clean]
    rho = process.rho(times)
    scheduler.sigmas = rho
    x, c = start_state(process, 999.0), condition()
    noises = torch.randn(6, *x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solver = bd.SDEDPMSolverPP(solver_order)
    with torch.no_grad():
        ours = bd.sample(bd.Denoiser(network, process), x, c, solver=solver, grid=times, noise=noises).x0
        samples: list[Tensor] = []
        for i, t in enumerate(times[:-1]):
            scheduler._step_index = i
            eps = network(x, torch.full((2,), t, dtype=torch.float64), c)
            samples.append((x - process.sigma(t) * eps) / process.alpha(t))
            if solver_order == 1 or i in (0, 5):
                x = scheduler.dpm_solver_first_order_update(samples[-1], sample=x, noise=noises[i])
            else:
                x = scheduler.multistep_dpm_solver_second_order_update(
                    samples[-2:], sample=x, noise=noises[i]
                )
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_levels_meet_the_known_solvers(schedule: str) -> None:
    """eta = 0 is DDIM or DPM-Solver++(2M); ancestral steps at eta = 1 are SDE-DPM-Solver++ of first order."""
    process, prediction = SCHEDULES[schedule], PREDICTIONS[schedule]
    model = bd.Denoiser(MixtureNetwork(process, prediction), process, prediction)
    grid = smooth_grid(schedule, 6)
    x, c = start_state(process, float(grid.nodes(process)[0])), condition()

    def run(solver: bd.solvers.Solver, **kwargs: Any) -> Tensor:
        return bd.sample(model, x, c, solver=solver, grid=grid, **kwargs).x0.detach()

    ddim = run(bd.Euler(), form="exponential")
    for solver in (bd.Ancestral(0.0), bd.ExponentialEuler(0.0), bd.SDEDPMSolverPP(1, eta=0.0)):
        torch.testing.assert_close(run(solver), ddim, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        run(bd.EulerMaruyama(0.0)), run(bd.Euler(), form="original"), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(run(bd.SDEDPMSolverPP(eta=0.0)), run(bd.DPMSolverPP()), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        run(bd.SDEDPMSolverPP(1), seed=4), run(bd.Ancestral(), seed=4), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("name", ["ancestral", "sde-dpm++ 2m", "exponential euler", "euler-maruyama"])
def test_runs_from_no_signal_to_no_noise(name: str) -> None:
    """From alpha = 0 to sigma = 0 of the flow, on standard normal data about a mean: q there is W alone, so the sample
    is known along the path, whatever x_T is."""
    network = GaussianNetwork(Flow(), "flow_prediction").requires_grad_(False)
    network.log_variance.zero_()
    rows = 200
    x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    whole = bd.Brownian(9).path(Flow(), [1.0, 0.0], x)(x, 1.0, 1.0, 0.0)
    model = bd.Denoiser(network, Flow(), "flow_prediction")
    errors = []
    for steps in (16, 32, 64):
        times = torch.cos(torch.linspace(0, math.pi / 2, steps + 1, dtype=torch.float64)) ** 2
        times[-1] = 0
        found = bd.sample(model, x, torch.zeros(3), solver=SOLVERS[name], grid=times, seed=9).x0
        errors.append(float((found - network.mean - whole).square().mean().sqrt()))
    assert regression(errors) > 0.8, errors


class Tilted(nn.Module):
    """A small float64 network whose every call uses x, cond and a weight, and draws from the global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.3, -0.2], [0.1, 0.4]], dtype=torch.float64))
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return torch.tanh(self.drop(x) @ self.weight + cond) + t[:, None] * x


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("memory", ["min", "max"])
def test_exact_gradients_are_plain_autograds_bits(name: str, memory: str) -> None:
    """x_T, cond, weights and the noises themselves; with a seed and with noises handed in; in train mode."""
    results = []
    for gradient in (bd.Plain(), bd.Exact(memory=memory)):
        network = Tilted()
        model = bd.Denoiser(network, VP.linear())
        x = torch.tensor([[0.5, -1.0], [0.2, 0.7]], dtype=torch.float64, requires_grad=True)
        c = torch.tensor([0.1, -0.3], dtype=torch.float64, requires_grad=True)
        given = torch.ones(5, 2, 2, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(0)
        for noise in ({"seed": 3}, {"noise": list(given)}):
            grid = bd.TimeGrid("logsnr", steps=5, start=0.9, end=0.05)
            x0 = bd.sample(model, x, c, solver=SOLVERS[name], grid=grid, gradient=gradient, **noise).x0
            x0.square().sum().backward()
        results.append([x.grad, c.grad, network.weight.grad, given.grad])
    for plain, exact in zip(*results, strict=True):
        assert float(plain.abs().min()) > 0
        assert torch.equal(plain, exact)


def test_gradients_reach_noises_alone() -> None:
    """x_T and the weights frozen: the chain begins at the first noise."""
    model = toy_denoiser()
    model.network.requires_grad_(False)
    x, cond = toy_inputs()
    grads = []
    for gradient in (bd.Plain(), bd.Exact(memory="min")):
        noises = [torch.full_like(x, 0.5).requires_grad_() for _ in range(4)]
        x0 = bd.sample(model, x, cond, solver=bd.Ancestral(), grid=[0.9, 0.6, 0.4, 0.2, 0.1], noise=noises,
                       gradient=gradient).x0  # fmt: skip
        grads.append(torch.autograd.grad(x0.square().sum(), noises))
    for plain, exact in zip(*grads, strict=True):
        assert torch.equal(plain, exact)
        assert float(plain.abs().min()) > 0


def test_a_seed_gives_the_same_run_again() -> None:
    model = toy_denoiser()
    x, cond = toy_inputs()

    def run(**kwargs: Any) -> Tensor:
        return bd.sample(model, x, cond, solver=bd.SDEDPMSolverPP(), **kwargs).x0.detach()

    first = run(seed=1)
    torch.randn(3)
    assert torch.equal(first, run(seed=1))
    assert torch.equal(first, run(noise=bd.Brownian(1)))
    assert not torch.equal(first, run(seed=2))
    single = bd.sample(model, x.float(), cond, solver=bd.SDEDPMSolverPP(), seed=1).x0.detach()
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), first, rtol=0, atol=1e-4)


def test_impossible_noise_is_refused() -> None:
    model = toy_denoiser()
    x, cond = toy_inputs()
    with pytest.raises(InputError, match=r"adds noise: give sample\(seed=0\)"):
        bd.sample(model, x, cond, solver=bd.Ancestral())
    with pytest.raises(InputError, match="adds no noise"):
        bd.sample(model, x, cond, solver=bd.Heun(), seed=0)
    with pytest.raises(InputError, match="adds no noise"):
        bd.sample(model, x, cond, solver=bd.Ancestral(0.0), seed=0)
    with pytest.raises(InputError, match="one of noise and seed"):
        bd.sample(model, x, cond, solver=bd.Ancestral(), seed=0, noise=bd.Brownian(0))
    with pytest.raises(InputError, match="form='data'"):
        bd.sample(model, x, cond, solver=bd.Ancestral(), form="original", seed=0)
    with pytest.raises(InputError, match="from 0 to 1"):
        bd.Ancestral(1.2)
    with pytest.raises(InputError, match="'large' with eta=1"):
        bd.Ancestral(0.5, "large")
    with pytest.raises(InputError, match="'large' with eta=1"):
        bd.Ancestral(1.0, "huge")
    with pytest.raises(InputError, match="noise level"):
        bd.EulerMaruyama(-0.1)
    with pytest.raises(InputError, match="solver_order 1 and 2"):
        bd.SDEDPMSolverPP(3)


def test_every_exported_stochastic_solver_is_measured() -> None:
    exported = {
        v for v in vars(bd.solvers).values() if isinstance(v, type) and issubclass(v, StochasticSolver)
    }
    assert exported - {StochasticSolver} == {type(solver) for solver in SOLVERS.values()}
    for solver, index in itertools.product(SOLVERS.values(), range(3)):
        assert solver.evaluations(index) == 1
