"""The memory plan on plain networks: same bits, fewest redone calls, the budget kept."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from backdrift.budget import available_bytes
from backdrift.errors import BudgetError
from backdrift.memory import Ledger
from backdrift.verification.memory import LiveStorages
from ledger_runs import CALLS, equal, gradients, problem, sample, smallest

# ---------------------------------------------------------------------------- sizes and plans


def test_auto_takes_a_budget_from_what_is_free() -> None:
    free = available_bytes(torch.device("cpu"))
    grads, ledger = gradients("auto")
    assert ledger is not None
    assert 0.5 * free < ledger.budget < 2 * free
    assert ledger.stats.calls_redone == 0
    assert equal(grads, gradients(None)[0])


# ---------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("memory", ["min", "max", "auto", 330_000, 420_000, 560_000, 10**7])
def test_gradients_are_those_of_plain_autograd(memory: str | int) -> None:
    assert equal(gradients(memory)[0], gradients(None)[0])


@pytest.mark.parametrize("memory", ["min", 400_000])
def test_random_numbers_are_drawn_again(memory: str | int) -> None:
    plain, held = gradients(None, dropout=0.5)[0], gradients(memory, dropout=0.5)[0]
    after = torch.rand(1)
    assert equal(plain, held)
    gradients(None, dropout=0.5)
    assert torch.equal(after, torch.rand(1))  # the backward pass leaves the generator where it was


def test_random_numbers_of_a_generator_that_is_handed_in() -> None:
    weight = torch.randn(8, requires_grad=True)

    def noisy(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return (x * weight * torch.randn(8, generator=generator)).tanh()

    found = []
    for ledger in (None, Ledger("min")):
        generator, x = torch.Generator().manual_seed(3), torch.ones(8)
        for _ in range(3):
            x = noisy(x, generator) if ledger is None else ledger.call(noisy, x, generator)
        found.append(torch.autograd.grad(x.sum(), weight)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("memory", ["min", 400_000, "max"])
def test_autocast_is_entered_again_outside_its_block(memory: str | int, cache: bool) -> None:
    found = []
    for plan in (None, memory):
        net, x, cond = problem()
        ledger = None if plan is None else Ledger(plan)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            loss = sample(net, x, cond, ledger).square().sum()
        found.append(list(torch.autograd.grad(loss, [x, cond, *net.parameters()])))
    assert equal(*found)


def test_process_wide_flags_are_put_back_for_the_redo() -> None:
    seen = []

    def network(x: torch.Tensor) -> torch.Tensor:
        seen.append((torch.backends.cuda.flash_sdp_enabled(), torch.get_float32_matmul_precision()))
        return x.exp()

    x = torch.ones(3, requires_grad=True)
    ledger = Ledger("min")
    try:
        torch.backends.cuda.enable_flash_sdp(False)
        torch.set_float32_matmul_precision("high")
        y = ledger.call(network, ledger.call(network, x))
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
        torch.set_float32_matmul_precision("highest")
    y.sum().backward()
    assert seen == [(False, "high")] * 3
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.get_float32_matmul_precision() == "highest"


class Halving(TorchFunctionMode):
    """Makes every tanh half as large."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out / 2 if func is torch.Tensor.tanh else out


@pytest.mark.parametrize("inside", [True, False])
def test_function_modes_are_entered_again(inside: bool) -> None:
    found = []
    for ledger in (None, Ledger("min")):
        net, x, cond = problem()
        with Halving():
            loss = sample(net, x, cond, ledger).square().sum()
            if inside:  # PyTorch sets the mode aside while it handles the call of grad
                found.append(list(torch.autograd.grad(loss, [x, cond, net.up.weight])))
        if not inside:
            found.append(list(torch.autograd.grad(loss, [x, cond, net.up.weight])))
    assert equal(*found)
    assert not equal(found[0], gradients(None)[0][:3])  # the mode does something


def test_modes_are_put_back_for_the_redo() -> None:
    net, x, cond = problem(dropout=0.5)
    torch.manual_seed(1)
    expected = torch.autograd.grad(sample(net, x, cond, None).sum(), x)[0]
    torch.manual_seed(1)
    out = sample(net, x, cond, Ledger("min")).sum()
    net.eval()
    assert torch.equal(torch.autograd.grad(out, x)[0], expected)
    assert not net.training


@pytest.mark.parametrize("memory", ["min", 400_000, "max"])
def test_retained_graphs_accumulation_and_second_derivatives(memory: str | int) -> None:
    results = []
    for plan in (None, memory):
        net, x, cond = problem()
        loss = sample(net, x, cond, None if plan is None else Ledger(plan)).square().sum()
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        accumulated = [p.grad.clone() for p in [x, cond, *net.parameters()]]
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        accumulated += torch.autograd.grad(g.square().sum(), [x, cond, net.up.weight])
        results.append(accumulated)
    assert equal(*results)


