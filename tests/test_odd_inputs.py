"""Tensors and networks that users have and tests forget: inference tensors, edits in place, sparse gradients, vmap."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import backdrift as bd
from backdrift.errors import InputError, UnsupportedError

METHODS: dict[str, tuple[Any, Any]] = {
    "exact": (bd.Exact("min"), bd.Euler()),
    "symplectic": (bd.SymplecticAdjoint(), bd.Heun()),
    "reversible": (bd.Reversible(), bd.ReversibleHeun()),
    "continuous": (bd.ContinuousAdjoint(), bd.RK4()),
    "deis": (bd.AdjointDEIS(), bd.Euler()),
}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.into, self.out = (nn.Linear(*s, dtype=torch.float64) for s in ((3, 8), (8, 3)))
            self.table = nn.Embedding(4, 8, sparse=True, dtype=torch.float64)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return self.out(torch.tanh(self.into(x) + t[:, None] + self.table(cond)))


class Editing(Network):
    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return super().forward(x.mul_(0.9), t, cond)


def state(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def run(
    network: nn.Module, x: Tensor, cond: Tensor, method: str, plain: bool = False, **kwargs: Any
) -> Tensor:
    gradient, solver = METHODS[method]
    model = bd.Denoiser(network, bd.VP.linear(), **kwargs)
    grid = bd.TimeGrid("uniform", 3)
    return bd.sample(model, x, cond, solver=solver, grid=grid, gradient=bd.Plain() if plain else gradient).x0


@pytest.mark.parametrize("method", METHODS)
def test_sampling_works_in_inference_mode(method: str) -> None:
    network, cond = Network(), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        expected = run(network, state(), cond, method)
    with torch.inference_mode():
        inside = run(network, state(), cond.clone(), method)
        made_inside = Network()
        assert torch.equal(run(made_inside, state(), cond.clone(), method), expected)
    assert torch.equal(inside, expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_network_that_edits_its_input_is_refused(method: str) -> None:
    """The state went on edited, without a word, and so did the caller's own tensor."""
    x = state()
    for grad in (True, False):
        # Where the input is a leaf that requires grad, autograd itself says it first.
        with torch.set_grad_enabled(grad), pytest.raises((InputError, RuntimeError), match=r"in.place"):
            run(Editing(), x, torch.zeros(4, dtype=torch.long), method)
    with torch.no_grad(), pytest.raises(InputError, match="edits its input in place"):
        run(Editing(), x, torch.zeros(4, dtype=torch.long), method)
    # Two halves of guidance are a batch of their own, of which the network may do as it likes.
    both = {"guidance_scale": 2.0, "uncond": torch.ones(4, dtype=torch.long)}
    found = run(Editing(), state(), torch.zeros(4, dtype=torch.long), method, **both)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("method", ["exact"])
def test_sparse_gradients_are_summed(method: str) -> None:
    def by_table(plain: bool) -> Tensor:
        network = Network()
        run(network, state(), torch.tensor([0, 1, 1, 3]), method, plain).square().sum().backward()
        gradient = network.table.weight.grad
        assert gradient is not None
        return gradient.to_dense()

    expected = by_table(True)
    assert expected.abs().sum(1).tolist()[2] == 0
    torch.testing.assert_close(by_table(False), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_many_gradients_at_once_are_given_or_refused(method: str) -> None:
    network, x = Network(), state(1).requires_grad_()
    x0 = run(network, x, torch.zeros(1, dtype=torch.long), method)
    rows = torch.eye(3, dtype=torch.float64).reshape(3, 1, 3)

    def together() -> Tensor:
        return torch.autograd.grad(x0, x, rows, is_grads_batched=True, retain_graph=True)[0]

    if method == "exact":
        expected = [torch.autograd.grad(x0, x, row, retain_graph=True)[0] for row in rows]
        torch.testing.assert_close(together(), torch.stack(expected), rtol=1e-12, atol=1e-12)
    else:
        with pytest.raises(UnsupportedError, match="one gradient at a time"):
            together()


def test_a_plain_run_under_vmap_is_the_batch() -> None:
    network, cond = Network().requires_grad_(False), torch.tensor([0, 1, 2, 3])
    found = torch.vmap(lambda x, c: run(network, x[None], c[None], "exact", plain=True)[0])(state(), cond)
    torch.testing.assert_close(found, run(network, state(), cond, "exact"), rtol=1e-12, atol=1e-12)


def test_an_interrupted_backward_pass_leaves_nothing_behind() -> None:
    network, x = Network(), state().requires_grad_()
    x0 = run(network, x, torch.zeros(4, dtype=torch.long), "exact")
    made = []

    def interrupt(module: Any, args: Any, out: Tensor) -> None:
        made.append(weakref.ref(out))
        if len(made) == 2:
            raise KeyboardInterrupt

    handle = network.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        x0.square().sum().backward(retain_graph=True)
    handle.remove()
    gc.collect()
    assert [ref() for ref in made] == [None] * len(made)
    found = torch.autograd.grad(x0.square().sum(), [x, *network.into.parameters()])
    again = run(network, x, torch.zeros(4, dtype=torch.long), "exact", plain=True)
    for a, b in zip(
        found, torch.autograd.grad(again.square().sum(), [x, *network.into.parameters()]), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
