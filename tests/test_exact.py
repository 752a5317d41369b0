"""Exact gradients: plain autograd's bits, in bounded memory, and never a gradient lost in silence."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backdrift.denoiser import Denoiser
from backdrift.errors import BudgetError, MissingGradientError, StateChangedError, UnsupportedError
from backdrift.gradients import Exact, GradientMethod, Plain
from backdrift.grids import TimeGrid
from backdrift.sampling import Solution, sample
from backdrift.schedules import VP, Flow
from backdrift.solvers import RK4, AdamsBashforth, DPMSolverPP, Euler, Heun, Solver
from live_bytes import LiveBytes
from problems import ToyNetwork, toy_denoiser, toy_inputs
from tiny_pipelines import tiny_unet

GRID = TimeGrid("uniform", steps=5, start=1.0, end=0.05)
SOLVERS = {"euler": Euler(), "rk4": RK4(), "ab4": AdamsBashforth(4), "dpmpp": DPMSolverPP()}


def equal(left: list[Tensor | None], right: list[Tensor | None]) -> list[int]:
    """Where two lists of gradients differ, in any bit."""
    pairs = enumerate(zip(left, right, strict=True))
    return [i for i, (a, b) in pairs if not (a is b if a is None or b is None else torch.equal(a, b))]


def toy_run(
    gradient: GradientMethod, network: Any = None, solver: Solver | None = None, **kwargs: Any
) -> tuple[Solution, list[Tensor | None]]:
    """A run of the toy network, differentiated by everything: x_T, both cond tensors, all weights."""
    network = network if network is not None else ToyNetwork()
    x, cond = toy_inputs()
    x.requires_grad_()
    cond["prompt"].requires_grad_()
    cond["more"][0].requires_grad_()
    model = toy_denoiser(network, **kwargs)
    solution = sample(model, x, cond, solver=solver or Heun(), grid=GRID, gradient=gradient)
    (solution.x0**2).sum().backward()
    weights = [p.grad for p in network.parameters()] if isinstance(network, nn.Module) else []
    return solution, [x.grad, cond["prompt"].grad, cond["more"][0].grad, *weights]


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


def test_budgets_keep_as_many_last_calls_as_fit() -> None:
    needed = toy_run(Exact("max"))[0].stats.peak_bytes
    kept = []
    for budget in range(13_000, needed + 20_000, 6_000):
        solution, _ = toy_run(Exact(budget))
        assert solution.stats.peak_bytes <= budget
        assert solution.stats.calls_redone == 10 - solution.stats.calls_kept
        kept.append(solution.stats.calls_kept)
    assert kept == sorted(kept)
    assert kept[0] < 6
    assert kept[-1] == 10


def test_a_budget_too_small_names_one_that_works() -> None:
    with pytest.raises(BudgetError, match="smallest budget that works") as caught:
        toy_run(Exact(5_000))
    smallest = int(str(caught.value).split("works is")[1].split("(")[1].split(" bytes")[0])
    assert toy_run(Exact(smallest))[0].stats.calls_kept == 1
    with pytest.raises(BudgetError):
        toy_run(Exact(smallest - 1))
    with pytest.raises(BudgetError, match="not a memory plan"):
        Exact("plenty")


class Wide(nn.Module):
    """Weights that outweigh the activations (``weights=True``), or the other way round."""

    def __init__(self, weights: bool) -> None:
        super().__init__()
        width = 256 if weights else 64
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(6))

    def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def peak_of_run(network: nn.Module, x: Tensor, steps: int, gradient: GradientMethod) -> int:
    network.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    gc.collect()
    with LiveBytes() as live:
        solution = sample(
            toy_denoiser(network), x, grid=TimeGrid("uniform", steps), gradient=gradient, check_finite=False
        )
        solution.x0.sum().backward()
    return live.peak


def peak_of_step(network: nn.Module, x: Tensor) -> int:
    """One step's backpropagation into gradients that are allocated."""
    with LiveBytes() as live:
        for p in network.parameters():
            p.grad = torch.zeros_like(p)
        x = x.clone().requires_grad_()
        network(x * 1.0, torch.ones(len(x)), None).sum().backward()
    network.zero_grad(set_to_none=True)
    return live.peak


@pytest.mark.parametrize("weights", [True, False])
def test_memory_is_one_steps_plus_the_latents_however_many_steps(weights: bool) -> None:
    network = Wide(weights)
    x = torch.randn(2, 256) if weights else torch.randn(512, 64)
    step = peak_of_step(network, x)
    peaks = {n: peak_of_run(network, x, n, Exact("min")) for n in (4, 64)}
    for n, peak in peaks.items():
        assert peak <= 1.05 * step + (n + 4) * x.nbytes, (n, peak, step)
    # Each further step adds its latent and a few scalars, nothing that scales with the network.
    assert peaks[64] - peaks[4] <= 60 * (x.nbytes + 64)
    plain = {n: peak_of_run(network, x, n, Plain()) for n in (4, 16)}
    assert plain[16] - plain[4] > 12 * 5 * x.nbytes  # the yardstick does see activations


def test_frozen_weights_cost_no_weight_gradients() -> None:
    network = Wide(weights=True).requires_grad_(False)
    x = torch.randn(2, 256)
    weight_bytes = sum(p.nbytes for p in network.parameters())
    assert peak_of_run(network, x, 6, Exact("min")) < weight_bytes / 8
    # The same holds for trainable weights whose gradients nobody asks for.
    network.requires_grad_(True)
    start = x.clone().requires_grad_()
    solution = sample(toy_denoiser(network), start, grid=GRID, gradient=Exact("min"))
    with LiveBytes() as live:
        (grad,) = torch.autograd.grad(solution.x0.sum(), start)
    assert live.peak < weight_bytes / 8
    assert all(p.grad is None for p in network.parameters())
    network.requires_grad_(False)
    assert torch.equal(
        grad, torch.autograd.grad(sample(toy_denoiser(network), start, grid=GRID).x0.sum(), start)[0]
    )


