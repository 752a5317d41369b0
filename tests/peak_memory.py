"""The most bytes that a run and its backward pass hold, on a network whose own bytes are told by its width."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor, nn

from backdrift.gradients import GradientMethod
from backdrift.grids import TimeGrid
from backdrift.sampling import sample
from live_bytes import LiveBytes
from problems import toy_denoiser


class TanhStack(nn.Module):
    """Six linear layers of one width, each under a tanh: with few rows its weights outweigh its activations."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(6))

    def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def peak_of_run(network: nn.Module, x: Tensor, steps: int, gradient: GradientMethod) -> int:
    """Of a run from ``x`` and its backward pass, weights' gradients included; what was there before is not."""
    network.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    grid = TimeGrid("uniform", steps, start=1.0, end=0.05)
    gc.collect()
    with LiveBytes() as live:
        solution = sample(toy_denoiser(network), x, grid=grid, gradient=gradient, check_finite=False)
        solution.x0.sum().backward()
    return live.peak