def test_a_second_backward_without_retaining_raises_as_in_pytorch() -> None:
    net, x, cond = problem()
    loss = sample(net, x, cond, Ledger("min")).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_an_error_in_the_backward_pass_leaves_the_graph_usable() -> None:
    net, x, cond = problem()
    ledger = Ledger("min")
    out = sample(net, x, cond, ledger)
    fail = True

    def hook(grad: torch.Tensor) -> None:
        if fail:
            raise ArithmeticError("from the loss")

    loss = out.square().sum()
    x.register_hook(hook)
    with pytest.raises(ArithmeticError, match="from the loss"):
        loss.backward(retain_graph=True)
    fail = False
    assert equal(list(torch.autograd.grad(loss, [x, cond])), gradients(None)[0][:2])


# ---------------------------------------------------------------------------- counts and bytes


def test_min_keeps_the_last_call_and_redoes_the_others_once() -> None:
    stats = gradients("min")[1].stats
    assert (stats.calls_forward, stats.calls_kept, stats.calls_redone, stats.vjps) == (6, 1, 5, 6)
    assert stats.network_calls == 11
    assert stats.seconds_backward >= stats.seconds_redone > 0


def test_max_redoes_nothing_and_counts_what_a_held_run_counts() -> None:
    top, held = gradients("max")[1].stats, gradients(10**8)[1].stats
    assert (top.calls_redone, top.calls_kept, top.vjps) == (0, 6, 6)
    assert top.peak_bytes == pytest.approx(held.peak_bytes, rel=0.1)


def test_redone_calls_are_the_fewest_that_the_budget_allows() -> None:
    least = smallest()
    one = gradients("min")[1].stats.peak_bytes - 64 * 32 * 4 * CALLS  # one call's bytes, latents left out
    previous = CALLS
    for budget in range(least, least + 7 * one, one // 3):
        stats = gradients(budget)[1].stats
        fitting = min(CALLS, 1 + (budget - least) // one)
        assert stats.calls_redone == CALLS - stats.calls_kept
        assert abs(stats.calls_kept - fitting) <= 1
        assert stats.calls_redone <= previous
        previous = stats.calls_redone
    assert previous == 0


@pytest.mark.parametrize("factor", [1.0, 1.3, 2.0, 3.0, 4.0])
def test_live_tensor_bytes_stay_within_the_budget(factor: float) -> None:
    budget = int(smallest() * factor)
    net, x, cond = problem()
    with LiveStorages() as live:
        sample(net, x, cond, Ledger(budget)).square().sum().backward()
    assert live.peak <= 1.05 * budget


def test_a_budget_that_is_too_small_names_the_smallest_that_works() -> None:
    least = smallest()
    assert equal(gradients(least)[0], gradients(None)[0])
    with pytest.raises(BudgetError):
        gradients(int(0.98 * least))


def test_without_deferring_the_refusal_comes_with_the_first_call() -> None:
    net, x, cond = problem()
    ledger = Ledger(1)
    with pytest.raises(BudgetError, match="for the calls made so far"):
        ledger.call(net, x, cond, modules=[("net", net)])


def test_weights_and_shared_storages_are_not_counted_twice() -> None:
    weight = torch.randn(256, 256, requires_grad=True)
    x = torch.randn(256, 256, requires_grad=True)

    def network(x: torch.Tensor) -> torch.Tensor:
        h = (x @ weight).exp()  # saves x (an argument), weight, and h
        return h * h.t() + h  # saves h and a view of it: one storage

    module = nn.Module()
    module.weight = nn.Parameter(weight)
    weight = module.weight
    ledger = Ledger("max")
    ledger.call(network, x, modules=[("m", module)]).sum().backward()
    assert ledger.stats.peak_bytes == 2 * 256 * 256 * 4  # the argument and h


def test_nothing_is_left_after_the_graph_without_the_collector() -> None:
    net, x, cond = problem()
    gc.collect()
    gc.disable()
    try:
        for memory in ("min", 500_000, "max"):
            ledger = Ledger(memory)
            made = []
            net.norm.register_forward_hook(lambda m, a, out, made=made: made.append(weakref.ref(out)))
            out = sample(net, x, cond, ledger)
            out.square().sum().backward()
            del out
            assert all(ref() is None for ref in made)
            ledger._holdings.tidy()
            assert ledger._holdings.live == 0
    finally:
        gc.enable()


def test_graphs_that_die_make_room_for_the_next_run() -> None:
    net, x, cond = problem()
    ledger = Ledger(10**6)
    for _ in range(4):
        out = sample(net, x, cond, ledger)
        assert ledger.stats.calls_kept == CALLS
        del out


def test_calls_under_no_grad_are_only_calls() -> None:
    net, x, cond = problem()
    ledger = Ledger("min")
    with torch.no_grad():
        out = sample(net, x, cond, ledger)
    assert not out.requires_grad
    assert ledger.stats.calls_forward == 0
