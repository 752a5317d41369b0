"""DPM-Solver, DPM-Solver++ and DEIS against their authors' recursions, closed forms, and diffusers' schedulers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DEISMultistepScheduler, DPMSolverSinglestepScheduler
from torch import Tensor

from backdrift.denoiser import Denoiser
from backdrift.errors import InputError
from backdrift.forms import Form
from backdrift.grids import TimeGrid
from backdrift.sampling import sample
from backdrift.schedules import EDM, VP, Flow, Schedule
from backdrift.solvers import DEIS, AdamsBashforth, DPMSolver, DPMSolverPP, Solver
from backdrift.solvers.adams import adams_weights
from backdrift.solvers.singlestep import _mean
from problems import SCHEDULES, GaussianNetwork, MixtureNetwork, condition, scaled_linear_table, start_state

LINEAR = SCHEDULES["linear"]
GRID = TimeGrid("logsnr", steps=6, start=1.0, end=0.01)


def ours(solver: Solver, form: str, grid: TimeGrid = GRID, schedule: Schedule = LINEAR) -> Tensor:
    x = start_state(schedule, float(grid.nodes(schedule)[0]))
    with torch.no_grad():
        return sample(
            Denoiser(MixtureNetwork(schedule), schedule), x, condition(), solver=solver, grid=grid, form=form
        ).x0


def recursion(step: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """The run of ``step(x, t, s)`` over the grid's nodes."""
    x, times = start_state(LINEAR, 1.0), GRID.nodes(LINEAR)
    with torch.no_grad():
        for t, s in itertools.pairwise(times):
            x = step(x, t, s)
    return x


class Reader:
    """eps, x0 and the schedule's letters, as the papers write them."""

    def __init__(self) -> None:
        self.network = MixtureNetwork(LINEAR)
        self.alpha, self.sigma, self.lam, self.at = (
            LINEAR.alpha,
            LINEAR.sigma,
            LINEAR.lam,
            LINEAR.t_from_lam,
        )

    def eps(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x, t.expand(2), condition())

    def x0(self, x: Tensor, t: Tensor) -> Tensor:
        return (x - self.sigma(t) * self.eps(x, t)) / self.alpha(t)


