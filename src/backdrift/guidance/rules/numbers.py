"""Numbers and levels that rules can work with, checked; tensors of a shape and precision to reckon with."""

from __future__ import annotations

import math

from torch import Tensor

from ...errors import InputError
from ...host import Host
from ..strengths import Strength


def positive(name: str, value: object, *, zero: bool = False) -> None:
    """Raise unless ``value`` is a finite number > 0 (or 0, where that is allowed).

    Raises:
        InputError: it is not.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not (value > 0 or (zero and value == 0)):  # type: ignore[operator]
        raise InputError(f"{name} must be a finite number {'>= 0' if zero else '> 0'}; got {value!r}")


def positive_or_strength(name: str, value: object, *, zero: bool = False) -> None:
    """Raise unless ``value`` is a :class:`~backdrift.guidance.Strength`, or as :func:`positive` has it.

    Raises:
        InputError: it is neither.
    """
    if not isinstance(value, Strength):
        positive(name, value, zero=zero)


def fits(batch: int, *values: float | Strength) -> None:
    """Raise unless the strengths among ``values`` are for that many samples.

    Raises:
        InputError: one is not.
    """
    for value in values:
        if isinstance(value, Strength):
            value.check(batch)


def whole(name: str, value: object, least: int) -> None:
    """Raise unless ``value`` is a whole number of at least ``least``.

    Raises:
        InputError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be a whole number >= {least}; got {value!r}")


def signal(name: str, host: Host) -> None:
    """Raise unless there is signal in the state that a host steps from.

    Raises:
        InputError: alpha = 0 there.
    """
    if host.start.alpha == 0:
        raise InputError(
            f"{name} is singular in step {host.index + 1} of {host.total}, which begins at pure noise (alpha = 0): "
            "guide from a later step on (start=, steps=), or use FreeDoM, MPGD or SymplecticAdjointGuidance"
        )


def column(values: Tensor, like: Tensor) -> Tensor:
    """``values`` (B,) as (B, 1, …), to be multiplied with ``like`` (B, …), in its dtype."""
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 1))
