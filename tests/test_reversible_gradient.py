"""gradient=Reversible(): plain autograd's gradients from states that are rebuilt, and what happens when they drift."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import backdrift as bd
from backdrift.conditioning import PerStep
from problems import ToyNetwork, toy_denoiser, toy_inputs
from reversible_runs import SOLVERS, difference, gradients, grid

STAGES = {"MF(Heun)": 2, "MF(Midpoint)": 2, "MF(RK4)": 4}


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
