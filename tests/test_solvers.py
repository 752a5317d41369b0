"""Every solver's declared order is its measured one, for states and for gradients, on data with a known flow."""

from __future__ import annotations

import inspect
import itertools
import math
from functools import cache

import pytest
import torch
from torch import Tensor

import backdrift.solvers as package
from backdrift.denoiser import Denoiser
from backdrift.errors import InputError
from backdrift.forms import FORMS
from backdrift.gradients import Plain
from backdrift.grids import TimeGrid
from backdrift.sampling import sample
from backdrift.schedules import VP, Flow
from backdrift.solvers import (
    EDICT,
    RK4,
    AdamsBashforth,
    DPMSolverPP,
    Euler,
    ExplicitRungeKutta,
    Heun,
    Solver,
    StochasticSolver,
    Tableau,
)
from backdrift.solvers.adams import adams_weights
from problems import SCHEDULES, GaussianNetwork, MixtureNetwork, condition, smooth_grid, start_state

SOLVERS: dict[str, Solver] = {
    "euler": Euler(),
    "heun": Heun(),
    "rk4": RK4(),
    "ab1": AdamsBashforth(1),
    "ab2": AdamsBashforth(2),
    "ab3": AdamsBashforth(3),
    "ab4": AdamsBashforth(4),
    "dpmpp": DPMSolverPP(),
    "edict": EDICT(),
}
# Where each is well inside its asymptotic range and far above rounding.
STEPS = {"euler": 40, "ab1": 40, "heun": 40, "dpmpp": 40, "rk4": 30, "ab2": 80, "ab3": 100, "ab4": 160}
STEPS |= {"edict": 80}


def newcomers() -> dict[str, Solver]:
    """Solvers that the package exports and the list above does not have: measured without being listed."""
    known = {type(solver) for solver in SOLVERS.values()} | {Solver, ExplicitRungeKutta}
    # Stochastic ones are measured along their noise, in test_stochastic.py.
    known |= {kind for kind in vars(package).values() if isinstance(kind, type) and issubclass(kind, StochasticSolver)}
    exported = {name: getattr(package, name) for name in package.__all__}
    found = {
        n: v
        for n, v in exported.items()
        if isinstance(v, type) and issubclass(v, Solver) and v not in known and not inspect.isabstract(v)
    }
    return {name: kind() for name, kind in found.items()}


for _name, _solver in newcomers().items():
    SOLVERS[_name] = _solver
    STEPS[_name] = {1: 40, 2: 80, 3: 100}.get(_solver.order, 160)

PREDICTIONS = {
    "linear": "epsilon",
    "cosine": "v_prediction",
    "discrete": "epsilon",
    "edm": "sample",
    "flow": "flow_prediction",
}
CASES = [
    (schedule, form, solver)
    for schedule in SCHEDULES
    for form in FORMS
    for solver in SOLVERS
    if form in SOLVERS[solver].forms
    and not (schedule == "edm" and form == "original")  # alpha = 1: the exponential form under another name
    and not (solver == "ab1" and schedule != "linear")  # Euler under another name
]
WEIGHTS = torch.tensor([0.7, -1.1, 0.4], dtype=torch.float64)


def run(schedule: str, form: str, solver: Solver, steps: int, network: torch.nn.Module) -> list[Tensor]:
    """The final state and the gradients of a loss on it by x_T, cond and the first weight."""
    grid = smooth_grid(schedule, steps)
    model = Denoiser(network, SCHEDULES[schedule], PREDICTIONS[schedule])
    start = float(grid.nodes(SCHEDULES[schedule])[0])
    x, c = start_state(SCHEDULES[schedule], start).requires_grad_(), condition().requires_grad_()
    solution = sample(model, x, c, solver=solver, grid=grid, form=form, gradient=Plain())
    weight = next(network.parameters())
    return [solution.x0.detach(), *torch.autograd.grad(loss(solution.x0), [x, c, weight])]


def loss(x0: Tensor) -> Tensor:
    return (WEIGHTS * x0 + 0.3 * x0**2).sum()


@cache
def known(schedule: str) -> list[Tensor]:
    network = GaussianNetwork(SCHEDULES[schedule], PREDICTIONS[schedule])
    nodes = smooth_grid(schedule, 2).nodes(SCHEDULES[schedule]).tolist()
    x, c = start_state(SCHEDULES[schedule], nodes[0]).requires_grad_(), condition().requires_grad_()
    x0 = network.solution(x, c, nodes[0], nodes[-1])
    return [x0.detach(), *torch.autograd.grad(loss(x0), [x, c, network.mean])]


