"""The continuous adjoint by adaptive steps: the tolerance met, sums of the accepted steps, each call made once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from backdrift.denoiser import Denoiser
from backdrift.forms import Form
from backdrift.gradients import ContinuousAdjoint, Plain
from backdrift.grids import TimeGrid
from backdrift.sampling import sample
from backdrift.solvers import (
    RK4,
    AdaptiveDormandPrince,
    DormandPrince,
)
from backdrift.solvers.adaptive import Witness, accepted_steps
from continuous_runs import errors, loss, mixture_truth, run
from problems import (
    SCHEDULES,
    MixtureNetwork,
    condition,
    smooth_grid,
    start_state,
)


@pytest.mark.parametrize("trajectory", ["stored", "recompute"])
def test_adaptive_steps_meet_the_tolerance_and_stay_inside(trajectory: Any) -> None:
    pytest.importorskip("torchdiffeq")
    asked: list[float] = []

    class Watched(MixtureNetwork):
        def __init__(self, schedule: Any, prediction: str) -> None:
            super().__init__(schedule, prediction, width=1.0)

        def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            asked.append(float(t[0]))
            return super().forward(x, t, cond)

    found = []
    for tolerance in (1e-4, 1e-7):
        method = ContinuousAdjoint(AdaptiveDormandPrince(tolerance, tolerance), trajectory=trajectory)
        gradient, _ = run("linear", 120, method, Watched, solver=RK4())
        found.append(max(errors(gradient, mixture_truth())))
    assert found[0] < 5e-3
    assert found[1] < 1e-5
    # torchdiffeq steps past the end unless it is told where that is.
    assert min(asked) >= 0.05 - 1e-12
    assert max(asked) <= 0.6 + 1e-12


def test_an_adaptive_way_back_does_not_depend_on_the_losss_size() -> None:
    """The tolerance is relative to the adjoint, so a loss in other units takes the same steps."""
    pytest.importorskip("torchdiffeq")
    schedule, network = SCHEDULES["linear"], MixtureNetwork(SCHEDULES["linear"]).requires_grad_(False)
    x = start_state(schedule, 1.0).requires_grad_()
    results = []
    for size in (1.0, 1e-9):
        solution = sample(
            Denoiser(network, schedule), x, condition(), solver=RK4(), grid=smooth_grid("linear", 40),
            form="exponential", gradient=ContinuousAdjoint(AdaptiveDormandPrince(1e-5, 1e-5)),
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(size * loss(solution.x0), x)
        results.append((gradient / size, solution.stats.vjps))
    assert results[0][1] == results[1][1]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-9, atol=0)


class Steps:
    """Wraps the search for steps: notes the steps it accepts, and how many it rejects."""

    def __init__(self) -> None:
        self.clocks: list[list[float]] = []
        self.rejected = 0

    def __call__(self, *args: Any, witness: Any = None, **settings: Any) -> Any:
        steps, inner = self, witness

        class Between(Witness):
            def begun(self) -> None:
                inner.begun()

            def attempted(self) -> None:
                inner.attempted()

            def accepted(self, step: float) -> None:
                inner.accepted(step)

            def rejected(self) -> None:
                steps.rejected += 1
                inner.rejected()

        found = accepted_steps(*args, witness=Between(), **settings)
        self.clocks.append(found.clocks)
        return found


@pytest.mark.parametrize("trajectory", ["stored", "recompute"])
@pytest.mark.parametrize("form", ["exponential", "original", "data"])
def test_adaptive_sums_are_those_of_the_accepted_steps(
    trajectory: Any, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x_T's, cond's and the weights' gradients are Dormand and Prince's method's on the same steps, those that were
    rejected on the way have left nothing behind, and no evaluation was made twice."""
    pytest.importorskip("torchdiffeq")
    steps = Steps()
    monkeypatch.setattr("backdrift.gradients.equation.accepted_steps", steps)
    solver = AdaptiveDormandPrince(1e-6, 1e-6)

    def narrow(schedule: Any, prediction: str) -> MixtureNetwork:
        return MixtureNetwork(schedule, prediction, width=0.3)

    adaptive, run_ = run("linear", 40, ContinuousAdjoint(solver, form, trajectory), narrow, solver=RK4())
    (clocks,) = steps.clocks
    if (form, trajectory) == ("original", "stored"):
        assert steps.rejected > 0  # else nothing is tested
    accepted, attempted = len(clocks) - 1, len(clocks) - 1 + steps.rejected
    assert run_.stats.vjps == 2 + 6 * attempted
    assert run_.stats.calls_redone == run_.stats.vjps
    inner = [Form(form, SCHEDULES["linear"], "epsilon").between(s).t for s in clocks[1:-1]]
    grid = TimeGrid([float(run_.times[0]), *reversed(inner), float(run_.times[-1])])
    fixed, other = run(
        "linear", 40, ContinuousAdjoint(DormandPrince(), form, trajectory, grid), narrow, solver=RK4()
    )
    assert other.stats.vjps == 6 * accepted
    for one, two in zip(adaptive, fixed, strict=True):
        assert float(one.norm()) > 0
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9 * float(two.norm()))


