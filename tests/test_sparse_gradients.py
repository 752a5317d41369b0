"""Embeddings with sparse gradients: every method gives the dense ones' numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import backdrift as bd
from problems import ToyNetwork, toy_denoiser, toy_inputs
from toy_runs import GRID

METHODS: dict[str, tuple[Any, Any]] = {
    "plain": (bd.Plain, bd.Heun()),
    "exact": (lambda: bd.Exact("min"), bd.Heun()),
    "recompute": (bd.SymplecticAdjoint, bd.Heun()),
    "stored": (lambda: bd.SymplecticAdjoint("stored"), bd.Heun()),
    "continuous": (bd.ContinuousAdjoint, bd.Heun()),
    "adaptive": (lambda: bd.ContinuousAdjoint(bd.AdaptiveDormandPrince(1e-3, 1e-3)), bd.Heun()),
    "deis": (lambda: bd.AdjointDEIS(2, "M"), bd.Heun()),
    "reversible": (bd.Reversible, bd.EDICT()),
}


class Labelled(nn.Module):
    """A network with an embedding of labels, of which two rows of five are used."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.inner = ToyNetwork()
        table = torch.linspace(-1, 1, 20, dtype=torch.float64).view(5, 4)
        self.labels = nn.Embedding.from_pretrained(table, freeze=False, sparse=sparse)

    def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return self.inner(x + self.labels(torch.tensor([3, 1])), t, cond)


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_is_that_of_a_dense_embedding(method: str) -> None:
    made, solver = METHODS[method]
    found = []
    for sparse in (False, True):
        network, (x, cond) = Labelled(sparse), toy_inputs()
        solution = bd.sample(toy_denoiser(network), x, cond, solver=solver, grid=GRID, gradient=made())
        solution.x0.square().sum().backward()
        grad = network.labels.weight.grad
        assert grad is not None
        found.append(grad.to_dense())
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-14)
    assert found[0].abs().sum(1).nonzero().flatten().tolist() == [1, 3]
