"""Plans that name how many calls are kept, and calls that are made in parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from backdrift.memory import Ledger, MemoryPlan
from backdrift.pipelines.parts import in_parts

CALLS = 5


class Net(nn.Module):
    """A residual step in float64; what it computes for a row depends on that row alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 24, dtype=torch.float64), nn.Linear(24, 6, dtype=torch.float64)

    def forward(self, x: torch.Tensor, t: torch.Tensor, more: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {"sample": self.down(torch.tanh(self.up(x * t + more["text"]))), "name": "net"}


def gradients(ledger: Ledger | None, parts: int = 1, decode: int = 1) -> tuple[list[torch.Tensor], list[int]]:
    """Gradients through five network calls and a decoder's, and how many network calls were held at each call."""
    torch.manual_seed(0)
    net, decoder = Net(), nn.Sequential(nn.Linear(6, 12, dtype=torch.float64), nn.Tanh())
    start = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    text = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    held: list[int] = []

    def planned(module: nn.Module, role: Any, slices: int) -> Any:
        def one(role: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                if ledger is None:
                    return module(*args, **kwargs)
                out = ledger.call(module, *args, modules=[("net", module)], role=role, **kwargs)
                held.append(ledger._holdings.kept("network"))
                return out

            return call

        return lambda *args: in_parts(one(f"{role} part"), one(role), slices, args, {})

    x = start
    for i in range(CALLS):
        t = torch.tensor(0.5 + i, dtype=torch.float64)
        x = x + 0.3 * planned(net, "network", parts)(x, t, {"text": text})["sample"]
    out = planned(decoder, "decoder", decode)(x)
    leaves = [start, text, *net.parameters(), *decoder.parameters()]
    return list(torch.autograd.grad(out.square().sum(), leaves)), held


@pytest.mark.parametrize("keep", [0, 1, 3, CALLS, 9])
def test_the_last_calls_are_kept_and_the_others_redone(keep: int) -> None:
    ledger = Ledger(MemoryPlan("keep", keep=keep))
    found, held = gradients(ledger)
    assert all(map(torch.equal, found, gradients(None)[0]))
    assert held[:CALLS] == [min(i + 1, max(keep, 1)) for i in range(CALLS)]
    assert held[-1] == ledger.stats.calls_kept == min(keep, CALLS)
    assert ledger.stats.calls_redone == CALLS - min(keep, CALLS)
    assert ledger.stats.decodes_redone == 0


@pytest.mark.parametrize("keep", [0, 2, CALLS])
def test_a_call_in_parts_is_one_call(keep: int) -> None:
    """In float64 the halves agree with the whole to rounding; they are counted, kept and redone together."""
    ledger = Ledger(MemoryPlan("keep", keep=keep))
    found, _ = gradients(ledger, parts=2, decode=4)
    for ours, plain in zip(found, gradients(None)[0], strict=True):
        assert torch.allclose(ours, plain, rtol=1e-13, atol=1e-13)
    stats = ledger.stats
    assert (stats.calls_forward, stats.vjps, stats.decodes) == (CALLS, CALLS, 1)
    assert stats.calls_redone == CALLS - keep


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_of_a_call_that_is_not_kept_are_held_one_at_a_time(parts: int) -> None:
    """What is saved for each of the 4 rows: 6 inputs and 24 outputs of tanh in the network, 12 in the decoder."""
    ledger = Ledger(MemoryPlan("keep", keep=0))
    saved: list[int] = []
    note = ledger._note

    def noted() -> None:
        note()
        saved.append(ledger._holdings.live - ledger._holdings.arguments)

    ledger._note = noted  # type: ignore[method-assign]
    gradients(ledger, parts=parts, decode=parts)
    network, decoder = 4 * (6 + 24) * 8 // parts, 4 * 12 * 8 // parts
    assert saved == [network] * (CALLS * parts) + [decoder] * parts


def test_rows_that_cannot_be_divided_are_not() -> None:
    made = []

    def call(x: torch.Tensor) -> torch.Tensor:
        made.append(len(x))
        return x * 2

    x = torch.arange(6.0).reshape(3, 2)
    assert torch.equal(in_parts(call, call, 2, (x,), {}), x * 2)
    assert made == [3]
    assert in_parts(lambda x: x.sum(), lambda x: x.sum(), 3, (x,), {}).item() == 15
