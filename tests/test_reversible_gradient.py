"""gradient=Reversible(): plain autograd's gradients from states that are rebuilt, and what happens when they drift."""

from __future__ import annotations

import gc
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import backdrift as bd
from backdrift.conditioning import PerStep
from backdrift.errors import (
    InputError,
    MissingGradientError,
    NonFiniteError,
    StateChangedError,
    UnsupportedError,
)
from backdrift.gradients import GradientMethod
from backdrift.solvers import RK4, Euler, Midpoint, ReversibleSolver
from live_bytes import LiveBytes
from problems import ToyNetwork, toy_denoiser, toy_inputs

SOLVERS: dict[str, ReversibleSolver] = {
    "MF(Euler)": bd.McCallumFoster(Euler()),
    "MF(Heun)": bd.McCallumFoster(),
    "MF(Midpoint)": bd.McCallumFoster(Midpoint()),
    "MF(RK4)": bd.McCallumFoster(RK4()),
    "EDICT": bd.EDICT(),
    "ReversibleHeun": bd.ReversibleHeun(),
}
STAGES = {"MF(Heun)": 2, "MF(Midpoint)": 2, "MF(RK4)": 4}


def grid(steps: int) -> bd.TimeGrid:
    return bd.TimeGrid("logsnr", steps, start=1.0, end=0.02)


