"""The table of solvers on real digits: the Fréchet distance, the methods, the shipped pixel model, a small run."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from benchmarks.frechet import Moments, frechet, with_error
from benchmarks.table1 import __main__ as command
from benchmarks.table1 import page
from benchmarks.table1.measure import Problem
from benchmarks.table1.methods import METHODS, TARGETS
from training import digits as training
from training.scenes import real_digits

import backdrift as bd
from backdrift.errors import InputError
from backdrift.pipelines.assets import folder, load_digits_denoiser
from backdrift.pipelines.digits import DigitsNetwork


def gaussian(mean: list[float], cov: list[list[float]]) -> Moments:
    return Moments(torch.tensor(mean, dtype=torch.float64), torch.tensor(cov, dtype=torch.float64))


def test_the_distance_of_gaussians_whose_axes_agree() -> None:
    a = gaussian([1.0, -2.0, 0.5], [[4.0, 0, 0], [0, 0.25, 0], [0, 0, 0]])  # one direction without spread
    b = gaussian([0.0, 1.0, 0.5], [[1.0, 0, 0], [0, 2.25, 0], [0, 0, 0.09]])
    known = (1 + 9) + (2 - 1) ** 2 + (0.5 - 1.5) ** 2 + 0.3**2
    assert frechet(a, b) == pytest.approx(known, rel=1e-12)
    assert frechet(b, a) == pytest.approx(known, rel=1e-12)
    assert frechet(a, a) == pytest.approx(0, abs=1e-7)


def test_the_distance_of_gaussians_whose_axes_differ() -> None:
    """In the plane tr(AB)^(1/2) = sqrt(tr AB + 2 sqrt(det AB)), without any eigenvalue."""
    a = gaussian([0.3, 0.1], [[2.0, 0.7], [0.7, 1.0]])
    b = gaussian([-0.2, 0.4], [[0.5, -0.3], [-0.3, 1.5]])
    product = a.cov @ b.cov
    crossed = math.sqrt(float(product.trace()) + 2 * math.sqrt(float(torch.linalg.det(product))))
    known = 0.5**2 + 0.3**2 + 3.0 + 2.0 - 2 * crossed
    assert frechet(a, b) == pytest.approx(known, rel=1e-12)


def test_features_give_their_moments_and_refuse_what_is_not_finite() -> None:
    features = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]])
    found = Moments.of(features)
    assert found.mean.tolist() == [2.0, 2.0]
    torch.testing.assert_close(found.cov, torch.tensor([[4.0, 3.0], [3.0, 3.0]], dtype=torch.float64))
    with pytest.raises(ValueError, match="finite"):
        Moments.of(torch.tensor([[0.0], [math.nan]]))
    with pytest.raises(ValueError, match="n >= 2"):
        Moments.of(torch.zeros(1, 3))


def test_the_standard_error_is_the_spread_over_fresh_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    known = Moments(torch.zeros(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64))
    runs = [
        with_error(known, torch.randn(600, 6, generator=generator, dtype=torch.float64) @ mix + 0.2)
        for _ in range(200)
    ]
    spread = float(torch.tensor([value for value, _ in runs], dtype=torch.float64).std())
    said = float(torch.tensor([error for _, error in runs], dtype=torch.float64).square().mean().sqrt())
    assert said == pytest.approx(spread, rel=0.2)  # either is known to about 5 %
    exact = frechet(known, Moments(torch.full((6,), 0.2, dtype=torch.float64), mix.T @ mix))
    assert sum(value for value, _ in runs) / len(runs) == pytest.approx(exact, abs=spread)


def test_the_number_of_steps_comes_nearest_to_the_calls() -> None:
    nearest = {m.name: [(m.steps(t), m.calls(m.steps(t))) for t in TARGETS] for m in METHODS}
    every = [(5, 5), (10, 10), (20, 20), (50, 50)]
    for name in (
        "original, Euler",
        "exponential, Euler (DDIM)",
        "exponential, AB4 rising",
        "DPM-Solver++(2M)",
    ):
        assert nearest[name] == every
    assert nearest["original, RK4"] == [(1, 4), (2, 8), (5, 20), (12, 48)]
    assert nearest["exponential, AB4"] == [(1, 4), (2, 8), (11, 20), (41, 50)]
    assert nearest["DPM-Solver-2"] == [(2, 4), (5, 10), (10, 20), (25, 50)]
    assert nearest["DPM-Solver-3"] == [(2, 6), (3, 9), (7, 21), (17, 51)]


def test_rising_adams_is_the_textbook_recursion() -> None:
    """On EDM the exponential form's clock is t itself, so even steps have Adams' own coefficients."""
    rate = -0.7

    def network(x: torch.Tensor, t: torch.Tensor, cond: object) -> torch.Tensor:
        return rate * x + t[:, None].sin()

    (rising,) = (method for method in METHODS if method.name == "exponential, AB4 rising")
    start, steps, h = torch.tensor([[0.4], [-1.2]], dtype=torch.float64), 9, -0.3
    times = [3.0 + h * i for i in range(steps + 1)]
    found = bd.sample(
        bd.Denoiser(network, bd.EDM()), start, solver=rising.solver, form="exponential", grid=times
    )
    assert found.nfe == steps
    y, drifts = start.clone(), []
    coefficients = ([1.0], [1.5, -0.5], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24])
    for t in times[:-1]:
        drifts.insert(0, rate * y + math.sin(t))
        row = coefficients[min(len(drifts), 4) - 1]
        y = y + h * sum(c * k for c, k in zip(row, drifts, strict=False))
    torch.testing.assert_close(found.x0, y, rtol=1e-12, atol=1e-12)


def test_the_row_of_euler_on_the_exponential_form_is_ddim() -> None:
    problem = Problem(samples=3)
    grid = bd.TimeGrid("uniform", 5, start=1.0, end=1e-3)
    found, calls = problem.run(bd.Euler(), "exponential", "uniform", 5)
    model, schedule, x = problem.model, problem.model.schedule, problem.noise
    nodes = grid.nodes(schedule).tolist()
    with torch.no_grad():
        for t, after in pairwise(nodes):
            clean, eps = model.denoised(x, t), model(x, t)
            x = float(schedule.alpha(after)) * clean + float(schedule.sigma(after)) * eps
    assert calls == 5
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def test_the_network_knows_its_schedule_and_no_name_is_a_row_of_zeros() -> None:
    network = training.build().double()
    t = torch.tensor([1.0, 0.6, 0.05, 1e-3], dtype=torch.float64)
    torch.testing.assert_close(network.lam(t), bd.VP.linear().lam(t), rtol=1e-12, atol=1e-12)
    torch.manual_seed(1)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    assert torch.equal(network(x, t), network(x, t, torch.zeros(4, 10, dtype=torch.float64)))
    assert not torch.equal(network(x, t), network(x, t, torch.eye(10, dtype=torch.float64)[:4]))
    assert not torch.equal(network(x, t), network(x, t.flip(0)))
    again = DigitsNetwork(**network.config()).double()  # type: ignore[arg-type]
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(x, t), network(x, t))
    with pytest.raises(InputError, match=r"\(B, 1, 8, 8\)"):
        network(x[:, 0], t)
    with pytest.raises(InputError, match=r"\(4, 10\)"):
        network(x, t, torch.zeros(1, 10))


def test_training_targets_are_the_schedules() -> None:
    """x and v at the drawn times give back the picture and the noise; the times cover both clocks evenly."""
    import numpy as np

    t = training.drawn_times(np.random.default_rng(0), 2000)
    assert training.LAST <= float(t.min()) < 0.0012
    assert 0.999 < float(t.max()) <= training.FIRST
    # Half evenly in t, half evenly in log-SNR: the share below t = 0.1, by the schedule's own clock.
    lam = bd.VP.linear().lam
    low = float((lam(1e-3) - lam(0.1)) / (lam(1e-3) - lam(1.0)))
    assert float((t < 0.1).double().mean()) == pytest.approx((0.099 / 0.999 + low) / 2, abs=2e-3)
    clean, noise = torch.randn(2000, 1, 8, 8).double(), torch.randn(2000, 1, 8, 8).double()
    x, v = training.noised(clean, noise, t)
    alpha, sigma = (s(t)[:, None, None, None] for s in (bd.VP.linear().alpha, bd.VP.linear().sigma))
    torch.testing.assert_close(alpha * x - sigma * v, clean)
    torch.testing.assert_close(sigma * x + alpha * v, noise)


def test_the_shipped_model_draws_the_digit_that_it_is_told() -> None:
    model = load_digits_denoiser()
    wanted = torch.arange(60) % 10
    pictures = training.drawn(model, 60, F.one_hot(wanted, 10).float())
    assert float((training.read(pictures) == wanted).double().mean()) >= 0.8
    held, answers = real_digits(held_out=True)
    assert float((training.read(held[:100]) == answers[:100]).double().mean()) >= 0.95


def test_the_shipped_model_is_small() -> None:
    assert (folder("digits") / "model.safetensors").stat().st_size <= 3e6


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("original, AB4 rising", "exponential, AB4 rising", "DPM-Solver-2")
    for module in (command, page):
        monkeypatch.setattr(module, "METHODS", [m for m in METHODS if m.name in names])
        monkeypatch.setattr(module, "TARGETS", (5, 10))


def test_a_small_run_is_the_same_bit_for_bit_after_a_stop(few: None, tmp_path: Path) -> None:
    whole = command.run(Problem(40, 3, fine_steps=20), tmp_path / "whole.json").data
    assert len(whole["cells"]) == 3 * 2 * 2
    # A run that was stopped in the middle goes on, and what it adds is what the other one has.
    part = dict(whole, cells=whole["cells"][:5])
    (tmp_path / "part.json").write_text(json.dumps(part))
    again = command.run(Problem(40, 3, fine_steps=20), tmp_path / "part.json").data
    assert json.dumps(again) == json.dumps(whole)
    with pytest.raises(SystemExit, match="other seed"):
        command.run(Problem(40, 4, fine_steps=20), tmp_path / "part.json")
    page.plot(whole, tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes()[:4] == b"\x89PNG"
    table = page.block(whole)
    cell = next(c for c in whole["cells"] if c["method"] == "DPM-Solver-2" and c["calls"] == 4)
    assert f"{page.number(cell['rms'])} (4)" in table
    # Twice the calls bring every method on the exponential form nearer to the flow.
    for method in ("exponential, AB4 rising", "DPM-Solver-2"):
        a, b = (c["rms"] for c in whole["cells"] if c["method"] == method and c["grid"] == "logsnr")
        assert b < a


def test_more_steps_lead_to_the_stand_in_for_the_exact_flow() -> None:
    """Two methods that share neither form nor formula end where it does; and with second order, the slope."""
    problem = Problem(samples=16, fine_steps=60)
    ends = {n: problem.run(bd.DPMSolver(2), "exponential", "logsnr", n)[0] for n in (20, 40, 80)}
    errors = [float((ends[n] - problem.fine).double().norm()) for n in (20, 40, 80)]
    assert errors[2] < errors[1] < errors[0]
    assert math.log2(errors[0] / errors[2]) / 2 > 1.5
    other, _ = problem.run(bd.RK4(), "original", "logsnr", 120)
    assert float((other - problem.fine).double().norm()) < errors[2]


def test_the_page_holds_the_results_and_nothing_else() -> None:
    text = page.PAGE.read_text()
    assert page.written(text, json.loads(command.RESULTS.read_text())) == text, (
        "run: python -m benchmarks.table1 --write"
    )
