"""Weights that come and go: calls and backward passes see the copies on the device, and those alone.

The "device" here gives copies that are twice what lies at home, so a network that somewhere read its weights at home
would compute something else than one whose weights are twice as large.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from backdrift.residence import Part, Residence, Turns, layers, slots_of

WIDTH = 8


class Doubled(Turns):
    """A device on which weights are twice what they are at home."""

    def _loaded(self, home: Tensor) -> Tensor:
        return 2 * home


class Attention(nn.Module):
    """PyTorch's attention reads the weights of the layer inside it without calling that."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x[None], x[None], x[None], need_weights=False)[0][0]


class Normed(nn.Module):
    """Weight normalisation by a hook: the weight is made before the layer's forward."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.layers = nn.ModuleList([nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


class Tied(nn.Module):
    """One weight in two layers, the second inside the first's module's call."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight
        self.own = self.second.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second((self.first(x) * self.scale).tanh()) @ self.own


def chain() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "chain": chain,
    "attention": Attention,
    "weight norm by a hook": Normed,
    "weight norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)), nn.Tanh()),
    "tied": Tied,
}


def made(name: str, trained: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = NETWORKS[name]().double().eval()
    return network.requires_grad_(trained)


def parts_of(network: nn.Module, grain: str) -> list[Part] | None:
    return {"whole": None, "layers": layers(network), "one": [Part(network, slots_of(network))]}[grain]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("grain", ["whole", "layers", "one"])
@pytest.mark.parametrize("name", NETWORKS)
def test_only_the_copies_are_seen(name: str, grain: str, trained: bool) -> None:
    twice = made(name, trained)
    with torch.no_grad():
        for parameter in twice.parameters():
            parameter.mul_(2)
    network = made(name, trained)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    turns = Doubled(torch.device("cpu"))
    residence = Residence(network, "network", turns, parts_of(network, grain))
    call = residence.around(network.forward)
    x = torch.randn(
        4, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()
    with turns.saving():
        out = call(x)
    turns.leave()
    assert turns.nbytes == 0  # neither the network nor the graph holds a copy
    true = twice(x)
    assert torch.equal(out, true)
    leaves = [x, *network.parameters()] if trained else [x]
    found = torch.autograd.grad(out.square().sum(), leaves)
    wanted = torch.autograd.grad(true.square().sum(), [x, *twice.parameters()] if trained else [x])
    # What reaches one weight from three places is added up in another order.
    same = torch.equal if name != "tied" else lambda a, b: torch.allclose(a, b, rtol=1e-14, atol=1e-15)
    assert all(same(*pair) for pair in zip(found, wanted, strict=True))
    turns.leave()
    assert turns.nbytes == 0
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_a_layer_comes_when_the_one_before_has_gone() -> None:
    network = made("chain", False)
    turns = Turns(torch.device("cpu"))
    call = Residence(network, "network", turns, layers(network)).around(network.forward)
    x = torch.randn(4, WIDTH, dtype=torch.float64, requires_grad=True)
    with turns.saving():
        out = call(x)
    layer = (WIDTH + 1) * WIDTH * 8
    assert turns.peak == layer
    assert turns.moved == 2 * layer + 2 * WIDTH * 8
    out.sum().backward()
    assert turns.peak == layer
    # The norm's weight and bias, and the layers' weights, not their biases.
    assert turns.moved == 2 * layer + 2 * WIDTH * 8 + 2 * WIDTH**2 * 8 + 2 * WIDTH * 8


def test_hooks_around_see_what_is_no_weight() -> None:
    """Those of a run that counts or drops what its calls save; of nested ones PyTorch asks the innermost alone."""
    network = made("chain", False)
    turns = Doubled(torch.device("cpu"))
    call = Residence(network, "network", turns, layers(network)).around(network.forward)
    x = torch.randn(4, WIDTH, dtype=torch.float64, requires_grad=True)
    packed: list[Tensor] = []
    given: list[Tensor] = []
    asked: list[int] = []

    def pack(tensor: Tensor) -> int:
        packed.append(tensor.detach())
        return len(packed) - 1

    def unpack(number: int) -> Tensor:
        given.append(packed[number])
        return packed[number]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack), turns.saving(lambda: asked.append(1)):
        out = call(x)
    twice = made("chain", False)
    with torch.no_grad():
        for parameter in twice.parameters():
            parameter.mul_(2)
    (found,) = torch.autograd.grad(out.sum(), x)
    (true,) = torch.autograd.grad(twice(x).sum(), x)
    assert torch.equal(found, true)
    assert given
    shapes = {tuple(p.shape) for p in network.parameters()}
    assert all(tuple(tensor.shape) not in shapes for tensor in packed)
    assert len(asked) >= 3  # the two layers' weights, and the norm's


def test_a_module_inside_can_be_called_alone() -> None:
    """As a backward pass does that redoes it: what is otherwise there for a module around it is there."""
    network = made("tied", False)
    turns = Doubled(torch.device("cpu"))
    residence = Residence(network, "network", turns, [Part(network, slots_of(network))])
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    alone: Any = network.get_submodule("second")
    with residence.over(alone):
        found = alone(x)
    assert torch.equal(found, nn.functional.linear(x, 2 * alone.weight, 2 * alone.bias))
    assert turns.nbytes == 0


@pytest.mark.parametrize("grain", ["whole", "layers"])
def test_statistics_that_a_layer_keeps_are_brought_home(grain: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)).double().train()
    plain = copy.deepcopy(network)
    turns = Turns(torch.device("cpu"))
    call = Residence(network, "network", turns, parts_of(network, grain)).around(network.forward)
    for i in range(2):
        x = torch.randn(4, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        assert torch.equal(call(x), plain(x))
    turns.leave()
    for (name, ours), (_, theirs) in zip(network.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name
