"""What all whole-run gradient methods have in common: manners of autograd, modes, errors, memory."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backdrift.denoiser import Denoiser
from backdrift.errors import MissingGradientError, NonFiniteError, StateChangedError, UnsupportedError
from backdrift.gradients import (
    AdjointDEIS,
    ContinuousAdjoint,
    Exact,
    GradientMethod,
    Plain,
    SymplecticAdjoint,
)
from backdrift.grids import TimeGrid
from backdrift.sampling import Solution, sample
from backdrift.schedules import Flow
from backdrift.solvers import RK4, Heun
from peak_memory import TanhStack, peak_of_run
from problems import ToyNetwork, toy_denoiser, toy_inputs

METHODS: dict[str, GradientMethod] = {
    "symplectic": SymplecticAdjoint(),
    "symplectic stored": SymplecticAdjoint("stored"),
    "continuous": ContinuousAdjoint(Heun()),
    "continuous recompute": ContinuousAdjoint(RK4(), trajectory="recompute"),
    "deis 1": AdjointDEIS(1),
    "deis 2M": AdjointDEIS(2),
    "deis 2S": AdjointDEIS(2, "S"),
    "deis recompute": AdjointDEIS(2, trajectory="recompute"),
}
GRID = TimeGrid("uniform", steps=5, start=1.0, end=0.05)
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def toy_run(method: GradientMethod, network: Any = None, **settings: Any) -> tuple[Solution, list[Tensor]]:
    """A run and its leaves: x_T, both tensors of cond."""
    x, cond = toy_inputs(settings.pop("dtype", torch.float64))
    leaves = [x, cond["prompt"], cond["more"][0]]
    for leaf in leaves:
        leaf.requires_grad_()
    settings = {"solver": Heun(), "grid": GRID, **settings}
    model = toy_denoiser(network if network is not None else ToyNetwork())
    return sample(model, x, cond, gradient=method, **settings), leaves


@each_method
def test_backward_behaves_as_in_pytorch(method: GradientMethod) -> None:
    network = ToyNetwork()
    solution, (x, *_) = toy_run(method, network)
    loss, other = (solution.x0**2).sum(), solution.x0.sum()
    first = torch.autograd.grad(loss, [x, network.scale], retain_graph=True)
    again = torch.autograd.grad(loss, [x, network.scale], retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    (weight,) = torch.autograd.grad(loss, [network.enter.weight], retain_graph=True)
    (alone,) = torch.autograd.grad(other, x, retain_graph=True)
    loss.backward(retain_graph=True)
    torch.testing.assert_close(x.grad, first[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(network.enter.weight.grad, weight, rtol=1e-12, atol=1e-14)
    other.backward()
    torch.testing.assert_close(x.grad, first[0] + alone, rtol=1e-12, atol=1e-14)
    with pytest.raises(RuntimeError, match="second time"):
        other.backward()


@each_method
def test_a_latent_on_the_way_gets_the_gradient_of_the_run_from_there(method: GradientMethod) -> None:
    network = ToyNetwork()
    solution, _ = toy_run(method, network, trajectory=True)
    assert solution.trajectory is not None
    (found,) = torch.autograd.grad((solution.x0**2).sum(), solution.trajectory[2])
    latent = solution.trajectory[2].detach().requires_grad_()
    _, cond = toy_inputs()
    rest = sample(
        toy_denoiser(network),
        latent,
        cond,
        solver=Heun(),
        grid=solution.times[2:],
        gradient=method,
        trajectory=True,
    )
    (expected,) = torch.autograd.grad((rest.x0**2).sum(), latent)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@each_method
def test_second_derivatives_and_transforms_are_refused(method: GradientMethod) -> None:
    solution, (x, *_) = toy_run(method)
    with pytest.raises(UnsupportedError, match=r"Plain\(\)"):
        torch.autograd.grad((solution.x0**2).sum(), x, create_graph=True)

    def value(x: Tensor) -> Tensor:
        return (sample(toy_denoiser(), x, toy_inputs()[1], grid=GRID, gradient=method).x0 ** 2).sum()

    with pytest.raises(UnsupportedError, match=r"torch\.func"):
        torch.func.grad(value)(toy_inputs()[0])


def test_plain_works_inside_transforms_and_exact_says_it_does_not() -> None:
    def value(x: Tensor, method: GradientMethod) -> Tensor:
        return (sample(toy_denoiser(), x, toy_inputs()[1], grid=GRID, gradient=method).x0 ** 2).sum()

    x = toy_inputs()[0]
    found = torch.func.grad(value)(x, Plain())
    (expected,) = torch.autograd.grad(value(x.requires_grad_(), Plain()), x)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    with pytest.raises(UnsupportedError, match=r"torch\.func"):
        torch.func.grad(value)(x.detach(), Exact("min"))


@each_method
def test_hooks_on_weights_see_the_finished_gradient_once(method: GradientMethod) -> None:
    network, seen = ToyNetwork(), []
    network.shared.weight.register_hook(lambda g: seen.append(g.clone()))
    solution, _ = toy_run(method, network)
    (solution.x0**2).sum().backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], network.shared.weight.grad)


@pytest.mark.parametrize("stages", ["recompute", "stored"])
def test_dropout_is_redone_with_its_own_random_numbers(stages: Any) -> None:
    network = ToyNetwork(dropout=0.3).train()
    results = []
    for method in (Plain(), SymplecticAdjoint(stages)):
        torch.manual_seed(7)
        solution, leaves = toy_run(method, network)
        torch.rand(3)
        results.append(torch.autograd.grad((solution.x0**2).sum(), [*leaves, *network.parameters()]))
    for plain, found in zip(*results, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("inside", [False, True])
def test_autocast_is_redone_as_it_was(inside: bool) -> None:
    network = ToyNetwork(dtype=torch.float32)
    results = []
    for method in (Plain(), SymplecticAdjoint()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            solution, leaves = toy_run(method, network, dtype=torch.float32)
            loss = (solution.x0**2).sum()
            if inside:
                results.append(torch.autograd.grad(loss, [*leaves, *network.parameters()]))
        if not inside:
            results.append(torch.autograd.grad(loss, [*leaves, *network.parameters()]))
    # The same bfloat16 products, each with a cotangent scaled by the step before it is rounded.
    for plain, found in zip(*results, strict=True):
        assert float((found - plain).norm() / plain.norm()) < 2e-2


def test_float16_with_a_gradient_scaler() -> None:
    """A scale that fits gives the gradient; one that overflows leaves infinities, and the scaler skips the step."""
    network = ToyNetwork(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.float16):
        solution, (x, *_) = toy_run(Plain(), network, dtype=torch.float32)
        loss = (solution.x0**2).sum()
    expected = torch.autograd.grad(64 * loss, x)[0] / 64

    def scaled(scale: float) -> tuple[torch.amp.GradScaler, torch.optim.Optimizer, Tensor]:
        network.zero_grad(set_to_none=True)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with torch.autocast("cpu", dtype=torch.float16):
            solution, (x, *_) = toy_run(SymplecticAdjoint(), network, dtype=torch.float32)
            loss = (solution.x0**2).sum()
        scaler.scale(loss).backward()
        assert x.grad is not None
        return scaler, optimizer, x.grad / scale

    _, _, found = scaled(64.0)
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    before = network.scale.detach().clone()
    with pytest.warns(RuntimeWarning, match="became NaN or infinite in the backward pass"):
        scaler, optimizer, _ = scaled(2.0**24)
    scaler.step(optimizer)
    assert torch.equal(network.scale, before)


@each_method
def test_half_precision_gradients_are_summed_in_float32(method: GradientMethod) -> None:
    """x0 = x_T - Σ h w, so dL/dw = -1 a pixel. 400 addends of 1/400 come to a standstill when summed in bfloat16."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))

        def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
            return 0 * x + self.w

    network = Constant()
    solution = sample(
        Denoiser(network, Flow(), "flow_prediction"), torch.ones(1, 3), grid=TimeGrid("uniform", 400, end=0.001),
        gradient=method if not isinstance(method, AdjointDEIS) else ContinuousAdjoint(Heun(), "original"),
    )  # fmt: skip
    solution.x0.sum().backward()
    assert network.w.grad is not None
    assert network.w.grad.dtype == torch.bfloat16
    torch.testing.assert_close(network.w.grad.float(), -torch.ones(3), rtol=2**-8, atol=0)