def test_nothing_is_left_when_the_solution_is_gone() -> None:
    network = ToyNetwork()
    x, cond = toy_inputs()
    x.requires_grad_()
    gc.collect()
    gc.disable()
    try:
        with LiveBytes() as live:
            solution = sample(toy_denoiser(network), x, cond, grid=GRID, gradient=Exact("max"))
        assert live.left > 5_000
        watch = weakref.ref(solution.x0)
        with LiveBytes() as after:
            del solution
        assert watch() is None
        assert after.left == pytest.approx(-live.left, abs=2_000)
    finally:
        gc.enable()


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


CHANGES = {
    "edited weight": (lambda n, c: _edit(n.shared.weight), "shared.weight"),
    "frozen weight": (lambda n, c: n.enter.bias.requires_grad_(False), "enter.bias"),
    "mode": (lambda n, c: n.dropout.train(not n.dropout.training), "dropout"),
    "cond": (lambda n, c: _edit(c["prompt"]), "cond tensor"),
    "optimizer step": (lambda n, c: _step(n), "enter.weight|scale"),
}


def _edit(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.add_(0.1)


def _step(network: nn.Module) -> None:
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(network.parameters(), lr=0.1).step()


@pytest.mark.parametrize("name", CHANGES)
def test_changes_between_forward_and_backward_raise_by_name(name: str) -> None:
    change, message = CHANGES[name]
    network = ToyNetwork().eval()
    x, cond = toy_inputs()
    x.requires_grad_()
    loss = sample(toy_denoiser(network), x, cond, grid=GRID, gradient=Exact("min")).x0.sum()
    change(network, cond)
    with pytest.raises(StateChangedError, match=message):
        loss.backward()


def test_a_callable_over_a_module_trains_it_and_watches_it() -> None:
    network = ToyNetwork()

    def closure(x: Tensor, t: Tensor, c: Any) -> Tensor:
        return network(x, t, c)

    _, plain = toy_run(Plain(), ToyNetwork())
    _, exact = toy_run(Exact("min"), closure)
    assert equal(plain, [*exact, *(p.grad for p in network.parameters())]) == []
    network.requires_grad_(False)
    x, cond = toy_inputs()
    x.requires_grad_()
    loss = sample(toy_denoiser(closure), x, cond, grid=GRID, gradient=Exact("min")).x0.sum()
    _edit(network.leave.weight)
    with pytest.raises(StateChangedError, match=r"network\.leave\.weight"):
        loss.backward()


def test_a_leaf_that_the_network_closes_over_gets_its_gradient() -> None:
    def run(gradient: GradientMethod) -> list[Tensor | None]:
        bias = torch.full((4,), 0.3, dtype=torch.float64, requires_grad=True)
        inner = ToyNetwork()
        toy_run(gradient, lambda x, t, c: inner(x, t, c) + bias)
        return [bias.grad, inner.scale.grad]

    plain = run(Plain())
    assert plain[0] is not None
    assert equal(plain, run(Exact("min"))) == []


def test_a_computed_tensor_that_the_network_closes_over_raises_by_name() -> None:
    base = torch.full((4,), 0.3, dtype=torch.float64, requires_grad=True)
    style = base * 2
    with pytest.raises(MissingGradientError, match="'style'"):
        toy_run(Exact("min"), lambda x, t, c: -x + style)

    class Holder(ToyNetwork):
        def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
            return super().forward(x, t, cond) + self.embedding

    network = Holder()
    network.embedding = base * 3
    with pytest.raises(MissingGradientError, match="'embedding'"):
        toy_run(Exact("min"), network)


def test_a_tensor_that_only_later_calls_use_raises_by_name() -> None:
    late = torch.full((4,), 0.3, dtype=torch.float64, requires_grad=True)

    def network(x: Tensor, t: Tensor, c: Any) -> Tensor:
        return -x * c["prompt"].mean() + (late if 0.1 < float(t[0]) < 0.9 else 0.0)

    with pytest.raises(MissingGradientError, match="'late'"):
        toy_run(Exact("min"), network)


def test_a_network_that_cuts_its_graph_raises() -> None:
    inner = ToyNetwork()

    @torch.no_grad()
    def network(x: Tensor, t: Tensor, c: Any) -> Tensor:
        return inner(x, t, c)

    with pytest.raises(MissingGradientError, match="no_grad"):
        toy_run(Exact("min"), network)


def test_without_gradients_nothing_is_kept() -> None:
    network = ToyNetwork().requires_grad_(False)
    x, cond = toy_inputs()
    solution = sample(toy_denoiser(network), x, cond, grid=GRID, gradient=Exact("max"))
    assert not solution.x0.requires_grad
    with torch.no_grad():
        same = sample(toy_denoiser(ToyNetwork()), x.requires_grad_(), cond, grid=GRID, gradient=Exact("max"))
    assert not same.x0.requires_grad
    assert torch.equal(same.x0, solution.x0)


def test_gradients_reach_weights_when_nothing_else_requires_them() -> None:
    def run(gradient: GradientMethod) -> list[Tensor | None]:
        network = ToyNetwork()
        x, _ = toy_inputs()
        model = Denoiser(network, Flow(), "flow_prediction")
        sample(model, x, None, grid=TimeGrid("uniform", 4), gradient=gradient).x0.sum().backward()
        return [p.grad for p in network.parameters()]

    assert equal(run(Plain()), run(Exact("min"))) == []
