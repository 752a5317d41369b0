"""Numbers that may carry a graph: times, and the coefficients computed from them.

Ordinarily a time is a Python float, and so is every coefficient. Where a gradient by the times is asked for, they are
0-dimensional float64 tensors instead, and the same arithmetic builds their graph. A :class:`Graphed` one refuses to
become a float, so that arithmetic which is made for floats only (``math.log`` of it) raises instead of losing the
gradient in silence; :func:`log` and its neighbours take both kinds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import UnsupportedError

Scalar = float | Tensor


class Graphed(Tensor):
    """A number with a graph that nothing may take out of it unnoticed."""

    def __float__(self) -> float:
        raise UnsupportedError(
            "a gradient by the grid's times is asked for, and something on the way takes them for plain numbers: this "
            "solver (or a function of time among the conditioning) has no gradient by the times. Detach the times, or "
            "use a Runge–Kutta method, AdamsBashforth or DPM-Solver; ContinuousAdjoint gives it for every solver"
        )

    __int__ = __float__  # type: ignore[assignment]

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec)


def graphed(value: Tensor) -> Tensor:
    """``value`` with the guard."""
    return value.as_subclass(Graphed)


def plain(value: Tensor) -> Tensor:
    """``value`` without the guard, with its graph."""
    return value.as_subclass(Tensor)


def number(value: Tensor, like: Any) -> Any:
    """``value`` as a float where ``like`` is one; with its graph where ``like`` is a tensor."""
    return value if isinstance(like, Tensor) else float(value)


def value(scalar: Scalar) -> float:
    """The number itself, without a graph."""
    return scalar.item() if isinstance(scalar, Tensor) else scalar


def finite(scalar: Scalar) -> bool:
    """Whether it is neither NaN nor infinite."""
    return math.isfinite(value(scalar))


def log(scalar: Any) -> Any:
    """The natural logarithm."""
    return torch.log(scalar) if isinstance(scalar, Tensor) else math.log(scalar)


def expm1(scalar: Any) -> Any:
    """e^scalar - 1."""
    return torch.expm1(scalar) if isinstance(scalar, Tensor) else math.expm1(scalar)


def add_scaled(y: Tensor, terms: Sequence[tuple[Any, Tensor]]) -> Tensor:
    """y + Σ c k; the numbers c are float64 and are applied in y's dtype."""
    for c, k in terms:
        if isinstance(c, Tensor):
            y = y + plain(c) * k
        elif c != 0:
            y = y.add(k, alpha=c)
    return y


def rescaled(x: Tensor, factor: Any) -> Tensor:
    """factor * x, without a pass over memory where the factor is the plain number 1."""
    if isinstance(factor, Tensor):
        return x * plain(factor)
    return x if factor == 1 else x * factor
