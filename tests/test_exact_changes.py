"""The exact gradient where something was changed in between or would be lost: a name instead of a wrong number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backdrift.errors import MissingGradientError, StateChangedError
from backdrift.gradients import Exact, GradientMethod, Plain
from backdrift.sampling import sample
from problems import ToyNetwork, toy_denoiser, toy_inputs
from toy_runs import GRID, equal, toy_run

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
