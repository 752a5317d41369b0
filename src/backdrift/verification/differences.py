"""Finite differences of a run's loss in float64: what a gradient is, without any autograd."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..recipes.check import central_slope
from ..recipes.unrounded import Unrounded
from ..sampling import sample
from .problem import Problem
from .sampler import Sampler


@dataclass(frozen=True)
class Slopes:
    """Derivatives of a loss along random directions.

    Attributes:
        directions: (K, n), float64, of length 1.
        slopes: (K,), by finite differences.
    """

    directions: Tensor
    slopes: Tensor

    def mismatch(self, gradient: Tensor) -> float:
        """How far a gradient (n,) is from the differences, relative to the slopes.

        The root of Σ (gradient · d - slope)² / Σ slope², where the sum below is at least what random directions
        give on average: a direction that happens to lie across the gradient says little.
        """
        found = self.directions @ gradient
        usual = float(gradient.norm()) ** 2 * len(self.slopes) / gradient.numel()
        size = max(float(self.slopes.square().sum()), usual)
        return math.sqrt(float((found - self.slopes).square().sum()) / size) if size > 0 else 0.0


def finite_differences(problem: Problem, sampler: Sampler, count: int, seed: int) -> Slopes:
    """The slopes of the sampler's loss along ``count`` random directions: 4 runs each.

    A step is a hundredth of the tensors' usual entry. Along weights, where a million entries share it, it is a
    thousandth of the whole: each weight moves by so much of its usual size.

    Args:
        problem: in float64.
        seed: of the directions.
    """
    _, _, asked = problem.leaves()
    draw = torch.Generator().manual_seed(seed)
    total = sum(t.numel() for t in asked)
    size = math.sqrt(sum(float(t.detach().square().sum()) for t in asked) / total) or 1.0
    directions = torch.randn(count, total, generator=draw, dtype=torch.float64)
    directions = directions / directions.norm(dim=1, keepdim=True)
    step = 1e-3 * size * math.sqrt(total) if problem.over == "weights" else 1e-2 * size
    slopes = [_slope(problem, sampler, _like(direction, asked), step) for direction in directions]
    return Slopes(directions, torch.tensor(slopes, dtype=torch.float64))


def _slope(problem: Problem, sampler: Sampler, direction: list[Tensor], step: float) -> float:
    def value(amount: float) -> float:
        moved = problem.moved(direction, amount)
        return float(moved.value(sample(moved.model, moved.x_T, moved.cond, **sampler.arguments()).x0))

    with torch.no_grad(), Unrounded():
        return central_slope(value, step)


def _like(direction: Tensor, asked: list[Tensor]) -> list[Tensor]:
    parts = direction.split([t.numel() for t in asked])
    return [part.reshape(t.shape).to(t.device) for part, t in zip(parts, asked, strict=True)]
