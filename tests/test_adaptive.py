"""Adaptive Dormand–Prince: torchdiffeq's accepted steps, the gradient of those, and no call beyond the end."""

from __future__ import annotations

import math
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torchdiffeq import odeint

import backdrift as bd
from backdrift.errors import InputError, NonFiniteError, UnsupportedError
from backdrift.solvers.adaptive import Witness, accepted_steps
from problems import (
    SCHEDULES,
    GaussianNetwork,
    MixtureNetwork,
    condition,
    start_state,
    toy_denoiser,
    toy_inputs,
)

LINEAR = SCHEDULES["linear"]


class Asked:
    """A network that notes the times it is asked at."""

    def __init__(self, network: Any) -> None:
        self.network, self.times = network, []

    def __call__(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        self.times.append(float(t[0]))
        return self.network(x, t, cond)


def test_errors_follow_the_tolerance_for_states_and_gradients() -> None:
    """Gaussian data from pure noise to nearly clean data: closed form. Calls grow like tolerance^(-1/5)."""
    network = GaussianNetwork(LINEAR, "epsilon")
    weights = torch.tensor([0.7, -1.1, 0.4], dtype=torch.float64)
    x, c = start_state(LINEAR, 1.0).requires_grad_(), condition().requires_grad_()
    leaves = [x, c, network.mean]
    true = network.solution(x, c, 1.0, 1e-3)
    truth = [true, *torch.autograd.grad((weights * true**2).sum(), leaves)]
    steps = []
    for tolerance in (1e-6, 1e-8, 1e-10):
        solver = bd.AdaptiveDormandPrince(tolerance, tolerance)
        solution = bd.sample(bd.Denoiser(network, LINEAR), x, c, solver=solver)
        found = [solution.x0, *torch.autograd.grad((weights * solution.x0**2).sum(), leaves)]
        steps.append(len(solution.times) - 1)
        for ours, exact in zip(found, truth, strict=True):
            assert float((ours - exact).detach().norm() / exact.detach().norm()) < 20 * tolerance
    assert steps[2] / steps[1] == pytest.approx(100 ** (1 / 5), rel=0.3)


def test_the_gradient_is_torchdiffeqs_own_on_the_same_steps() -> None:
    """Where torchdiffeq is given its first step (its own guess would be differentiated too), the two are one method."""
    network = MixtureNetwork(LINEAR)
    x, c = start_state(LINEAR, 0.9).requires_grad_(), condition().requires_grad_()
    ends = [0.9, 0.01]
    solver = bd.AdaptiveDormandPrince(1e-5, 1e-5)
    ours = bd.sample(bd.Denoiser(network, LINEAR), x, c, solver=solver, grid=ends)
    rho = LINEAR.rho(ours.times)
    accepted = []

    def drift(s: Tensor, y: Tensor) -> Tensor:
        t = LINEAR.t_from_rho(s.detach())
        return network(LINEAR.alpha(t) * y, t.expand(2), c)

    drift.callback_accept_step = lambda s, y, h: accepted.append(float(s))  # type: ignore[attr-defined]
    options = {"first_step": float(rho[0] - rho[1]), "step_t": rho[-1:]}
    y = odeint(
        drift, x / LINEAR.alpha(0.9), rho[[0, -1]], rtol=1e-5, atol=1e-5, method="dopri5", options=options
    )
    theirs = y[-1] * LINEAR.alpha(0.01)
    torch.testing.assert_close(torch.tensor(accepted, dtype=torch.float64), rho[:-1], rtol=1e-9, atol=0)
    torch.testing.assert_close(ours.x0, theirs, rtol=0, atol=1e-9)
    gradients = [torch.autograd.grad(x0.square().sum(), [x, c, network.means]) for x0 in (ours.x0, theirs)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("gradient", [bd.Exact("min"), bd.Exact("max")], ids=repr)
def test_exact_is_plain_autograd_on_the_accepted_steps(gradient: Any) -> None:
    x, cond = toy_inputs()
    results = []
    for method in (gradient, bd.Plain()):
        model, leaf = toy_denoiser(), x.clone().requires_grad_()
        solution = bd.sample(model, leaf, cond, solver=bd.AdaptiveDormandPrince(1e-3, 1e-3), gradient=method)
        weights = list(model.network.parameters())
        results.append([solution.x0, *torch.autograd.grad(solution.x0.square().sum(), [leaf, *weights])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_all_calls_are_counted_and_without_gradients_the_search_is_the_run() -> None:
    asked = Asked(MixtureNetwork(LINEAR))
    model, x, c = bd.Denoiser(asked, LINEAR), start_state(LINEAR, 1.0), condition()
    solver = bd.AdaptiveDormandPrince(1e-4, 1e-4)
    with torch.no_grad():
        search = bd.sample(model, x, c, solver=solver, trajectory=True)
    assert search.nfe == len(asked.times) == search.stats.calls_forward == model.nfe
    both = bd.sample(model, x, c, solver=solver, trajectory=True)
    steps = len(both.times) - 1
    assert torch.equal(search.times, both.times)
    assert both.nfe == search.nfe + 6 * steps == both.stats.calls_forward
    assert model.nfe == len(asked.times)
    assert (search.nfe - 2) % 6 == 0
    assert (search.nfe - 2) / 6 >= steps
    assert search.trajectory is not None
    assert both.trajectory is not None
    for one, other in zip(search.trajectory, both.trajectory, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", ["exponential", "original", "data"])
def test_no_time_beyond_the_ends_is_asked_for(form: str, dtype: torch.dtype) -> None:
    """torchdiffeq alone steps past the end, to rho < 0, and hands times over in the state's dtype."""
    asked = Asked(MixtureNetwork(LINEAR))
    x, c = start_state(LINEAR, 1.0).to(dtype), condition().to(dtype)
    model = bd.Denoiser(lambda x, t, cond: asked(x.double(), t, cond.double()), LINEAR)
    solution = bd.sample(model, x, c, solver=bd.AdaptiveDormandPrince(1e-3, 1e-3), form=form)
    assert (solution.times[0], solution.times[-1]) == (1.0, 1e-3)
    assert bool((solution.times.diff() < 0).all())
    assert 1e-3 - 1e-10 <= min(asked.times) <= max(asked.times) <= 1.0


def test_the_grids_nodes_are_kept() -> None:
    nodes = [0.9, 0.5, 0.2, 0.01]
    model, x = bd.Denoiser(MixtureNetwork(LINEAR), LINEAR), start_state(LINEAR, 0.9)
    solution = bd.sample(model, x, condition(), solver=bd.AdaptiveDormandPrince(), grid=nodes)
    assert set(nodes) < set(solution.times.tolist())


def test_a_flow_runs_from_end_to_end() -> None:
    """Both singular ends are ordinary on its own form; on the others their intervals are stepped aside."""
    flow = SCHEDULES["flow"]
    network = GaussianNetwork(flow, "flow_prediction")
    model, x, c = bd.Denoiser(network, flow, "flow_prediction"), start_state(flow, 1.0), condition()
    solver = bd.AdaptiveDormandPrince(1e-7, 1e-7)
    with torch.no_grad():
        true = network.solution(x, c, 1.0, 0.0)
        own = bd.sample(model, x, c, solver=solver).x0
        grid = [1.0, 0.99, 0.01, 0.0]
        aside = [bd.sample(model, x, c, solver=solver, grid=grid, form=f).x0 for f in ("exponential", "data")]
    for found in (own, *aside):
        torch.testing.assert_close(found, true, rtol=0, atol=2e-6)


def test_accepted_steps_go_either_way() -> None:
    """y' = -y, whose solution is known, there and back."""
    y = torch.tensor([1.0, -2.0], dtype=torch.float64)
    there = accepted_steps(lambda s, y: -y, y, 0.0, 3.0, rtol=1e-9, atol=1e-9)
    assert (there.clocks[0], there.clocks[-1], len(there.states)) == (0.0, 3.0, len(there.clocks) - 1)
    for s, state in zip(there.clocks[1:], there.states, strict=True):
        torch.testing.assert_close(state, y * math.exp(-s), rtol=1e-7, atol=0)
    back = accepted_steps(lambda s, y: -y, there.states[-1], 3.0, 0.0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(back.states[-1], y, rtol=1e-7, atol=0)
    assert all(a > b for a, b in pairwise(back.clocks))


def test_the_state_halfway_is_of_order_four() -> None:
    """y' = -y in single steps: the error halfway falls with the fifth power of the size."""
    errors = []
    for size in (0.2, 0.1, 0.05):
        y = torch.tensor([1.0], dtype=torch.float64)
        found = accepted_steps(
            lambda s, y: -y, y, 0.0, size, rtol=1.0, atol=1.0, first_step=size, middles=True
        )
        assert len(found.middles) == 1
        errors.append(abs(float(found.middles[0]) - math.exp(-size / 2)))
    assert all(math.log2(a / b) == pytest.approx(5, abs=0.25) for a, b in pairwise(errors)), errors


class Told(Witness):
    """Notes what it is told, in order, with the evaluations between."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def begun(self) -> None:
        self.heard.append("begun")

    def attempted(self) -> None:
        self.heard.append("attempted")

    def accepted(self, step: float) -> None:
        self.heard.append(step)

    def rejected(self) -> None:
        self.heard.append("rejected")


def test_a_witness_is_told_of_every_step() -> None:
    """y' = cos(s²) s y: steps shrink on the way, so that some are rejected."""
    told, y = Told(), torch.tensor([1.0, -2.0], dtype=torch.float64)

    def drift(s: float, y: Tensor) -> Tensor:
        told.heard.append("k")
        return math.cos(s * s) * s * y

    found = accepted_steps(drift, y, 0.0, -6.0, rtol=1e-6, atol=1e-6, witness=told)
    words = told.heard
    assert words[:4] == ["begun", "k", "k", "attempted"]  # the start's, and one to guess a first size
    sizes = [word for word in words if isinstance(word, float)]
    assert sizes == pytest.approx([b - a for a, b in pairwise(found.clocks)])
    assert all(size < 0 for size in sizes)
    assert words.count("rejected") > 0
    assert words.count("attempted") == len(sizes) + words.count("rejected")
    assert words.count("k") == 2 + 6 * words.count("attempted")


def sampled(network: Any, solver: Any, dtype: torch.dtype = torch.float64) -> None:
    bd.sample(bd.Denoiser(network, LINEAR), start_state(LINEAR, 1.0).to(dtype), condition(), solver=solver)


def test_what_goes_wrong_is_said() -> None:
    network = MixtureNetwork(LINEAR)

    def broken(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return network(x, t, cond) / (t[:, None] > 0.3)

    with pytest.raises(NonFiniteError, match=r"NaN or infinite at t = 0\.\d+ while adaptive steps"):
        sampled(broken, bd.AdaptiveDormandPrince())
    with pytest.raises(
        InputError, match=r"3 steps .* from t = 1 to t = 0\.\d+, not to t = 0\.001: raise rtol"
    ):
        sampled(network, bd.AdaptiveDormandPrince(1e-9, 1e-9, max_steps=3))
    with pytest.raises(
        InputError, match=r"steps too small for torch\.float64 between clock = 1 and clock = 2 \(underflow"
    ):
        accepted_steps(
            lambda s, y: torch.rand_like(y), torch.ones(2).double(), 1.0, 2.0, rtol=1e-25, atol=1e-25
        )
    with pytest.raises(InputError, match="steps too small for torch"):
        sampled(lambda x, t, c: torch.sin(1e9 * x), bd.AdaptiveDormandPrince(1e-30, 1e-30), torch.float32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bd.AdaptiveDormandPrince(rtol=0), "rtol must be a positive number"),
        (lambda: bd.AdaptiveDormandPrince(atol=float("inf")), "atol must be a positive number"),
        (lambda: bd.AdaptiveDormandPrince(max_steps=0), "max_steps"),
        (lambda: bd.McCallumFoster(bd.AdaptiveDormandPrince()), "no steps of its own"),
        (lambda: bd.AdaptiveDormandPrince().evaluations(0), "when its steps have been found"),
    ],
)
def test_impossible_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_without_torchdiffeq_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(UnsupportedError, match=r'pip install "backdrift\[adaptive\]"'):
        sampled(MixtureNetwork(LINEAR), bd.AdaptiveDormandPrince())