class Spoiled(torch.autograd.Function):
    """The identity, with a gradient that is NaN where asked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spoil: bool) -> Tensor:
        ctx.spoil = spoil
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return (grads[0] * torch.nan if ctx.spoil else grads[0]), None


@each_method
@pytest.mark.parametrize("what", ["x", "weight"])
def test_a_non_finite_value_is_reported_with_its_step_and_quantity(method: GradientMethod, what: str) -> None:
    class Network(ToyNetwork):
        def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
            here = 0.3 < float(t[0]) < 0.55
            out = super().forward(Spoiled.apply(x, here) if what == "x" else x, t, cond)
            return out + Spoiled.apply(self.scale, here and what == "weight") * 0.1

    network = Network()
    solution, _ = toy_run(method, network)
    message = "adjoint dL/dx became NaN" if what == "x" else r"gradient of 'scale'.* became NaN"
    if what == "x" and isinstance(
        method, ContinuousAdjoint
    ):  # its integrals see the spoiled slope in the same step
        message += "|conditioning tensor 0 .* became NaN"
    with pytest.raises(NonFiniteError, match=message) as caught:
        (solution.x0**2).sum().backward()
    # t = 0.43 lies between the steps 3 (0.62 to 0.43) and 4 (0.43 to 0.24).
    assert "in step 3 of 5" in str(caught.value) or "in step 4 of 5" in str(caught.value)
    assert network.enter.weight.grad is None  # nothing was handed over


@each_method
def test_a_gradient_that_would_be_lost_raises_by_name(method: GradientMethod) -> None:
    base = torch.full((4,), 0.3, dtype=torch.float64, requires_grad=True)
    style = base * 2
    with pytest.raises(MissingGradientError, match="'style'"):
        toy_run(method, lambda x, t, c: -x + style)

    late = torch.full((4,), 0.3, dtype=torch.float64, requires_grad=True)
    solution, _ = toy_run(
        method, lambda x, t, c: -x * c["prompt"].mean() + (late if float(t[0]) < 0.5 else 0.0)
    )
    with pytest.raises(MissingGradientError, match="'late'"):
        solution.x0.sum().backward()


@each_method
def test_a_leaf_that_the_network_closes_over_gets_its_gradient(method: GradientMethod) -> None:
    bias = torch.full((4,), 0.3, dtype=torch.float64, requires_grad=True)
    inner = ToyNetwork()
    solution, _ = toy_run(method, lambda x, t, c: inner(x, t, c) + bias)
    (found,) = torch.autograd.grad((solution.x0**2).sum(), bias)
    # As a weight of the network's own it is the same one.
    inner.register_parameter("bias", nn.Parameter(bias.detach().clone()))
    own, _ = toy_run(method, lambda x, t, c: inner(x, t, c) + inner.bias)
    (expected,) = torch.autograd.grad((own.x0**2).sum(), inner.bias)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


@each_method
def test_weights_changed_in_between_raise_by_name(method: GradientMethod) -> None:
    network = ToyNetwork()
    solution, _ = toy_run(method, network)
    with torch.no_grad():
        network.shared.weight.add_(0.1)
    with pytest.raises(StateChangedError, match=r"shared\.weight"):
        solution.x0.sum().backward()


@each_method
def test_without_gradients_nothing_is_kept(method: GradientMethod) -> None:
    x, cond = toy_inputs()
    with torch.no_grad():
        solution = sample(toy_denoiser(), x.requires_grad_(), cond, solver=Heun(), grid=GRID, gradient=method)
    assert not solution.x0.requires_grad
    frozen = toy_denoiser(ToyNetwork().requires_grad_(False))
    same = sample(frozen, x.detach(), cond, solver=Heun(), grid=GRID, gradient=method)
    assert not same.x0.requires_grad
    assert torch.equal(same.x0, solution.x0)


@each_method
@pytest.mark.parametrize("weights", [False, True])
def test_memory_does_not_grow_with_the_steps_but_for_the_states(
    method: GradientMethod, weights: bool
) -> None:
    network = TanhStack(256 if weights else 32)
    x = torch.randn(2, 256) if weights else torch.randn(256, 32)
    few, many = (peak_of_run(network, x, steps, method) for steps in (4, 24))
    recomputed = getattr(method, "trajectory", "stored") == "recompute"
    # A latent a step where states are stored (two to interpolate: its slope too), and a few numbers.
    latents = 0 if recomputed else 2 if isinstance(method, ContinuousAdjoint) else 1
    assert many - few <= 20 * (latents * x.nbytes + 1500)
    if weights:
        # One buffer of the weights' size, one gradient in flight, and what one call holds.
        one, all_of_them = network.layers[0].weight.nbytes, sum(p.nbytes for p in network.parameters())
        assert many <= 1.1 * all_of_them + 2.5 * one


@each_method
def test_nothing_is_left_when_the_solution_is_gone(method: GradientMethod) -> None:
    network = ToyNetwork()
    gc.collect()
    gc.disable()
    try:
        solution, _ = toy_run(method, network)
        (solution.x0**2).sum().backward()
        watch = weakref.ref(solution.x0)
        del solution
        assert watch() is None
    finally:
        gc.enable()