def slopes(coarse: list[Tensor], fine: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [
        math.log2(float((a - t).norm()) / float((b - t).norm()))
        for a, b, t in zip(coarse, fine, truth, strict=True)
    ]


@pytest.mark.parametrize(("schedule", "form", "name"), CASES)
def test_declared_order_is_measured_on_gaussian_data(schedule: str, form: str, name: str) -> None:
    solver, steps = SOLVERS[name], STEPS[name]
    network = GaussianNetwork(SCHEDULES[schedule], PREDICTIONS[schedule])
    coarse, fine = (run(schedule, form, solver, n, network) for n in (steps, 2 * steps))
    for what, slope in zip(
        ("state", "x_T", "cond", "weights"), slopes(coarse, fine, known(schedule)), strict=True
    ):
        assert abs(slope - solver.order) <= 0.25, (what, slope)


@cache
def mixture_truth() -> list[Tensor]:
    """The mixture's flow has no closed form: RK4 on another form with 400 steps is right to 1e-10."""
    return run("linear", "original", RK4(), 400, MixtureNetwork(SCHEDULES["linear"]))


@pytest.mark.parametrize(
    ("form", "name", "steps"),
    [
        ("exponential", "euler", 160),
        ("exponential", "heun", 80),
        ("exponential", "rk4", 60),
        ("exponential", "ab2", 160),
        ("exponential", "ab4", 240),
        ("data", "dpmpp", 160),
        ("data", "rk4", 60),
    ],
)
def test_declared_order_is_measured_on_a_mixture(form: str, name: str, steps: int) -> None:
    network = MixtureNetwork(SCHEDULES["linear"])
    coarse, fine = (run("linear", form, SOLVERS[name], n, network) for n in (steps, 2 * steps))
    for slope in slopes(coarse, fine, mixture_truth()):
        assert abs(slope - SOLVERS[name].order) <= 0.3


@pytest.mark.parametrize("form", ["exponential", "data"])
def test_euler_is_ddim(form: str) -> None:
    schedule = SCHEDULES["linear"]
    network = MixtureNetwork(schedule)
    grid = TimeGrid("uniform", steps=7, start=1.0, end=0.01)
    x, c = start_state(schedule, 1.0), condition()
    with torch.no_grad():
        found = sample(Denoiser(network, schedule), x, c, solver=Euler(), grid=grid, form=form).x0
        times = grid.nodes(schedule)
        for t, s in itertools.pairwise(times):
            eps = network(x, t.expand(2), c)
            x0 = (x - schedule.sigma(t) * eps) / schedule.alpha(t)
            x = schedule.alpha(s) * x0 + schedule.sigma(s) * eps
    torch.testing.assert_close(found, x, rtol=0, atol=1e-12)


def test_dpm_solver_pp_2m_is_its_authors_recursion() -> None:
    schedule = SCHEDULES["linear"]
    network = MixtureNetwork(schedule)
    grid = TimeGrid("logsnr", steps=6, start=1.0, end=0.01)
    x, c = start_state(schedule, 1.0), condition()
    with torch.no_grad():
        found = sample(Denoiser(network, schedule), x, c, solver=DPMSolverPP(), grid=grid).x0
        times, past, h_past = grid.nodes(schedule), None, 0.0
        for t, s in itertools.pairwise(times):
            x0 = (x - schedule.sigma(t) * network(x, t.expand(2), c)) / schedule.alpha(t)
            h = float(schedule.lam(s) - schedule.lam(t))
            r = h_past / h
            d = x0 if past is None else (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * past
            x = schedule.sigma(s) / schedule.sigma(t) * x - schedule.alpha(s) * math.expm1(-h) * d
            past, h_past = x0, h
    torch.testing.assert_close(found, x, rtol=0, atol=1e-12)


def test_flow_runs_from_end_to_end_on_its_own_form() -> None:
    """Both singular ends of rectified flow, t = 1 and t = 0, are ordinary points of dx/dt = u."""
    network = GaussianNetwork(Flow(), "flow_prediction")
    x, c = start_state(Flow(), 1.0), condition()
    errors = []
    with torch.no_grad():
        truth = network.solution(x, c, 1.0, 0.0)
        for steps in (20, 40):
            grid = TimeGrid("uniform", steps=steps)
            model = Denoiser(network, Flow(), "flow_prediction")
            errors.append(float((sample(model, x, c, solver=RK4(), grid=grid).x0 - truth).norm()))
    assert abs(math.log2(errors[0] / errors[1]) - 4) < 0.3


@pytest.mark.parametrize("form", ["exponential", "data"])
def test_singular_ends_are_stepped_over_and_converge(form: str) -> None:
    """From alpha = 0 to sigma = 0 on the forms that are infinite there: one step each on a regular form."""
    network = GaussianNetwork(Flow(), "flow_prediction")
    x, c = start_state(Flow(), 1.0), condition()
    model = Denoiser(network, Flow(), "flow_prediction")
    with torch.no_grad():
        truth = network.solution(x, c, 1.0, 0.0)
        errors = [
            float(
                (sample(model, x, c, solver=Heun(), grid=TimeGrid("uniform", n), form=form).x0 - truth).norm()
            )
            for n in (20, 40, 80)
        ]
    assert errors[2] < 2e-3
    assert errors[0] / errors[1] > 2.5
    assert errors[1] / errors[2] > 2.5


def test_data_form_starts_at_zero_signal_with_full_order() -> None:
    """alpha(1) = 0 on the cosine schedule is omega = 0, an ordinary point of the data form."""
    schedule = VP.cosine()
    network = GaussianNetwork(schedule, "v_prediction")
    x, c = start_state(schedule, 1.0), condition()
    model = Denoiser(network, schedule, "v_prediction")
    omegas = [torch.linspace(0, 8, n + 1, dtype=torch.float64)[1:] for n in (40, 80)]
    errors = []
    with torch.no_grad():
        for omega in omegas:
            times = [1.0, *schedule.t_from_lam(omega.log()).tolist()]
            found = sample(model, x, c, solver=RK4(), grid=times, form="data").x0
            errors.append(float((found - network.solution(x, c, 1.0, times[-1])).norm()))
    assert abs(math.log2(errors[0] / errors[1]) - 4) < 0.3


@pytest.mark.parametrize("form", FORMS)
def test_blind_predictions_are_refused_by_time(form: str) -> None:
    """At alpha = 0 an eps-prediction does not determine x0, in no form; the message names t."""
    for schedule in (VP.cosine(), Flow()):
        network = GaussianNetwork(schedule, "epsilon")
        with pytest.raises(InputError, match="t = 1"):
            sample(
                Denoiser(network, schedule),
                start_state(schedule, 1.0),
                condition(),
                grid=TimeGrid("uniform", 4, start=1.0, end=0.1),
                form=form,
            )


def test_adams_weights_integrate_cubics_exactly() -> None:
    nodes, start, stop = [0.0, 0.3, 0.4, 1.1], 1.1, 1.7
    weights = adams_weights(nodes, start, stop)
    for power in range(4):
        integral = (stop ** (power + 1) - start ** (power + 1)) / (power + 1)
        assert sum(w * s**power for w, s in zip(weights, nodes, strict=True)) == pytest.approx(
            integral, rel=1e-13
        )
    equal = adams_weights([-3.0, -2.0, -1.0, 0.0], 0.0, 1.0)
    assert equal == pytest.approx([-9 / 24, 37 / 24, -59 / 24, 55 / 24], rel=1e-13)


@pytest.mark.parametrize("name", SOLVERS)
def test_evaluations_are_known_beforehand(name: str) -> None:
    counted = {"euler": 5, "heun": 10, "rk4": 20, "ab1": 5, "ab2": 6, "ab3": 11, "ab4": 14, "dpmpp": 5}
    counted |= {"edict": 10, "ReversibleHeun": 6, "McCallumFoster": 20}
    network = GaussianNetwork(SCHEDULES["linear"], "epsilon")
    model = Denoiser(network, SCHEDULES["linear"])
    solution = sample(model, start_state(SCHEDULES["linear"], 1.0), condition(), solver=SOLVERS[name],
                      grid=smooth_grid("linear", 5))  # fmt: skip
    assert solution.nfe == counted.get(name, solution.nfe) == model.nfe
    assert sum(SOLVERS[name].evaluations(i) for i in range(5)) == solution.nfe


def test_a_tableau_is_all_a_new_runge_kutta_method_needs() -> None:
    ralston = ExplicitRungeKutta(Tableau(((), (2 / 3,)), (0.25, 0.75), (0.0, 2 / 3)), order=2)
    network = GaussianNetwork(SCHEDULES["linear"], "epsilon")
    coarse, fine = (run("linear", "exponential", ralston, n, network) for n in (40, 80))
    assert slopes(coarse, fine, known("linear")) == pytest.approx([2.0] * 4, abs=0.25)
    with pytest.raises(InputError, match="sum to 1"):
        Tableau(((), (0.5,)), (0.5, 1.0), (0.0, 0.5))
    with pytest.raises(InputError, match="sum of its row"):
        Tableau(((), (0.5,)), (0.0, 1.0), (0.0, 0.4))
    with pytest.raises(InputError, match="below its diagonal"):
        Tableau(((), ()), (0.0, 1.0), (0.0, 0.5))


def test_solvers_refuse_what_they_are_not_made_for() -> None:
    with pytest.raises(InputError, match="orders 1, 2, 3 and 4"):
        AdamsBashforth(5)
    network = GaussianNetwork(SCHEDULES["linear"], "epsilon")
    with pytest.raises(InputError, match="form='data'"):
        sample(Denoiser(network, SCHEDULES["linear"]), start_state(SCHEDULES["linear"], 1.0), condition(),
               solver=DPMSolverPP(), form="exponential")  # fmt: skip