@pytest.mark.parametrize("trajectory", ["stored", "recompute"])
def test_an_adaptive_run_makes_each_call_once(trajectory: Any) -> None:
    """The search is the forward pass; and whether weights are asked for changes no call."""
    pytest.importorskip("torchdiffeq")
    schedule, solver = SCHEDULES["linear"], AdaptiveDormandPrince(1e-5, 1e-5)
    x, counts = start_state(schedule, 0.9), []
    for wanted in (True, False):
        network = MixtureNetwork(schedule, width=1.0).requires_grad_(wanted)
        model, leaf, c = Denoiser(network, schedule), x.clone().requires_grad_(), condition()
        settings: dict[str, Any] = {"solver": solver, "grid": [0.9, 0.01]}
        with torch.no_grad():
            search = sample(model, leaf, c, **settings)
        method = ContinuousAdjoint(solver, trajectory=trajectory)
        found = sample(model, leaf, c, gradient=method, **settings)
        assert torch.equal(found.x0, search.x0)
        assert torch.equal(found.times, search.times)
        assert found.nfe == found.stats.calls_forward == search.nfe
        loss(found.x0).backward()
        assert (found.stats.vjps - 1) % 6 == 0  # the run's own last step is tried first
        assert found.stats.calls_redone == found.stats.vjps
        counts.append(found.stats.vjps)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("trajectory", ["stored", "recompute"])
def test_adaptive_both_ways_approaches_the_flows_gradient(trajectory: Any) -> None:
    """The error falls with the tolerance."""
    pytest.importorskip("torchdiffeq")
    found = []
    for tolerance in (1e-4, 1e-6, 1e-8):
        solver = AdaptiveDormandPrince(tolerance, tolerance)
        gradient, _ = run(
            "linear", 2, ContinuousAdjoint(solver, trajectory=trajectory), solver=solver, grid=[0.6, 0.05]
        )
        found.append(max(errors(gradient, mixture_truth())))
    assert found[0] < 5e-3
    assert found[1] < 1e-4
    assert found[2] < 2e-6


def test_an_adaptive_run_hands_its_latents_out() -> None:
    pytest.importorskip("torchdiffeq")
    schedule, network = SCHEDULES["linear"], MixtureNetwork(SCHEDULES["linear"], width=1.0)
    solver, results = AdaptiveDormandPrince(1e-7, 1e-7), []
    for method in (ContinuousAdjoint(solver), Plain()):
        x, c = start_state(schedule, 0.6).requires_grad_(), condition().requires_grad_()
        solution = sample(
            Denoiser(network, schedule), x, c, solver=solver, grid=[0.6, 0.3, 0.05], gradient=method, trajectory=True
        )  # fmt: skip
        assert solution.trajectory is not None
        value = loss(solution.x0) + solution.trajectory[len(solution.times) // 2].sin().sum()
        results.append(torch.autograd.grad(value, [x, c, network.means]))
    assert max(errors(list(results[0]), list(results[1]))) < 1e-5
