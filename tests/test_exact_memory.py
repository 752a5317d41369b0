"""What the exact gradient holds: a budget kept, one step's memory and the latents, nothing afterwards."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from backdrift.errors import BudgetError
from backdrift.gradients import Exact, Plain
from backdrift.sampling import sample
from live_bytes import LiveBytes
from peak_memory import TanhStack, peak_of_run
from problems import ToyNetwork, toy_denoiser, toy_inputs
from toy_runs import GRID, toy_run


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
    with pytest.raises(BudgetError, match='allowed: "min"'):
        Exact("plenty")


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
    network = TanhStack(256 if weights else 64)
    x = torch.randn(2, 256) if weights else torch.randn(512, 64)
    step = peak_of_step(network, x)
    peaks = {n: peak_of_run(network, x, n, Exact("min")) for n in (4, 64)}
    for n, peak in peaks.items():
        assert peak <= 1.05 * step + (n + 4) * x.nbytes, (n, peak, step)
    # Each further step adds its latent, 64 entries of its output and a few scalars: nothing that the network's size
    # shows in.
    assert peaks[64] - peaks[4] <= 60 * (x.nbytes + 64 * 4 + 64)
    plain = {n: peak_of_run(network, x, n, Plain()) for n in (4, 16)}
    assert plain[16] - plain[4] > 12 * 5 * x.nbytes  # the yardstick does see activations


def test_frozen_weights_cost_no_weight_gradients() -> None:
    network = TanhStack(256).requires_grad_(False)
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


def test_without_gradients_nothing_is_kept() -> None:
    network = ToyNetwork().requires_grad_(False)
    x, cond = toy_inputs()
    solution = sample(toy_denoiser(network), x, cond, grid=GRID, gradient=Exact("max"))
    assert not solution.x0.requires_grad
    with torch.no_grad():
        same = sample(toy_denoiser(ToyNetwork()), x.requires_grad_(), cond, grid=GRID, gradient=Exact("max"))
    assert not same.x0.requires_grad
    assert torch.equal(same.x0, solution.x0)
