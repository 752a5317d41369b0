"""Finite differences of a function that is rounded: which step to take, and how far the answer can be trusted.

A central difference of fourth order along a line, ``(8 D(h) - D(2h)) / 12h`` with ``D(h) = f(h) - f(-h)``, errs by

- rounding, ``0.95 s / h`` if one value of f is off by s (standard deviation). s is measured: the k-th differences of
  values at narrow spacing have nothing of a smooth f left in them, and for k = 3 their mean square is ``20 s²``
  (Hamming; Moré and Wild, "Estimating computational noise", SIAM J. Sci. Comput. 33, 2011, eq. 2.3, γ_k = (k!)²/(2k)!);
- the curvature of f and its kinks, of which what the next larger step gives instead, and what a difference of second
  order gives, are the measure.

The steps are four, each twice the one before. At the smallest, rounding is a small part of what is looked for. Where
that leaves much doubt (kinks do), smaller ones are tried, as far as rounding lets them tell more. The sum, three
standard deviations for rounding and twice the rest, is the tolerance: it follows from the run, not from a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

_SMALLEST, _LARGEST = 1e-3, 0.04  # first steps, in units of the root mean square of what is moved
_UNSURE = 0.02  # of the slope that is expected: less sure than this, and smaller steps are tried
_PART = 2e-4  # of the slope that is expected: what rounding may do to it at the first step
_POINTS = 6  # values that the rounding is measured on
Leaves = dict[str, Tensor]


@dataclass(frozen=True)
class Slope:
    """A derivative along one direction.

    Attributes:
        predicted: the gradient times the direction.
        error: by how much the finite difference is larger.
        uncertainty: of the finite difference.
        scale: the derivative along a random direction to be expected (its root mean square), to compare with.
    """

    predicted: float
    error: float
    uncertainty: float
    scale: float


def slope(
    value: Callable[[Leaves], float],
    leaves: Leaves,
    gradients: Leaves,
    generator: torch.Generator,
    rounding: float,
) -> Slope:
    """Compare gradients with the finite difference along a random direction.

    Every tensor is moved in proportion to its own root mean square. What it was really moved by, in its own
    precision, is what the gradient is multiplied with, so its rounding is no error.

    Args:
        value: the function.
        leaves: where; any floating-point dtypes.
        gradients: by name, of the same shapes.
        generator: on the CPU; decides the direction.
        rounding: of one value (:func:`rounding_of`).
    """
    way = direction(leaves, generator)
    scale = math.sqrt(
        sum(float((gradients[k].cpu().double() * rms(x)).square().sum()) for k, x in leaves.items())
    )
    first = min(_LARGEST, max(_SMALLEST, 3 * rounding / (_PART * scale))) if scale else _LARGEST
    found = _ladder(value, leaves, gradients, way, rounding, first)
    while found.uncertainty > _UNSURE * scale and 3 * rounding / (first / 8) < found.uncertainty:
        first /= 8  # kinks: nearer, where rounding allows it
        found = min(
            found, _ladder(value, leaves, gradients, way, rounding, first), key=lambda s: s.uncertainty
        )
    return replace(found, scale=scale)


def _ladder(
    value: Callable[[Leaves], float],
    leaves: Leaves,
    gradients: Leaves,
    way: Leaves,
    rounding: float,
    first: float,
) -> Slope:
    """The comparison on four steps from ``first`` up."""
    fourth: dict[float, float] = {}  # by step: how far the difference of fourth order is from the gradient's
    second: dict[float, float] = {}
    predicted = 0.0
    for h in (first, 2 * first, 4 * first, 8 * first):
        ahead, behind = moved(leaves, way, h), moved(leaves, way, -h)
        by = {k: ahead[k].cpu().double() - behind[k].cpu().double() for k in leaves}
        foreseen = sum(float((by[k] * gradients[k].cpu().double()).sum()) for k in leaves)
        second[h] = (value(ahead) - value(behind) - foreseen) / (2 * h)
        predicted = predicted or foreseen / (2 * h)
        if h / 2 in second:
            fourth[h / 2] = (4 * second[h / 2] - second[h]) / 3
    found: list[tuple[float, float]] = []
    for h in (first, 2 * first):
        apart = abs(fourth[h] - second[h]) + abs(fourth[h] - fourth[2 * h])
        doubt = 3 * 0.95 * rounding / h + 2 * apart
        found.append((doubt if math.isfinite(doubt) else math.inf, fourth[h]))
    doubt, error = min(found)
    return Slope(predicted, error, doubt, 1.0)


def rounding_of(value: Callable[[Leaves], float], leaves: Leaves, generator: torch.Generator) -> float:
    """The standard deviation of what rounding does to one value, from third differences at narrow spacing."""
    way = direction(leaves, generator)
    narrow = 8 * max(torch.finfo(x.dtype).eps for x in leaves.values())
    values = [value(moved(leaves, way, i * narrow)) for i in range(_POINTS)]
    for _ in range(3):
        values = [b - a for a, b in pairwise(values)]
    return math.sqrt(sum(v * v for v in values) / len(values) / 20)


def direction(leaves: Leaves, generator: torch.Generator) -> Leaves:
    """Standard normal numbers, times each tensor's root mean square."""
    return {
        k: torch.randn(x.shape, generator=generator, dtype=torch.float64) * rms(x) for k, x in leaves.items()
    }


def rms(x: Tensor) -> float:
    """The root mean square; 1 for zeros."""
    return float(x.detach().cpu().double().square().mean().sqrt()) or 1.0


def moved(leaves: Leaves, way: Leaves, by: float) -> Leaves:
    """The tensors, moved, in their own precision."""
    return {k: (x.detach().cpu().double() + by * way[k]).to(x.dtype).to(x.device) for k, x in leaves.items()}


def judged(slopes: Sequence[Slope], floor: float) -> tuple[float, float]:
    """Error and tolerance, relative to the slope that is expected, of the middle one of several directions.

    Along a random direction all of a gradient counts, so one that is wrong is off along most; a kink that happens to
    lie on one of them is not. Of two the better one is taken.

    Args:
        floor: the least tolerance: the gradient's own rounding.
    """
    rated = [(abs(s.error) / s.scale, floor + s.uncertainty / s.scale) for s in slopes if s.scale > 0]
    rated.sort(key=lambda pair: pair[0] / pair[1])
    return rated[(len(rated) - 1) // 2] if rated else (math.nan, math.nan)
