"""The memory plan on plain networks: same bits, fewest redone calls, the budget kept, changes noticed."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from backdrift.budget import available_bytes, format_size, parse_size
from backdrift.errors import BackdriftError, BudgetError, StateChangedError
from backdrift.memory import Ledger, MemoryPlan
from backdrift.verification.memory import LiveStorages

CALLS = 6


class Net(nn.Module):
    """Saves inputs, outputs (tanh, sigmoid), an activation shared by two nodes, and uses random numbers."""

    def __init__(self, width: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.gelu(self.up(x + cond))
        return self.norm(self.drop(self.down(hidden).tanh())).sigmoid()


def problem(seed: int = 0, **net: Any) -> tuple[Net, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return Net(**net), torch.randn(64, 32, requires_grad=True), torch.randn(32, requires_grad=True)


def sample(net: nn.Module, x: torch.Tensor, cond: torch.Tensor, ledger: Ledger | None) -> torch.Tensor:
    for _ in range(CALLS):
        if ledger is None:
            y = net(x, cond)
        else:
            y = ledger.call(net, x, cond, modules=[("net", net)])
        x = x - 0.1 * y
    if ledger is not None:
        ledger.finish()
    return x


def gradients(memory: Any, **net: Any) -> tuple[list[torch.Tensor], Ledger | None]:
    model, x, cond = problem(**net)
    ledger = None if memory is None else Ledger(memory)
    loss = sample(model, x, cond, ledger).square().sum()
    return list(torch.autograd.grad(loss, [x, cond, *model.parameters()])), ledger


def smallest(memory: int = 1) -> int:
    """The budget that the refusal of a tiny one names for the whole run."""
    net, x, cond = problem()
    with pytest.raises(BudgetError, match="smallest budget that works is") as error:
        sample(net, x, cond, Ledger(memory, defer=True))
    return int(str(error.value).split("smallest budget that works is")[1].split("(")[1].split(" ")[0])


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------------------- sizes and plans


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6GiB", 6 * 2**30),
        ("512 MiB", 512 * 2**20),
        ("1.5GB", 1_500_000_000),
        ("2k", 2048),
        ("1_000", 1000),
        ("7b", 7),
        (12345, 12345),
    ],
)
def test_sizes_are_read(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("bad", ["", "much", "6 GiBi", "-3MiB", "0", 0, -1, True, None, 2.5, "1e9", "MiB"])
def test_what_is_no_size_is_refused(bad: Any) -> None:
    with pytest.raises(BudgetError, match="allowed"):
        MemoryPlan.parse(bad)
    assert issubclass(BudgetError, BackdriftError)
    assert issubclass(BudgetError, ValueError)


def test_a_formatted_size_can_be_given_back() -> None:
    text = format_size(3 * 2**30 + 17)
    assert text.startswith("3.0 GiB")
    assert parse_size(int(text.split("(")[1].split(" ")[0])) == 3 * 2**30 + 17


def test_plans_are_read() -> None:
    assert MemoryPlan.parse("min").mode == "min"
    assert MemoryPlan.parse("1KiB") == MemoryPlan("bytes", 1024)
    assert MemoryPlan.parse(MemoryPlan("max")) == MemoryPlan("max")


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


# ---------------------------------------------------------------------------- changes between the passes


@pytest.mark.parametrize("memory", ["min", 10**7, "max"])
def test_an_edited_weight_is_named(memory: str | int) -> None:
    net, x, cond = problem()
    loss = sample(net, x, cond, Ledger(memory)).sum()
    with torch.no_grad():
        net.down.weight.mul_(1.01)
    with pytest.raises(StateChangedError, match=r"net\.down\.weight was modified in place"):
        loss.backward()


@pytest.mark.parametrize("memory", ["min", 10**7, "max"])
def test_a_changed_flag_is_named(memory: str | int) -> None:
    net, x, cond = problem()
    loss = sample(net, x, cond, Ledger(memory)).sum()
    net.up.bias.requires_grad_(False)
    with pytest.raises(StateChangedError, match=r"net\.up\.bias had requires_grad=True"):
        loss.backward()


def test_a_replaced_weight_is_named() -> None:
    net, x, cond = problem()
    loss = sample(net, x, cond, Ledger("min")).sum()
    net.up.weight.data = net.up.weight.data * 2
    with pytest.raises(StateChangedError, match=r"net\.up\.weight was replaced or converted"):
        loss.backward()


@pytest.mark.parametrize("memory", ["min", 10**7])
def test_an_edited_argument_is_noticed(memory: str | int) -> None:
    net, x, cond = problem()
    loss = sample(net, x, cond, Ledger(memory)).sum()
    with torch.no_grad():
        cond.add_(1)
    if memory == "min":
        with pytest.raises(StateChangedError, match=r"argument of shape \(32,\).* modified in place"):
            loss.backward()
    else:  # nothing is redone, and addition does not need it: plain autograd's gradient
        loss.backward()


def test_an_edited_activation_is_noticed() -> None:
    x = torch.ones(4, requires_grad=True)
    y = Ledger(10**6).call(torch.exp, x)  # exp saves its output
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(StateChangedError, match=r"shape \(4,\).*modified in place"):
        y.sum().backward()


@pytest.mark.parametrize("change", ["count", "shape"])
def test_a_call_that_does_not_repeat_itself_is_noticed(change: str) -> None:
    x = torch.ones(4, requires_grad=True)
    calls = []

    def network(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) < 3:
            return x.exp().exp()
        return x.exp() if change == "count" else x.repeat(2).exp().exp()[:4]

    ledger = Ledger("min")
    y = ledger.call(network, ledger.call(network, x))
    with pytest.raises(StateChangedError, match="did not repeat itself"):
        y.sum().backward()


@pytest.mark.parametrize("memory", ["min", "max", 10**7])
def test_a_call_that_edits_what_it_has_saved_is_noticed_also_when_it_is_redone(memory: Any) -> None:
    x = torch.randn(8, requires_grad=True)

    def spoiled(x: torch.Tensor) -> torch.Tensor:
        scaled = 1 * x
        y = scaled.sin()
        with torch.no_grad():
            scaled.mul_(2)
        return y

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        spoiled(x).sum().backward()
    ledger = Ledger(memory)
    y = ledger.call(spoiled, ledger.call(spoiled, x))
    with pytest.raises(RuntimeError, match=r"modified (in place|by an inplace)"):
        y.sum().backward()
    first = ledger.call(spoiled, x)  # dropped by the next call under "min"
    ledger.call(spoiled, x)
    with pytest.raises(RuntimeError, match=r"modified (in place|by an inplace)"):
        first.sum().backward()
