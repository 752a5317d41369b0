"""Falling curves through equally spaced points (0, v_0), (1, v_1), …: values, slopes and exact inverses, float64."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .errors import InputError


class Curve(Protocol):
    """A strictly falling function on [0, n - 1] given by its values at the integers."""

    values: Tensor

    def __call__(self, t: Tensor) -> Tensor: ...

    def slope(self, t: Tensor) -> Tensor: ...

    def inverse(self, value: Tensor) -> Tensor:
        """t with curve(t) = value. Beyond the ends the outer pieces go on, so t leaves [0, n - 1] there."""


def _piece(values: Tensor, t: Tensor) -> Tensor:
    """Index of the piece that holds t; an integer belongs to the piece below it (time falls)."""
    return (t.ceil() - 1).clamp(0, len(values) - 2).to(torch.int64)


def _piece_of_value(values: Tensor, value: Tensor) -> Tensor:
    found = torch.searchsorted((-values).contiguous(), (-value).contiguous())
    return (found - 1).clamp(0, len(values) - 2)


class MonotoneLine:
    """Straight pieces."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __call__(self, t: Tensor) -> Tensor:
        i = _piece(self.values, t)
        w = t - i
        # Weights that are exactly 0 and 1 at the points give the table's own numbers back.
        return (1 - w) * self.values[i] + w * self.values[i + 1]

    def slope(self, t: Tensor) -> Tensor:
        i = _piece(self.values, t)
        return self.values[i + 1] - self.values[i]

    def inverse(self, value: Tensor) -> Tensor:
        i = _piece_of_value(self.values, value)
        return i + (self.values[i] - value) / (self.values[i] - self.values[i + 1])


class MonotoneSpline:
    """The twice differentiable cubic spline with "not-a-knot" ends (exact for cubics).

    Raises:
        InputError: the spline through these values does not fall everywhere.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.second = _second_derivatives(values)
        n = len(values)
        fine = torch.linspace(0, n - 1, 8 * (n - 1) + 1, dtype=torch.float64)
        if not bool((self.slope(fine) < 0).all()):
            raise InputError(
                "a spline through log(alphas_cumprod) is not monotone; use interpolation='linear'"
            )

    def __call__(self, t: Tensor) -> Tensor:
        i = _piece(self.values, t)
        return self._cubic(i, t - i)

    def _cubic(self, i: Tensor, w: Tensor) -> Tensor:
        a, b, m, k = self.values[i], self.values[i + 1], self.second[i], self.second[i + 1]
        u = 1 - w
        return u * a + w * b + ((u**3 - u) * m + (w**3 - w) * k) / 6

    def _slope(self, i: Tensor, w: Tensor) -> Tensor:
        a, b, m, k = self.values[i], self.values[i + 1], self.second[i], self.second[i + 1]
        return b - a + ((1 - 3 * (1 - w) ** 2) * m + (3 * w**2 - 1) * k) / 6

    def slope(self, t: Tensor) -> Tensor:
        i = _piece(self.values, t)
        return self._slope(i, t - i)

    def inverse(self, value: Tensor) -> Tensor:
        i = _piece_of_value(self.values, value)
        w = (self.values[i] - value) / (self.values[i] - self.values[i + 1])
        # Newton from the chord: the pieces are nearly straight, so two or three rounds reach rounding.
        for _ in range(8):
            move = (self._cubic(i, w) - value) / self._slope(i, w)
            w = w - move
            if not bool((move.abs() > 1e-13).any()):
                break
        return i + w


def _second_derivatives(values: Tensor) -> Tensor:
    """Second derivatives at the points: m_{i-1} + 4 m_i + m_{i+1} = 6 Δ²v_i, ends m_0 = 2 m_1 - m_2."""
    n = len(values)
    rhs = 6 * (values[2:] - 2 * values[1:-1] + values[:-2])
    # With the end rule the first and last inner equations become 6 m_1 = rhs and 6 m_{n-2} = rhs.
    diagonal, off = [4.0] * (n - 2), [1.0] * (n - 3)
    diagonal[0] = diagonal[-1] = 6.0
    upper, lower = off.copy(), off.copy()
    upper[0] = lower[-1] = 0.0
    inner, c, d = rhs.tolist(), [0.0] * (n - 2), [0.0] * (n - 2)
    for i in range(n - 2):  # Thomas algorithm
        below = lower[i - 1] if i else 0.0
        pivot = diagonal[i] - below * (c[i - 1] if i else 0.0)
        c[i] = (upper[i] if i < n - 3 else 0.0) / pivot
        d[i] = (inner[i] - below * (d[i - 1] if i else 0.0)) / pivot
    m = d.copy()
    for i in range(n - 4, -1, -1):
        m[i] = d[i] - c[i] * m[i + 1]
    return torch.tensor([2 * m[0] - m[1], *m, 2 * m[-1] - m[-2]], dtype=torch.float64)
