"""The memory plan where something was changed before a call was redone: noticed, and named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from backdrift.errors import StateChangedError
from backdrift.memory import Ledger
from ledger_runs import problem, sample


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
