"""Schedules against their defining formulas, inverses to rounding, derivatives against differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from backdrift.errors import InputError
from backdrift.schedules import EDM, VP, Flow, Schedule
from problems import SCHEDULES, scaled_linear_table

ALL: dict[str, Schedule] = {**SCHEDULES, "table": VP.discrete(scaled_linear_table())}


def times(schedule: Schedule) -> Tensor:
    t = torch.linspace(0.001, 0.999, 401, dtype=torch.float64)
    return t * (40.0 if isinstance(schedule, EDM) else schedule.t_max)


@pytest.mark.parametrize("name", ALL)
def test_inverses_are_exact(name: str) -> None:
    schedule = ALL[name]
    t = times(schedule)
    scale = float(t.max())
    assert (schedule.t_from_lam(schedule.lam(t)) - t).abs().max() < 1e-14 * max(1, scale)
    assert (schedule.t_from_rho(schedule.rho(t)) - t).abs().max() < 1e-14 * max(1, scale)


@pytest.mark.parametrize("name", ALL)
def test_clocks_and_scales_agree(name: str) -> None:
    schedule = ALL[name]
    t = times(schedule)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    torch.testing.assert_close(schedule.lam(t), (alpha / sigma).log(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(schedule.rho(t), sigma / alpha, rtol=1e-12, atol=0)
    torch.testing.assert_close(schedule.log_alpha(t).exp(), alpha, rtol=1e-13, atol=0)
    assert (schedule.lam(t).diff() < 0).all()
    assert alpha.dtype == torch.float64
    if isinstance(schedule, VP):
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ALL)
def test_derivatives_match_differences(name: str) -> None:
    schedule = ALL[name]
    # Between the trained steps, where a straight-line table has a derivative too.
    t = times(schedule)[5:-5] if name != "table" else torch.arange(10.5, 990, 7, dtype=torch.float64)
    h = 1e-6 * max(1.0, float(t.max()))
    for value, derivative in ((schedule.alpha, schedule.dalpha), (schedule.sigma, schedule.dsigma)):
        numeric = (value(t + h) - value(t - h)) / (2 * h)
        torch.testing.assert_close(derivative(t), numeric, rtol=2e-6, atol=1e-9)
    torch.testing.assert_close(schedule.f(t), schedule.dalpha(t) / schedule.alpha(t), rtol=1e-12, atol=0)
    slope = (schedule.lam(t + h) - schedule.lam(t - h)) / (2 * h)
    torch.testing.assert_close(schedule.g2(t), -2 * schedule.sigma(t) ** 2 * slope, rtol=1e-5, atol=1e-9)


def test_linear_is_the_integral_of_its_beta() -> None:
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    beta = torch.linspace(0, 1, 200001, dtype=torch.float64) * 19.9 + 0.1
    integral = torch.cat([torch.zeros(1), torch.cumulative_trapezoid(beta, dx=1 / 200000)])[::20000]
    torch.testing.assert_close(VP.linear().alpha(t), (-integral / 2).exp(), rtol=1e-10, atol=0)


def test_cosine_has_exact_ends() -> None:
    schedule = VP.cosine()
    t = torch.linspace(0, 1, 13, dtype=torch.float64)
    s = 0.008
    expected = torch.cos((t + s) / (1 + s) * math.pi / 2) / math.cos(s / (1 + s) * math.pi / 2)
    torch.testing.assert_close(schedule.alpha(t), expected, rtol=0, atol=1e-15)
    assert float(schedule.alpha(1.0)) == 0.0
    assert float(schedule.sigma(0.0)) == 0.0
    assert float(schedule.sigma(1.0)) == pytest.approx(1.0, abs=1e-15)
    assert float(schedule.t_from_rho(0.0)) == pytest.approx(0.0, abs=1e-15)
    assert float(schedule.t_from_lam(-math.inf)) == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize("interpolation", ["linear", "spline"])
def test_discrete_meets_the_table_and_lies_between(interpolation: str) -> None:
    table = scaled_linear_table()
    schedule = VP.discrete(table.float(), interpolation)
    steps = torch.arange(1000, dtype=torch.float64)
    torch.testing.assert_close(schedule.alpha(steps) ** 2, table.float().double(), rtol=1e-14, atol=0)
    middle = schedule.log_alpha(steps[:-1] + 0.5)
    mean = (schedule.log_alpha(steps[:-1]) + schedule.log_alpha(steps[1:])) / 2
    # A straight line is the mean; the spline bends by an eighth of the second difference, about 1e-5.
    torch.testing.assert_close(middle, mean, rtol=0, atol=1e-14 if interpolation == "linear" else 1e-5)


def test_spline_reproduces_cubics_and_is_smooth() -> None:
    t = torch.arange(20, dtype=torch.float64)

    def cubic(t: Tensor) -> Tensor:
        return -0.001 - 0.02 * t - 3e-4 * t**2 - 1e-5 * t**3

    schedule = VP.discrete((2 * cubic(t)).exp(), "spline")
    fine = torch.linspace(0, 19, 500, dtype=torch.float64)
    torch.testing.assert_close(schedule.log_alpha(fine), cubic(fine), rtol=0, atol=1e-13)


def test_discrete_has_a_clean_end_and_no_time_before_its_first() -> None:
    schedule = VP.discrete(scaled_linear_table())
    assert float(schedule.sigma(-1.0)) == 0.0
    assert float(schedule.alpha(-1.0)) == 1.0
    assert float(schedule.t_from_rho(0.0)) == -1.0
    for t in (-0.5, -1.5, 999.01):
        with pytest.raises(InputError, match=r"\[0, 999\]"):
            schedule.alpha(t)
    with pytest.raises(InputError, match=r"\[0, 999\]"):
        schedule.t_from_rho(1e-3)  # cleaner than the first trained step


def test_zero_terminal_signal_is_reached() -> None:
    table = scaled_linear_table().sqrt()
    table = ((table - table[-1]) * table[0] / (table[0] - table[-1])) ** 2  # Lin et al. 2024, Algorithm 1
    schedule = VP.discrete(table)
    assert float(schedule.alpha(999.0)) == 0.0
    assert float(schedule.rho(999.0)) == math.inf
    t = torch.tensor([998.2, 998.9, 999.0], dtype=torch.float64)
    torch.testing.assert_close(schedule.t_from_lam(schedule.lam(t)), t, rtol=1e-15, atol=0)
    with pytest.raises(InputError, match="'linear'"):
        VP.discrete(table, "spline")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VP.linear(0.0, 20.0), "beta0"),
        (lambda: VP.cosine(0.0), "0 < s < 1"),
        (lambda: VP.discrete([0.9, 0.8]), "at least 4"),
        (lambda: VP.discrete([0.9, 0.8, 0.85, 0.1]), "fall strictly"),
        (lambda: VP.discrete([0.9, 0.8, 0.7, 0.1], "cubic"), "'linear' or 'spline'"),  # type: ignore[arg-type]
        (lambda: VP.linear().alpha(1.1), "t = 1.1"),
        (lambda: VP.linear().alpha(float("nan")), "nan"),
        (lambda: Flow().alpha(-0.1), "t = -0.1"),
        (lambda: EDM().alpha(-1.0), "sigma >= 0"),
        (lambda: EDM().t_from_rho(-1.0), "never negative"),
        (lambda: Flow().t_from_lam(float("nan")), "NaN"),
    ],
)
def test_impossible_input_is_refused(make: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()  # type: ignore[operator]
