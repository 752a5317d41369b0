"""A small run under a ledger, and plainly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from backdrift.errors import BudgetError
from backdrift.memory import Ledger

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