def test_dpm_solver_2_is_algorithm_1_of_its_paper() -> None:
    r = Reader()

    def step(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        h = r.lam(s) - r.lam(t)
        m = r.at((r.lam(s) + r.lam(t)) / 2)
        u = r.alpha(m) / r.alpha(t) * x - r.sigma(m) * torch.expm1(h / 2) * r.eps(x, t)
        return r.alpha(s) / r.alpha(t) * x - r.sigma(s) * torch.expm1(h) * r.eps(u, m)

    torch.testing.assert_close(ours(DPMSolver(2), "exponential"), recursion(step), rtol=0, atol=1e-11)


def test_dpm_solver_3_is_algorithm_2_of_its_paper() -> None:
    r = Reader()
    r1, r2 = 1 / 3, 2 / 3

    def step(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        h = r.lam(s) - r.lam(t)
        s1, s2 = r.at(r.lam(t) + r1 * h), r.at(r.lam(t) + r2 * h)
        eps = r.eps(x, t)
        u1 = r.alpha(s1) / r.alpha(t) * x - r.sigma(s1) * torch.expm1(r1 * h) * eps
        d1 = r.eps(u1, s1) - eps
        u2 = r.alpha(s2) / r.alpha(t) * x - r.sigma(s2) * torch.expm1(r2 * h) * eps
        u2 = u2 - r.sigma(s2) * r2 / r1 * (torch.expm1(r2 * h) / (r2 * h) - 1) * d1
        d2 = r.eps(u2, s2) - eps
        x = r.alpha(s) / r.alpha(t) * x - r.sigma(s) * torch.expm1(h) * eps
        return x - r.sigma(s) / r2 * (torch.expm1(h) / h - 1) * d2

    torch.testing.assert_close(ours(DPMSolver(3), "exponential"), recursion(step), rtol=0, atol=1e-11)


def test_on_the_data_form_it_is_dpm_solver_pp_2s() -> None:
    """Lu et al. 2022 (DPM-Solver++), Algorithm 1."""
    r = Reader()

    def step(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        h = r.lam(s) - r.lam(t)
        m = r.at((r.lam(s) + r.lam(t)) / 2)
        u = r.sigma(m) / r.sigma(t) * x - r.alpha(m) * torch.expm1(-h / 2) * r.x0(x, t)
        return r.sigma(s) / r.sigma(t) * x - r.alpha(s) * torch.expm1(-h) * r.x0(u, m)

    torch.testing.assert_close(ours(DPMSolver(2), "data"), recursion(step), rtol=0, atol=1e-11)


def test_dpm_solver_pp_2m_is_its_authors_recursion() -> None:
    """The same paper's Algorithm 2."""
    r = Reader()
    past: list[tuple[Tensor, Tensor]] = []

    def step(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        d = x0 = r.x0(x, t)
        h = r.lam(s) - r.lam(t)
        if past:
            ratio = past[-1][1] / h
            d = (1 + 1 / (2 * ratio)) * x0 - 1 / (2 * ratio) * past[-1][0]
        past.append((x0, h))
        return r.sigma(s) / r.sigma(t) * x - r.alpha(s) * torch.expm1(-h) * d

    torch.testing.assert_close(ours(DPMSolverPP(), "data"), recursion(step), rtol=0, atol=1e-12)


def test_the_mean_of_short_steps_is_that_of_long_ones() -> None:
    """m(z) = ∫ τ e^{zτ} dτ / ∫ e^{zτ} dτ by quadrature, on both sides of where the formula changes."""
    tau = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for z in (-6.0, -0.3, -0.0101, -0.0099, 1e-5, 0.0099, 0.0101, 0.3, 6.0):
        weight = (z * tau).exp()
        assert _mean(z) == pytest.approx(float((tau * weight).sum() / weight.sum()), rel=1e-9)


# --- diffusers -------------------------------------------------------------------------------------------------------


class Theirs:
    """A scheduler of diffusers on nodes of our own, in float64: its step, with its float32 table of sigmas replaced.

    Its network is asked at the node's exact time.
    """

    def __init__(self, kind: Any, nodes: Tensor, **config: Any) -> None:
        table = scaled_linear_table()
        self.scheduler = kind(
            trained_betas=(1 - table / torch.cat([torch.ones(1, dtype=torch.float64), table[:-1]])).numpy(),
            **config,
        )
        self.schedule, self.nodes = VP.discrete(table, "spline"), nodes
        self.scheduler.set_timesteps(len(nodes))
        self.scheduler.sigmas = torch.cat([self.schedule.rho(nodes), torch.zeros(1, dtype=torch.float64)])
        self.network = MixtureNetwork(self.schedule)

    def eps(self, x: Tensor, index: int) -> Tensor:
        return self.network(x, self.nodes[index].expand(2), condition())

    def run(self, x: Tensor, steps: int) -> Tensor:
        """The state after that many of its steps (calls of the network)."""
        with torch.no_grad():
            for i in range(steps):
                x = self.scheduler.step(self.eps(x, i), self.scheduler.timesteps[i], x).prev_sample
        return x


def spread(steps: int) -> Tensor:
    """Nodes of the trained table, evenly spaced in lam."""
    grid = TimeGrid("logsnr", steps=steps, start=990.0, end=10.0)
    return grid.nodes(VP.discrete(scaled_linear_table(), "spline"))


@pytest.mark.parametrize(("algorithm", "form"), [("dpmsolver", "exponential"), ("dpmsolver++", "data")])
def test_dpm_solver_2_is_diffusers_whole_run(algorithm: str, form: str) -> None:
    """Its "step" is one call of the network: two of them, over nodes evenly spaced in lam, are one of ours."""
    fine = spread(12)
    theirs = Theirs(
        DPMSolverSinglestepScheduler,
        fine,
        solver_order=2,
        algorithm_type=algorithm,
        lower_order_final=False,
        final_sigmas_type="sigma_min",
        solver_type="midpoint",
    )
    found = ours(DPMSolver(2), form, TimeGrid(fine[::2]), theirs.schedule)
    torch.testing.assert_close(theirs.run(start_state(theirs.schedule, 990.0), 12), found, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("algorithm", "form"), [("dpmsolver", "exponential"), ("dpmsolver++", "data")])
def test_dpm_solver_3_is_diffusers_step(algorithm: str, form: str) -> None:
    """Its third-order step is the paper's; its inner stage is too, where solver_type="heun" has it extrapolate so."""
    fine = spread(6)
    theirs = Theirs(
        DPMSolverSinglestepScheduler,
        fine,
        solver_order=3,
        algorithm_type=algorithm,
        lower_order_final=False,
        final_sigmas_type="sigma_min",
    )
    kinds, x = itertools.cycle(["heun", "heun", "midpoint"]), start_state(theirs.schedule, 990.0)
    found = ours(DPMSolver(3), form, TimeGrid(fine[::3]), theirs.schedule)
    with torch.no_grad():
        for i, kind in zip(range(6), kinds, strict=False):
            theirs.scheduler.register_to_config(solver_type=kind)
            x = theirs.scheduler.step(theirs.eps(x, i), theirs.scheduler.timesteps[i], x).prev_sample
    torch.testing.assert_close(x, found, rtol=0, atol=1e-11)


@pytest.mark.parametrize("order", [2, 3])
def test_deis_in_lam_with_a_rising_start_is_diffusers_whole_run(order: int) -> None:
    nodes = spread(7)
    theirs = Theirs(DEISMultistepScheduler, nodes, solver_order=order, lower_order_final=False)
    x = start_state(theirs.schedule, 990.0)
    found = ours(DEIS(order, "lam", start="rising"), "exponential", TimeGrid(nodes), theirs.schedule)
    torch.testing.assert_close(theirs.run(x, 7), found, rtol=0, atol=1e-11)
    other = ours(DEIS(order, "lam"), "exponential", TimeGrid(nodes), theirs.schedule)
    assert float((other - found).norm()) > 1e-3


@pytest.mark.parametrize("order", [2, 3])
def test_deis_in_lam_is_diffusers_step(order: int) -> None:
    """Its multistep update is ours from the same history; its start, of lower order, is not."""
    nodes = spread(5)
    theirs = Theirs(DEISMultistepScheduler, nodes, solver_order=order)
    schedule, scheduler = theirs.schedule, theirs.scheduler
    outputs = [torch.randn(2, 3, dtype=torch.float64) for _ in range(order)]
    x, at = start_state(schedule, 990.0), 3
    scheduler._step_index = at
    update = {2: scheduler.multistep_deis_second_order_update, 3: scheduler.multistep_deis_third_order_update}
    expected = update[order](outputs, sample=x)
    form = Form("exponential", schedule, "epsilon")
    points = [form.node(float(t)) for t in nodes]
    weights = DEIS(order, "lam").weights(form, points[at - order + 1 : at + 1], points[at + 1])
    y = x / schedule.alpha(nodes[at]) + sum(w * k for w, k in zip(weights, outputs, strict=True))
    torch.testing.assert_close(y * schedule.alpha(nodes[at + 1]), expected, rtol=1e-12, atol=1e-12)


# --- DEIS ------------------------------------------------------------------------------------------------------------


def weights_of(schedule: Schedule, times: list[float], order: int, clock: Any = "t") -> list[float]:
    form = Form("exponential", schedule, "epsilon")
    *nodes, end = (form.node(t) for t in times)
    return DEIS(order, clock).weights(form, nodes, end)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_deis_is_adams_bashforth_where_time_is_rho(order: int) -> None:
    """Zhang & Chen: on EDM's schedule tAB and ρAB are one method."""
    times = [9.0, 5.0, 2.5, 0.4, 0.05][5 - order - 1 :]
    expected = adams_weights(times[:-1], times[-2], times[-1])
    assert weights_of(EDM(), times, order) == pytest.approx(expected, rel=1e-12)
    grid = TimeGrid("karras", steps=9, start=10.0, end=0.1)
    one, other = (ours(s, "exponential", grid, EDM()) for s in (DEIS(order), AdamsBashforth(order)))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    # Elsewhere they are not.
    one, other = (ours(s, "exponential") for s in (DEIS(order), AdamsBashforth(order)))
    assert float((one - other).norm()) > 1e-3


def test_deis_weights_are_the_integrals_in_closed_form() -> None:
    """Flow: t = rho/(1 + rho), ∫ t drho = rho - log(1 + rho). VP linear: ∫ t drho = t rho - ∫ rho dt, numerically."""
    a, b, c = 0.8, 0.55, 0.1
    rho = [t / (1 - t) for t in (a, b, c)]
    integral = (rho[2] - math.log1p(rho[2])) - (rho[1] - math.log1p(rho[1]))
    h = rho[2] - rho[1]
    expected = [(integral - b * h) / (a - b), (integral - a * h) / (b - a)]
    assert weights_of(Flow(), [a, b, c], 2) == pytest.approx(expected, rel=1e-13)

    # From t = v², so that rho(t), which starts like sqrt(t), is smooth for the midpoint rule.
    v = torch.linspace(math.sqrt(0.002), math.sqrt(0.9), 400_001, dtype=torch.float64)
    middle = (v[1:] + v[:-1]) / 2
    under = float((LINEAR.rho(middle**2) * 2 * middle * v.diff()).sum())
    ends = {t: float(LINEAR.rho(t)) for t in (0.9, 0.002)}
    integral = 0.002 * ends[0.002] - 0.9 * ends[0.9] + under
    h = ends[0.002] - ends[0.9]
    expected = [(integral - 0.9 * h) / (1.0 - 0.9), (integral - 1.0 * h) / (0.9 - 1.0)]
    assert weights_of(LINEAR, [1.0, 0.9, 0.002], 2) == pytest.approx(expected, rel=1e-9)


def test_deis_weights_add_up_to_the_step() -> None:
    for schedule, times in ((LINEAR, [1.0, 0.7, 0.3, 0.1, 1e-3]), (VP.cosine(), [0.99, 0.7, 0.4, 0.2, 0.01])):
        step = float(schedule.rho(times[-1]) - schedule.rho(times[-2]))
        for order, clock in itertools.product((1, 2, 3, 4), ("t", "lam")):
            assert sum(weights_of(schedule, times[-order - 1 :], order, clock)) == pytest.approx(
                step, rel=1e-12
            )


# --- ends ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [DPMSolver(2), DPMSolver(3), DEIS(3), DEIS(2, "lam")], ids=repr)
def test_a_step_to_the_clean_end_is_one_of_ddim(solver: Solver) -> None:
    """lam is infinite at sigma = 0: the last step is x0 as predicted at the node before, at one evaluation."""
    schedule = VP.discrete(scaled_linear_table())
    times = spread(4).tolist()
    network = MixtureNetwork(schedule)
    model, x = Denoiser(network, schedule), start_state(schedule, times[0])
    with torch.no_grad():
        before = sample(model, x, condition(), solver=solver, grid=times)
        after = sample(model, x, condition(), solver=solver, grid=[*times, -1.0])
        expected = model.denoised(before.x0, times[-1], condition())
    torch.testing.assert_close(after.x0, expected, rtol=0, atol=1e-13)
    assert after.nfe == before.nfe + 1


def test_a_start_without_signal_is_one_step_of_ddim_too() -> None:
    """omega = 0 is an ordinary point of the data form, but infinitely far in lam."""
    schedule = VP.cosine()
    model = Denoiser(GaussianNetwork(schedule, "sample"), schedule, "sample")
    x, grid = start_state(schedule, 1.0), [1.0, 0.8, 0.5]
    form = Form("data", schedule, "sample")
    assert not DPMSolver(2).spans(form.node(1.0), form.node(0.8))
    with pytest.raises(InputError, match="infinite at t = 1"):
        DPMSolver(2).tableau_at(form.node(1.0), form.node(0.8))
    with torch.no_grad():
        first = float(schedule.sigma(0.8)) * x + float(schedule.alpha(0.8)) * model.denoised(
            x, 1.0, condition()
        )
        expected = sample(model, first, condition(), solver=DPMSolver(2), grid=grid[1:], form="data").x0
        found = sample(model, x, condition(), solver=DPMSolver(2), grid=grid, form="data").x0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
