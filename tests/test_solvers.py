"""Single solvers against what they are: DDIM, closed forms over singular ends, weights, counts and refusals.

Their orders are measured in test_solver_orders.py.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from backdrift.denoiser import Denoiser
from backdrift.errors import InputError
from backdrift.forms import FORMS
from backdrift.grids import TimeGrid
from backdrift.sampling import sample
from backdrift.schedules import VP, Flow
from backdrift.solvers import (
    DEIS,
    RK4,
    AdamsBashforth,
    DPMSolver,
    DPMSolverPP,
    Euler,
    ExplicitRungeKutta,
    Heun,
    Solver,
    Tableau,
)
from backdrift.solvers.adams import adams_weights
from problems import SCHEDULES, GaussianNetwork, MixtureNetwork, condition, smooth_grid, start_state
from side_by_side import known, run, slopes
from solver_table import ROWS, Row


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


# Of a run of five steps.
EVALUATIONS = {
    "Euler()": 5,
    "Midpoint()": 10,
    "Heun()": 10,
    "Ralston()": 10,
    "BogackiShampine()": 15,
    "RK4()": 20,
    "ThreeEighths()": 20,
    "DormandPrince()": 30,
    "AdamsBashforth(2)": 6,
    "AdamsBashforth(3)": 11,
    "AdamsBashforth(4)": 14,
    "AdamsBashforth(2, start='rising')": 5,
    "AdamsBashforth(4, start='rising')": 5,
    "DEIS(3, clock='lam', start='rising')": 5,
    "DEIS(2)": 6,
    "DEIS(3)": 11,
    "DEIS(4)": 14,
    "DEIS(2, clock='lam')": 6,
    "DEIS(3, clock='lam')": 11,
    "DEIS(4, clock='lam')": 14,
    "DPMSolver(2)": 10,
    "DPMSolver(3)": 15,
    "DPMSolverPP()": 5,
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_evaluations_are_known_beforehand(row: Row) -> None:
    network = GaussianNetwork(SCHEDULES["linear"], "epsilon")
    model = Denoiser(network, SCHEDULES["linear"])
    solution = sample(model, start_state(SCHEDULES["linear"], 1.0), condition(), solver=row.solver,
                      grid=smooth_grid("linear", 5))  # fmt: skip
    assert solution.nfe == EVALUATIONS.get(row.name, solution.nfe) == model.nfe
    assert sum(row.solver.evaluations(i) for i in range(5)) == solution.nfe


@pytest.mark.parametrize(
    "solver", [AdamsBashforth(1), AdamsBashforth(1, "rising"), DEIS(1), DEIS(1, "lam")], ids=repr
)
def test_order_one_is_euler(solver: Solver) -> None:
    ours, theirs = (run("linear", "exponential", s, 4)[1][0] for s in (solver, Euler()))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


def test_a_tableau_is_all_a_new_runge_kutta_method_needs() -> None:
    ralston = ExplicitRungeKutta(Tableau(((), (2 / 3,)), (0.25, 0.75), (0.0, 2 / 3)), order=2)
    coarse, fine = (run("linear", "exponential", ralston, n) for n in (16, 32))
    for found in slopes(coarse, fine, known("linear")):
        assert found == pytest.approx([2.0] * 4, abs=0.25)
    with pytest.raises(InputError, match="sum to 1"):
        Tableau(((), (0.5,)), (0.5, 1.0), (0.0, 0.5))
    with pytest.raises(InputError, match="sum of its row"):
        Tableau(((), (0.5,)), (0.0, 1.0), (0.0, 0.4))
    with pytest.raises(InputError, match="below its diagonal"):
        Tableau(((), ()), (0.0, 1.0), (0.0, 0.5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdamsBashforth(5), "AdamsBashforth has orders 1, 2, 3 and 4"),
        (lambda: DEIS(0), "DEIS has orders 1, 2, 3 and 4"),
        (lambda: DEIS(2, "rho"), "AdamsBashforth is the one"),  # type: ignore[arg-type]
        (lambda: AdamsBashforth(4, "euler"), "the start of AdamsBashforth is 'runge-kutta' or 'rising'"),  # type: ignore[arg-type]
        (lambda: DPMSolver(1), "orders 2 and 3"),
    ],
)
def test_settings_that_do_not_exist_are_refused(make: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("solver", "form"),
    [(DPMSolverPP(), "exponential"), (DEIS(2), "data"), (DPMSolver(2), "original")],
    ids=repr,
)
def test_solvers_refuse_forms_they_are_not_made_for(solver: Solver, form: str) -> None:
    network = GaussianNetwork(SCHEDULES["linear"], "epsilon")
    with pytest.raises(InputError, match=f"got form='{form}'"):
        sample(Denoiser(network, SCHEDULES["linear"]), start_state(SCHEDULES["linear"], 1.0), condition(),
               solver=solver, form=form)  # fmt: skip
