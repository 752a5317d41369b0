"""Standard normals from counters: a pure function of integers, the same on every device and in every batch.

The bits are SplitMix64's (Steele, Lea & Flood 2014): ``mix(state + i * GOLDEN)`` is the i-th output of a stream.
Here streams are keyed, not run through: a number depends on its row's key, its label and its place alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_BITS = 1 << 64


def _signed(value: int) -> int:
    """The 64 bits of ``value`` as torch's int64 holds them."""
    value %= _BITS
    return value - _BITS if value >= _BITS >> 1 else value


GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser, element by element on int64 (whose products wrap)."""
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def stream(key: Tensor, counters: Tensor) -> Tensor:
    """Outputs number ``counters`` (from 0) of the streams whose states are ``key``; the shapes broadcast."""
    return mix(key + (counters + 1) * GOLDEN)


def row_keys(seeds: Sequence[int], rows: Sequence[int]) -> Tensor:
    """One key (B,) per row, from its seed (any integer) and its number."""
    states = torch.tensor([_signed(seed) for seed in seeds], dtype=torch.int64)
    return stream(mix(states), torch.tensor(rows, dtype=torch.int64))


def normals(keys: Tensor, labels: Sequence[int], places: Tensor) -> Tensor:
    """Independent standard normals, float64, (labels, rows, places).

    Args:
        keys: one per row (B,), int64.
        labels: non-negative integers.
        places: ``stream(0, …)`` of the places' numbers (n,), int64: hashed once, used for every row and label.
    """
    own = stream(keys, torch.tensor(labels, dtype=torch.int64, device=keys.device)[:, None])
    bits = _shifted(mix(own[..., None] ^ places), 11)
    # The inverse of the distribution function, at the middle of one of 2^53 equal parts of (-1, 1).
    return torch.erfinv((bits.double() + 0.5) * 2.0**-52 - 1) * math.sqrt(2)


def _shifted(z: Tensor, by: int) -> Tensor:
    """z >> by with zeros from the left; torch's own shift copies the sign."""
    return (z >> by) & ((1 << (64 - by)) - 1)
