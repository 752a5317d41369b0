"""How many network calls and products a method needs for a gradient so near the true flow's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

TARGET = 1e-3
STEPS = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
TOLERANCES = tuple(10 ** (-1 - k / 4) for k in range(25))  # 1e-1 … 1e-7, four a decade
ENOUGH = TARGET / 10  # beyond it nothing more is learnt about the target


class Reached(NamedTuple):
    """The cheapest setting that reaches the target; ``value`` is the knob's."""

    method: str
    value: float
    calls: int
    products: int
    error: float

    @property
    def total(self) -> int:
        """Calls and products."""
        return self.calls + self.products


def worst(cell: dict[str, Any]) -> float:
    """The largest of a cell's errors; infinite where one is no number."""
    return max((e if math.isfinite(e) else math.inf) for e in cell["errors"].values())


def search(measure: Callable[[float], float], knob: str, steps: Sequence[int] = STEPS) -> None:
    """Measure a method's error along its knob: coarsely, until it is far below the target, and then at whole numbers
    of steps until the first that reaches it is known.

    Args:
        measure: ``measure(value)`` -> the worst error there.
        knob: ``"steps"`` or ``"tolerance"``.
        steps: the coarse ones.
    """
    if knob == "tolerance":
        for value in TOLERANCES:
            if measure(value) < ENOUGH:
                return
        return
    failed, reached = 0, None
    for value in steps:
        error = measure(value)
        if error <= TARGET and reached is None:
            reached = value
        if reached is None:
            failed = value
        if error < ENOUGH:
            break
    while reached is not None and reached - failed > 1:
        middle = (failed + reached) // 2
        if middle < steps[0]:
            break
        if measure(middle) <= TARGET:
            reached = middle
        else:
            failed = middle


def cheapest(cells: Iterable[dict[str, Any]], target: float = TARGET) -> list[Reached]:
    """For every method the cheapest of its cells that reach the target, cheapest first. Those that never do are left
    out."""
    best: dict[str, Reached] = {}
    for cell in cells:
        error = worst(cell)
        found = Reached(cell["method"], cell["value"], cell["calls"], cell["products"], error)
        if error <= target and (cell["method"] not in best or found.total < best[cell["method"]].total):
            best[cell["method"]] = found
    return sorted(best.values(), key=lambda r: (r.total, r.method))
