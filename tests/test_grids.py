"""Grids against their defining rules."""

from __future__ import annotations

import pytest
import torch

from backdrift.denoiser import Denoiser
from backdrift.errors import InputError
from backdrift.grids import RULES, TimeGrid
from backdrift.sampling import sample
from backdrift.schedules import EDM, VP, Flow
from backdrift.solvers import DPMSolver, Midpoint
from problems import SCHEDULES, GaussianNetwork, condition, scaled_linear_table, start_state

ENDS = {
    "linear": (1.0, 0.01),
    "cosine": (0.99, 0.01),
    "discrete": (990.0, 3.5),
    "edm": (80.0, 0.002),
    "flow": (0.9, 0.1),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("rule", RULES)
def test_spacing_is_the_rules(rule: str, name: str) -> None:
    schedule, (start, end) = SCHEDULES[name], ENDS[name]
    nodes = TimeGrid(rule, steps=9, start=start, end=end).nodes(schedule)
    assert nodes.dtype == torch.float64
    assert len(nodes) == 10
    assert (nodes[0], nodes[-1]) == (start, end)
    clock = {
        "uniform": nodes,
        "quadratic": nodes.sqrt(),
        "logsnr": schedule.lam(nodes),
        "karras": schedule.rho(nodes) ** (1 / 7),
    }[rule]
    steps = clock.diff()
    torch.testing.assert_close(steps, steps.mean().expand_as(steps), rtol=1e-9, atol=1e-12)


# Where alpha is 0 at the start, or sigma at the end, a rule that counts in log noise has no nodes.
WITH_DEFAULTS = [(r, n) for r in RULES for n in SCHEDULES if n != "flow" or r in ("uniform", "quadratic")]


@pytest.mark.parametrize(("rule", "name"), WITH_DEFAULTS)
def test_default_ends_are_the_schedules_and_are_met_exactly(rule: str, name: str) -> None:
    schedule = SCHEDULES[name]
    nodes = TimeGrid(rule, steps=7).nodes(schedule)
    assert (nodes[0].item(), nodes[-1].item(), len(nodes)) == (schedule.start, schedule.end, 8)
    assert TimeGrid(rule, steps=1).nodes(schedule).tolist() == [schedule.start, schedule.end]
    if schedule.end != schedule.t_clean:
        nodes = TimeGrid(rule, steps=7, clean_end=True).nodes(schedule)
        assert (nodes[-2].item(), nodes[-1].item(), len(nodes)) == (schedule.end, schedule.t_clean, 8)
        assert (schedule.alpha(nodes[-1]), schedule.sigma(nodes[-1])) == (1.0, 0.0)


# Equal steps in t say little on EDM: they are as long as the range, t < 1 of 80, where its sample is decided.
@pytest.mark.parametrize(("rule", "name"), [case for case in WITH_DEFAULTS if case != ("uniform", "edm")])
def test_runs_from_end_to_end_reach_the_known_sample(rule: str, name: str) -> None:
    """From the schedule's noisiest time to sigma = 0, on Gaussian data, with the prediction usual there."""
    schedule = SCHEDULES[name]
    prediction = {"edm": "sample", "flow": "flow_prediction", "cosine": "v_prediction"}.get(name, "epsilon")
    network = GaussianNetwork(schedule, prediction)
    grid = TimeGrid(rule, steps=80, clean_end=schedule.end != schedule.t_clean)
    x, cond = start_state(schedule, schedule.start), condition()
    solver = Midpoint() if name == "flow" else DPMSolver(2)
    with torch.no_grad():
        found = sample(Denoiser(network, schedule, prediction), x, cond, solver=solver, grid=grid).x0
        true = network.solution(x, cond, schedule.start, schedule.t_clean)
    assert float((found - true).norm() / true.norm()) < 0.02


def test_karras_is_edms_table() -> None:
    nodes = TimeGrid("karras", steps=17).nodes(EDM())
    i = torch.arange(18, dtype=torch.float64)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(nodes, expected, rtol=1e-12, atol=0)


def test_clean_end_is_one_of_the_steps() -> None:
    nodes = TimeGrid("logsnr", steps=5, clean_end=True).nodes(VP.discrete(scaled_linear_table()))
    assert len(nodes) == 6
    assert nodes[-2:].tolist() == [0.0, -1.0]
    assert TimeGrid("karras", steps=5, clean_end=True).nodes(EDM())[-1] == 0.0


def test_explicit_times_are_taken_as_they_are() -> None:
    times = [0.9, 0.40000000000000019, 0.1]
    grid = TimeGrid(times)
    assert grid.steps == 2
    assert grid.nodes(Flow()).tolist() == times
    assert TimeGrid(torch.tensor(times, dtype=torch.float64)).nodes(Flow()).tolist() == times


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TimeGrid("cosine", steps=3), "uniform, logsnr, quadratic, karras"),
        (lambda: TimeGrid("uniform"), "steps >= 1"),
        (lambda: TimeGrid("uniform", steps=0), "steps >= 1"),
        (lambda: TimeGrid("uniform", steps=2.5), "whole number"),  # type: ignore[arg-type]
        (lambda: TimeGrid("karras", steps=3, exponent=0.0), "exponent"),
        (lambda: TimeGrid([0.5]), "at least 2"),
        (lambda: TimeGrid([0.5, 0.1], steps=1), "leave out"),
        (lambda: TimeGrid([0.1, 0.5]).nodes(Flow()), "fall strictly"),
        (lambda: TimeGrid([0.5, 0.5]).nodes(Flow()), "fall strictly"),
        (lambda: TimeGrid("uniform", 3, start=0.1, end=0.5).nodes(Flow()), "fall strictly"),
        (lambda: TimeGrid([1.5, 0.5]).nodes(Flow()), "t = 1.5"),
        (lambda: TimeGrid("logsnr", 3).nodes(Flow()), "alpha is 0 at t = 1"),
        (lambda: TimeGrid("karras", 3).nodes(Flow()), "alpha is 0 at t = 1"),
        (lambda: TimeGrid("logsnr", 3, start=0.9).nodes(Flow()), "sigma is 0 at t = 0"),
        (lambda: TimeGrid("quadratic", 3, end=-1.0).nodes(VP.discrete(scaled_linear_table())), "times >= 0"),
    ],
)
def test_impossible_grids_are_refused(make: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()  # type: ignore[operator]
