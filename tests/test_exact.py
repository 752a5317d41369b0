"""The exact gradient: plain autograd's bits, and a run that behaves as one in PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backdrift.denoiser import Denoiser
from backdrift.errors import UnsupportedError
from backdrift.gradients import Exact, GradientMethod, Plain
from backdrift.grids import TimeGrid
from backdrift.sampling import Solution, sample
from backdrift.schedules import VP, Flow
from backdrift.solvers import RK4, AdamsBashforth, DPMSolverPP, Euler, Solver
from problems import ToyNetwork, toy_denoiser, toy_inputs
from tiny_pipelines import tiny_unet
from toy_runs import GRID, equal, toy_run

SOLVERS = {"euler": Euler(), "rk4": RK4(), "ab4": AdamsBashforth(4), "dpmpp": DPMSolverPP()}


class UNetNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unet = tiny_unet()

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return self.unet(x, 999 * t, cond).sample


@pytest.mark.parametrize(
    ("solver", "steps", "guidance_scale"),
    [
        (Euler(), 3, 1.0),
        (Euler(), 3, 4.0),
        (RK4(), 1, 4.0),
        (AdamsBashforth(2), 3, 1.0),
        (DPMSolverPP(), 3, 4.0),
    ],
)
def test_a_unet_gets_plain_autograds_bits_everywhere(
    solver: Solver, steps: int, guidance_scale: float
) -> None:
    network = UNetNetwork()
    grid = TimeGrid("uniform", steps, start=1.0, end=0.05)
    generator = torch.Generator().manual_seed(0)
    start, prompt = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 8, 16, generator=generator)
    empty = torch.randn(1, 8, 16, generator=generator)

    def run(gradient: GradientMethod) -> tuple[Tensor, list[Tensor | None], Solution]:
        network.zero_grad(set_to_none=True)
        x, c, u = (a.clone().requires_grad_() for a in (start, prompt, empty))
        model = Denoiser(network, VP.linear(), guidance_scale=guidance_scale, uncond=u)
        solution = sample(model, x, c, solver=solver, grid=grid, gradient=gradient)
        (solution.x0**2).mean().backward()
        return (
            solution.x0.detach(),
            [x.grad, c.grad, u.grad, *(p.grad for p in network.parameters())],
            solution,
        )

    state, plain, _ = run(Plain())
    assert sum(g is not None for g in plain) > 100
    calls = run(Exact("min"))[2].nfe
    for memory, redone in (("min", calls - 1), ("max", 0)):
        found, exact, solution = run(Exact(memory))
        assert torch.equal(found, state)
        assert equal(plain, exact) == []
        assert solution.stats.calls_redone == redone
        assert solution.stats.vjps == solution.nfe == calls


@pytest.mark.parametrize("memory", ["min", "max", "auto", "20kB"])
@pytest.mark.parametrize("name", SOLVERS)
def test_shared_weights_and_nested_cond_get_the_same_bits(name: str, memory: str) -> None:
    _, plain = toy_run(Plain(), solver=SOLVERS[name])
    solution, exact = toy_run(Exact(memory), solver=SOLVERS[name])
    assert equal(plain, exact) == []
    assert solution.stats.calls_redone == solution.nfe - solution.stats.calls_kept


def test_two_guidance_calls_get_the_same_bits_where_they_share_no_batch() -> None:
    _, uncond = toy_inputs()
    uncond = {**uncond, "note": "another string"}
    solution, exact = toy_run(Exact("min"), guidance_scale=3.0, uncond=uncond)
    _, plain = toy_run(Plain(), guidance_scale=3.0, uncond=uncond)
    assert solution.nfe == 2 * 2 * 5
    assert equal(plain, exact) == []


def test_dropout_is_redone_with_its_own_random_numbers() -> None:
    network = ToyNetwork(dropout=0.3).train()
    results = []
    for gradient in (Plain(), Exact("min"), Exact("max")):
        network.zero_grad(set_to_none=True)
        torch.manual_seed(7)
        results.append(toy_run(gradient, network))
        torch.rand(3)  # whatever the user draws in between
    for solution, grads in results[1:]:
        assert torch.equal(solution.x0, results[0][0].x0)
        assert equal(results[0][1], grads) == []


def test_autocast_is_redone_as_it_was() -> None:
    network = ToyNetwork(dtype=torch.float32)

    def run(gradient: GradientMethod, inside: bool) -> list[Tensor | None]:
        network.zero_grad(set_to_none=True)
        x, cond = toy_inputs(torch.float32)
        x.requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (sample(toy_denoiser(network), x, cond, grid=GRID, gradient=gradient).x0 ** 2).sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        return [x.grad, *(p.grad for p in network.parameters())]

    plain = run(Plain(), inside=False)
    assert equal(plain, run(Exact("min"), inside=False)) == []
    assert equal(plain, run(Exact("min"), inside=True)) == []


def test_half_precision_networks_keep_a_float32_state() -> None:
    network = ToyNetwork(dtype=torch.bfloat16)
    x, cond = toy_inputs(torch.bfloat16)
    seen = []

    def watching(x: Tensor, t: Tensor, c: Any) -> Tensor:
        seen.append((x.dtype, t.dtype))
        return network(x, t, c)

    x.requires_grad_()
    model = toy_denoiser(watching, dtype=torch.bfloat16)
    solution = sample(model, x, cond, solver=Euler(), grid=GRID, gradient=Exact("min"))
    assert solution.x0.dtype == torch.float32
    assert set(seen) == {(torch.bfloat16, torch.float32)}
    (solution.x0**2).sum().backward()
    reference = x.detach().float().requires_grad_()
    (sample(model, reference, cond, solver=Euler(), grid=GRID, gradient=Plain()).x0 ** 2).sum().backward()
    assert reference.grad is not None
    assert torch.equal(x.grad, reference.grad.bfloat16())


def test_gradients_match_finite_differences() -> None:
    network = ToyNetwork()
    x, cond = toy_inputs()

    def value(shift: float, which: str) -> float:
        moved = {"x": x, "prompt": cond["prompt"], "weight": network.shared.weight.data}
        with torch.no_grad():
            moved[which][1, 2] += shift
            out = (sample(toy_denoiser(network), x, cond, solver=RK4(), grid=GRID).x0 ** 3).sum()
            moved[which][1, 2] -= shift
        return float(out)

    numeric = {k: (value(1e-5, k) - value(-1e-5, k)) / 2e-5 for k in ("x", "prompt", "weight")}
    x.requires_grad_()
    cond["prompt"].requires_grad_()
    (
        sample(toy_denoiser(network), x, cond, solver=RK4(), grid=GRID, gradient=Exact("min")).x0 ** 3
    ).sum().backward()
    found = {"x": x.grad, "prompt": cond["prompt"].grad, "weight": network.shared.weight.grad}
    for key, grad in found.items():
        assert grad is not None
        assert float(grad[1, 2]) == pytest.approx(numeric[key], rel=1e-6)


def test_backward_behaves_as_in_pytorch() -> None:
    def grads(gradient: GradientMethod) -> dict[str, Any]:
        network = ToyNetwork()
        x, cond = toy_inputs()
        x.requires_grad_()
        solution = sample(toy_denoiser(network), x, cond, grid=GRID, gradient=gradient, trajectory=True)
        loss, other = (solution.x0**2).sum(), solution.x0.sum()
        out: dict[str, Any] = {}
        out["grad"] = torch.autograd.grad(loss, [x, network.scale], retain_graph=True)
        out["again"] = torch.autograd.grad(loss, [x, network.scale], retain_graph=True)
        out["latent"] = torch.autograd.grad(loss, solution.trajectory[2], retain_graph=True)
        out["some"] = torch.autograd.grad(loss, [network.enter.weight], retain_graph=True)
        loss.backward(retain_graph=True)
        out["once"] = [x.grad.clone(), *(p.grad.clone() for p in network.parameters())]
        other.backward()
        out["accumulated"] = [x.grad.clone(), *(p.grad.clone() for p in network.parameters())]
        with pytest.raises(RuntimeError, match="second time"):
            other.backward()
        return out

    plain, exact = grads(Plain()), grads(Exact("min"))
    for key, value in plain.items():
        assert equal(list(value), list(exact[key])) == [], key


def test_an_exception_in_a_hook_leaves_the_run_usable() -> None:
    network = ToyNetwork()
    x, cond = toy_inputs()
    x.requires_grad_()
    solution = sample(toy_denoiser(network), x, cond, grid=GRID, gradient=Exact("min"), trajectory=True)
    loss = (solution.x0**2).sum()

    def fail(grad: Tensor) -> None:
        raise ValueError("from the user")

    handle = solution.trajectory[2].register_hook(fail)
    with pytest.raises(ValueError, match="from the user"):
        loss.backward(retain_graph=True)
    handle.remove()
    assert network.scale.grad is None
    loss.backward()
    _, plain = toy_run(Plain(), solver=Euler())
    assert torch.equal(x.grad, plain[0])
    assert torch.equal(network.scale.grad, plain[3])


def test_hooks_on_weights_see_the_finished_gradient_once() -> None:
    network, seen = ToyNetwork(), []
    network.shared.weight.register_hook(lambda g: seen.append(g.clone()))
    toy_run(Exact("min"), network)
    assert len(seen) == 1
    assert torch.equal(seen[0], network.shared.weight.grad)


def test_second_derivatives_are_refused_and_plain_has_them() -> None:
    x, cond = toy_inputs()
    x.requires_grad_()
    loss = (sample(toy_denoiser(), x, cond, grid=GRID, gradient=Exact("min")).x0 ** 2).sum()
    with pytest.raises(UnsupportedError, match=r"Plain\(\)"):
        torch.autograd.grad(loss, x, create_graph=True)
    loss = (sample(toy_denoiser(), x, cond, grid=GRID, gradient=Plain()).x0 ** 2).sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    assert torch.autograd.grad(grad.sum(), x)[0].abs().max() > 0


def test_gradients_reach_weights_when_nothing_else_requires_them() -> None:
    def run(gradient: GradientMethod) -> list[Tensor | None]:
        network = ToyNetwork()
        x, _ = toy_inputs()
        model = Denoiser(network, Flow(), "flow_prediction")
        sample(model, x, None, grid=TimeGrid("uniform", 4), gradient=gradient).x0.sum().backward()
        return [p.grad for p in network.parameters()]

    assert equal(run(Plain()), run(Exact("min"))) == []