def gradients(
    gradient: GradientMethod,
    solver: ReversibleSolver,
    steps: int = 10,
    *,
    network: Any = None,
    dtype: torch.dtype = torch.float64,
    trajectory: bool = False,
    guidance_scale: float = 3.0,
) -> tuple[bd.Solution, list[Tensor]]:
    """A guided run of the toy network, differentiated by a pair, both conditionings and all weights; with the
    trajectory also by a pair on the way."""
    network = network if network is not None else ToyNetwork(dtype=torch.float64).to(dtype)
    x, cond = toy_inputs(dtype)
    _, uncond = toy_inputs(dtype)
    uncond["prompt"] = -uncond["prompt"]
    leaves = [x, 0.9 * x, cond["prompt"], cond["more"][0], uncond["prompt"]]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    leaves += list(network.parameters())
    model = toy_denoiser(network, guidance_scale=guidance_scale, uncond=uncond)
    pair = bd.Pair(leaves[0], leaves[1])
    solution = bd.sample(
        model, pair, cond, solver=solver, grid=grid(steps), gradient=gradient, trajectory=trajectory
    )
    assert solution.pair is not None
    loss = (solution.x0**3).sum() + solution.pair.second.sin().sum()
    if trajectory:
        assert solution.pairs is not None
        leaves += solution.pairs[steps // 2]
    return solution, list(torch.autograd.grad(loss, leaves))


def difference(found: list[Tensor], known: list[Tensor]) -> float:
    """The largest relative one, over all gradients."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, known, strict=True))


@pytest.mark.parametrize("stages", ["together", "apart"])
@pytest.mark.parametrize("name", SOLVERS)
def test_it_equals_plain_autograd_everywhere(name: str, stages: str) -> None:
    solver = SOLVERS[name]
    _, plain = gradients(bd.Plain(), solver)
    for checkpoints in (0, 3):
        method = bd.Reversible(checkpoints=checkpoints, stages=stages)
        solution, found = gradients(method, solver)
        assert difference(found, plain) <= 1e-9
        assert solution.stats.drift is not None
        assert 0 < solution.stats.drift <= 1e-11
        assert not solution.stats.fell_back


@pytest.mark.parametrize("name", SOLVERS)
def test_a_pair_on_the_way_gets_plain_autograds_gradient(name: str) -> None:
    """The states exist, so nothing drifts; Reversible Heun's shared slope counts as given, as in plain autograd."""
    _, plain = gradients(bd.Plain(), SOLVERS[name], trajectory=True)
    solution, found = gradients(bd.Reversible(), SOLVERS[name], trajectory=True)
    assert difference(found, plain) <= 1e-9
    assert solution.stats.drift is None


@pytest.mark.parametrize("name", SOLVERS)
def test_the_way_back_calls_the_network_as_often_as_the_way_there(name: str) -> None:
    stages, steps = STAGES.get(name, 1), 12
    forward = steps + 1 if name == "ReversibleHeun" else 2 * stages * steps
    together, _ = gradients(bd.Reversible(), SOLVERS[name], steps)
    apart, _ = gradients(bd.Reversible(stages="apart"), SOLVERS[name], steps)
    for solution in (together, apart):
        assert solution.stats.calls_forward == solution.nfe == forward
        assert solution.stats.vjps == forward
    assert together.stats.calls_redone == forward
    assert apart.stats.calls_redone == forward * (2 * stages - 1) // stages


def test_gradients_match_finite_differences() -> None:
    network = ToyNetwork()
    x, cond = toy_inputs()

    def value(shift: float, which: str) -> float:
        moved = {"x": x, "prompt": cond["prompt"], "weight": network.shared.weight.data}
        with torch.no_grad():
            moved[which][1, 2] += shift
            out = bd.sample(toy_denoiser(network), x, cond, solver=bd.EDICT(), grid=grid(8)).x0
            moved[which][1, 2] -= shift
        return float((out**3).sum())

    numeric = {k: (value(1e-5, k) - value(-1e-5, k)) / 2e-5 for k in ("x", "prompt", "weight")}
    x.requires_grad_()
    cond["prompt"].requires_grad_()
    found = bd.sample(
        toy_denoiser(network), x, cond, solver=bd.EDICT(), grid=grid(8), gradient=bd.Reversible()
    )
    (found.x0**3).sum().backward()
    for key, grad in {
        "x": x.grad,
        "prompt": cond["prompt"].grad,
        "weight": network.shared.weight.grad,
    }.items():
        assert grad is not None
        assert float(grad[1, 2]) == pytest.approx(numeric[key], rel=1e-6)


@pytest.mark.parametrize("name", ["MF(Heun)", "EDICT", "ReversibleHeun"])
def test_encoding_is_differentiated_by_sampling(name: str) -> None:
    """The gradient of the encoded pair by the picture, conditioning and weights: states rebuilt the other way."""
    results = []
    for method in (bd.Plain(), bd.Reversible()):
        network = ToyNetwork()
        x, cond = toy_inputs()
        leaves = [x.requires_grad_(), cond["prompt"].requires_grad_(), *network.parameters()]
        pair = bd.encode(toy_denoiser(network), x, cond, solver=SOLVERS[name], grid=grid(10), gradient=method)
        loss = (pair.first**2).sum() + pair.second.sin().sum()
        results.append([g for g in torch.autograd.grad(loss, leaves, allow_unused=True) if g is not None])
    assert difference(results[1], results[0]) <= 1e-9


@pytest.mark.parametrize("form", ["original", "exponential", "data"])
def test_steps_beside_singular_ends_are_undone_too(form: str) -> None:
    """A flow from t = 1 to t = 0."""
    for name in ("MF(Heun)", "EDICT", "ReversibleHeun"):
        results = []
        for method in (bd.Plain(), bd.Reversible()):
            network = ToyNetwork()
            x, cond = toy_inputs()
            leaves = [x.requires_grad_(), cond["prompt"].requires_grad_(), *network.parameters()]
            model = bd.Denoiser(network, bd.Flow(), "flow_prediction")
            how: dict[str, Any] = {"solver": SOLVERS[name], "grid": bd.TimeGrid("uniform", 8), "form": form}
            solution = bd.sample(model, x, cond, gradient=method, **how)
            results.append(list(torch.autograd.grad((solution.x0**2).sum(), leaves)))
        assert difference(results[1], results[0]) <= 1e-9


def test_conditioning_per_step_gets_a_gradient_for_each_step() -> None:
    for name in ("MF(Heun)", "ReversibleHeun"):
        results = []
        for method in (bd.Plain(), bd.Reversible()):
            x, _ = toy_inputs()
            conds = [toy_inputs()[1] for _ in range(6)]
            for i, cond in enumerate(conds):
                cond["prompt"] = (cond["prompt"] * (1 + i)).requires_grad_()
            model = toy_denoiser(ToyNetwork().requires_grad_(False))
            solution = bd.sample(
                model, x, PerStep(conds), solver=SOLVERS[name], grid=grid(6), gradient=method
            )
            leaves = [cond["prompt"] for cond in conds]
            results.append(list(torch.autograd.grad((solution.x0**2).sum(), leaves)))
        assert difference(results[1], results[0]) <= 1e-9


@pytest.mark.parametrize("name", SOLVERS)
def test_in_float32_the_drift_is_measured_and_the_gradient_is_near_plain_autograds(name: str) -> None:
    _, plain = gradients(bd.Plain(), SOLVERS[name], 50, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution, found = gradients(bd.Reversible(), SOLVERS[name], 50, dtype=torch.float32)
    assert solution.stats.drift is not None
    assert 1e-8 < solution.stats.drift < 1e-4
    assert difference(found, plain) < 1e-4
    assert solution.stats.as_dict()["drift"] == solution.stats.drift


def test_beyond_the_tolerance_it_says_so_and_falls_back_to_stored_states() -> None:
    """EDICT's rounding grows by p^(-2N), here 2e11: nothing is left of float32 states."""
    solver, steps = bd.EDICT(0.85), 80
    _, plain = gradients(bd.Plain(), solver, steps, dtype=torch.float32)
    loose = bd.Reversible(1e30, checkpoints=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drifted, wrong = gradients(loose, solver, steps, dtype=torch.float32)
    assert drifted.stats.drift is not None
    assert drifted.stats.drift > 0.01
    assert difference(wrong, plain) > 1e-3
    with pytest.warns(RuntimeWarning, match=r"undoing 80 steps of EDICT.*the tolerance is 0\.001") as caught:
        solution, found = gradients(bd.Reversible(checkpoints=0), solver, steps, dtype=torch.float32)
    assert difference(found, plain) < 2e-5
    assert solution.stats.fell_back
    shown = re.search(r"off by ([\d.e+-]+) ", str(caught[0].message))
    assert shown is not None
    assert float(shown.group(1)) == pytest.approx(solution.stats.drift, rel=0.06)
    # Undone once in vain, computed once more, undone again from stored states.
    assert solution.stats.calls_redone == 3 * 2 * steps


def test_states_that_are_lost_altogether_fall_back_as_well() -> None:
    """With p = 0.5 the rebuilt states are infinite or NaN after 100 steps; no NaN reaches the gradient."""
    solver, steps = bd.EDICT(0.5), 100
    _, plain = gradients(bd.Plain(), solver, steps, dtype=torch.float32)
    with pytest.warns(RuntimeWarning, match="undoing 100 steps"):
        solution, found = gradients(bd.Reversible(checkpoints=0), solver, steps, dtype=torch.float32)
    assert solution.stats.drift is not None
    assert not solution.stats.drift <= 1
    assert difference(found, plain) < 1e-4


def test_a_tight_tolerance_and_checkpoints_between() -> None:
    """The states between two checkpoints are as near as those of so many steps."""
    drifts = []
    for checkpoints in (0, 1, 7):
        solution, _ = gradients(
            bd.Reversible(checkpoints=checkpoints), SOLVERS["MF(Euler)"], 64, dtype=torch.float32
        )
        drifts.append(solution.stats.drift or 0.0)
    assert drifts[0] > 2 * drifts[1] > 4 * drifts[2] > 0
    with pytest.warns(RuntimeWarning, match="starts anew from stored states"):
        solution, _ = gradients(bd.Reversible(1e-9), SOLVERS["MF(Euler)"], 16, dtype=torch.float32)
    assert solution.stats.fell_back


class WideNetwork(nn.Module):
    """Few weights, wide states: what a run holds is states."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return torch.tanh(self.scale * x)


def peak(gradient: GradientMethod, solver: ReversibleSolver, steps: int) -> int:
    """Most bytes of tensors alive in a run and its backward pass, in units of one state."""
    x = torch.randn(1, 1 << 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    model = bd.Denoiser(WideNetwork(), bd.VP.linear())

    def work() -> None:
        x.grad = None
        solution = bd.sample(model, x, solver=solver, grid=grid(steps), gradient=gradient)
        (solution.x0**2).sum().backward()

    work()
    gc.collect()
    gc.disable()  # what a cycle keeps alive is counted
    try:
        with LiveBytes() as live:
            work()
    finally:
        gc.enable()
    assert live.left < 1.1 * x.nbytes  # x.grad
    return round(live.peak / x.nbytes)


@pytest.mark.parametrize("name", ["MF(Heun)", "EDICT", "ReversibleHeun"])
def test_memory_does_not_grow_with_the_steps_not_even_by_the_states(name: str) -> None:
    solver = SOLVERS[name]
    few, many = (peak(bd.Reversible(), solver, steps) for steps in (8, 24))
    assert many <= few + 1
    assert peak(bd.Exact("min"), solver, 24) > peak(bd.Exact("min"), solver, 8) + 14


def test_stages_apart_hold_one_graph_at_a_time() -> None:
    together, apart = (peak(bd.Reversible(stages=s), SOLVERS["MF(RK4)"], 8) for s in ("together", "apart"))
    assert apart < together


def test_dropout_and_autocast_are_as_they_were() -> None:
    network = ToyNetwork(dropout=0.3).train()
    for name in ("MF(Heun)", "ReversibleHeun"):
        results = []
        for method in (bd.Plain(), bd.Reversible()):
            torch.manual_seed(7)
            results.append(gradients(method, SOLVERS[name], network=network)[1])
            torch.rand(3)  # whatever the user draws in between
        assert difference(results[1], results[0]) <= 1e-9
    half = []
    for method in (bd.Plain(), bd.Reversible()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half.append(gradients(method, SOLVERS["MF(Heun)"], dtype=torch.float32)[1])
    # bfloat16 rounds what rebuilt states differ by to 2^-8 where they fall on different sides.
    assert difference(half[1], half[0]) < 0.05


def test_two_guidance_calls_and_none() -> None:
    for scale in (1.0, 4.0):
        results = []
        for method in (bd.Plain(), bd.Reversible()):
            network = ToyNetwork()
            x, cond = toy_inputs()
            _, uncond = toy_inputs()
            uncond["note"] = "another string, so that the two share no batch"
            cond["prompt"].requires_grad_()
            model = toy_denoiser(network, guidance_scale=scale, uncond=uncond)
            solution = bd.sample(model, x, cond, solver=bd.McCallumFoster(), grid=grid(6), gradient=method)
            leaves = [cond["prompt"], *network.parameters()]
            results.append(list(torch.autograd.grad((solution.x0**2).sum(), leaves)))
        assert difference(results[1], results[0]) <= 1e-9


def test_backward_twice_and_in_part() -> None:
    network = ToyNetwork()
    x, cond = toy_inputs()
    x.requires_grad_()
    solution = bd.sample(
        toy_denoiser(network), x, cond, solver=bd.EDICT(), grid=grid(6), gradient=bd.Reversible()
    )
    loss = (solution.x0**2).sum()
    (only,) = torch.autograd.grad(loss, x, retain_graph=True)
    both = torch.autograd.grad(loss, [x, network.scale], retain_graph=True)
    loss.backward()
    assert x.grad is not None
    assert network.scale.grad is not None
    assert torch.equal(only, x.grad)
    assert torch.equal(both[0], x.grad)
    assert torch.equal(both[1], network.scale.grad)


def test_only_weights_or_nothing_at_all() -> None:
    network = ToyNetwork()
    x, cond = toy_inputs()
    results = []
    for method in (bd.Plain(), bd.Reversible()):
        solution = bd.sample(toy_denoiser(network), x, cond, solver=bd.EDICT(), grid=grid(6), gradient=method)
        results.append(list(torch.autograd.grad((solution.x0**2).sum(), list(network.parameters()))))
    assert difference(results[1], results[0]) <= 1e-9
    network.requires_grad_(False)
    solution = bd.sample(
        toy_denoiser(network), x, cond, solver=bd.EDICT(), grid=grid(6), gradient=bd.Reversible()
    )
    assert not solution.x0.requires_grad
    with torch.no_grad():
        again = bd.sample(toy_denoiser(network), x, cond, solver=bd.EDICT(), grid=grid(6)).x0
    assert torch.equal(solution.x0, again)


@pytest.mark.parametrize("solver", [Euler(), RK4(), bd.AdamsBashforth(4), bd.DPMSolverPP()])
def test_solvers_that_cannot_be_undone_are_refused_by_name(solver: Any) -> None:
    x, cond = toy_inputs()
    with pytest.raises(InputError, match=re.escape(repr(solver)) + " cannot be undone"):
        bd.sample(toy_denoiser(), x, cond, solver=solver, grid=grid(4), gradient=bd.Reversible())


def test_times_that_require_grad_are_refused() -> None:
    x, cond = toy_inputs()
    times = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64, requires_grad=True)
    how: dict[str, Any] = {"solver": bd.EDICT(), "grid": bd.TimeGrid(times), "gradient": bd.Reversible()}
    for run in (bd.sample, bd.encode):
        with pytest.raises(UnsupportedError, match="no gradient by the grid's times"):
            run(toy_denoiser(), x, cond, **how)


def test_impossible_settings_are_refused() -> None:
    for settings in ({"tolerance": 0}, {"checkpoints": -1}, {"checkpoints": 1.5}, {"stages": "all"}):
        with pytest.raises(InputError, match=next(iter(settings))):
            bd.Reversible(**settings)  # type: ignore[arg-type]


def test_no_gradient_is_lost_in_silence() -> None:
    x, cond = toy_inputs()
    x.requires_grad_()
    hidden = torch.ones(4, dtype=torch.float64, requires_grad=True) * 2
    inner = ToyNetwork()

    def closed_over(x: Tensor, t: Tensor, c: Any) -> Tensor:
        return inner(x, t, c) + hidden

    with pytest.raises(MissingGradientError, match="hidden"):
        bd.sample(
            toy_denoiser(closed_over), x, cond, solver=bd.EDICT(), grid=grid(4), gradient=bd.Reversible()
        )

    def edited(solution: bd.Solution) -> None:
        with torch.no_grad():
            inner.scale += 1
        solution.x0.sum().backward()

    solution = bd.sample(
        toy_denoiser(inner), x, cond, solver=bd.EDICT(), grid=grid(4), gradient=bd.Reversible()
    )
    with pytest.raises(StateChangedError, match="scale was modified in place"):
        edited(solution)
    solution = bd.sample(
        toy_denoiser(inner), x, cond, solver=bd.EDICT(), grid=grid(4), gradient=bd.Reversible()
    )
    with pytest.raises(UnsupportedError, match="first derivatives only"):
        torch.autograd.grad(solution.x0.sum(), x, create_graph=True)


class Spoiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * float("nan")


def test_a_gradient_that_is_not_finite_names_the_step() -> None:
    x, _ = toy_inputs()
    x.requires_grad_()

    def network(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return Spoiled.apply(x) if 0.3 < float(t[0]) < 0.5 else x

    times = [0.9, 0.7, 0.45, 0.2]
    solution = bd.sample(toy_denoiser(network), x, solver=bd.EDICT(), grid=times, gradient=bd.Reversible())
    with pytest.raises(NonFiniteError, match=r"step 3 of 3 \(from t = 0\.45 to 0\.2\)"):
        solution.x0.sum().backward()
