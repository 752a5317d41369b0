"""Which method to use: what the measured rows support, by a stated rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..report.figures import number, seconds, size
from .rows import Row, Target

#: Times closer than this were measured once and say nothing.
SAME_TIME = 0.1

RULE = {
    "sampler": (
        "Of the methods that were measured at the steps asked for, did not fail and fit the memory: those whose error "
        "to the sampler's own gradient is rounding come first, then those within the tolerance. Among the first of "
        "these the fastest; of those within 10 % of its time, the one that holds least."
    ),
    "flow": (
        "Of all rows that did not fail, fit the memory, and whose error to the true flow's gradient is within the "
        "tolerance, the uncertainty of that gradient included: the one with the fewest network calls and "
        "vector–Jacobian products; of equal ones the one that holds least."
    ),
}


@dataclass(frozen=True)
class Recommendation:
    """What the rows support.

    Attributes:
        target: the gradient it is about.
        row: the row; None if none will do.
        text: one or two sentences with the figures.
        rule: how it was found.
    """

    target: Target
    row: Row | None
    text: str
    rule: str

    def as_dict(self) -> dict[str, Any]:
        """For a record."""
        row = self.row
        return {
            "target": self.target,
            "method": None if row is None else row.method,
            "name": None if row is None else row.name,
            "solver": None if row is None else row.solver,
            "steps": None if row is None else row.steps,
            "text": self.text,
            "rule": self.rule,
        }


def recommend(rows: Sequence[Row], target: Target, tolerance: float, memory: int | None) -> Recommendation:
    """What to use for that gradient.

    Args:
        rows: judged; the yardstick is no candidate.
        tolerance: the relative error that will do.
        memory: bytes that may be held; None for any.
    """
    sound = [row for row in rows if row.verdict in ("exact", "within", "off")]
    if target == "sampler":
        sound = [row for row in sound if row.asked]
    good = [row for row in sound if (error := row.error(target)) is not None and error <= tolerance]
    exact = [row for row in sound if target == "sampler" and row.verdict == "exact"]
    for group in (exact, good):
        fitting = [row for row in group if _fits(row, memory)]
        if fitting:
            chosen = _fastest(fitting) if target == "sampler" else min(fitting, key=_work)
            return Recommendation(
                target, chosen, _because(chosen, fitting, target, group is exact), RULE[target]
            )
    return Recommendation(target, None, _nothing(sound, good, target, tolerance, memory), RULE[target])


def _fits(row: Row, memory: int | None) -> bool:
    return memory is None or (row.peak_bytes is not None and row.peak_bytes <= memory)


def _fastest(rows: Sequence[Row]) -> Row:
    least = min(row.seconds or 0.0 for row in rows)
    near = [row for row in rows if (row.seconds or 0.0) <= (1 + SAME_TIME) * least]
    return min(near, key=lambda row: (row.peak_bytes or 0, row.calls or 0))


def _work(row: Row) -> tuple[int, int]:
    return (row.calls or 0) + (row.vjps or 0), row.peak_bytes or 0


def _because(row: Row, fitting: Sequence[Row], target: Target, exact: bool) -> str:
    error = row.error(target)
    assert error is not None
    what = "the sampler's own gradient" if target == "sampler" else "the true flow's gradient"
    far = "0" if error == 0 else number(error, 2)
    text = (
        f"{row.method} on {row.solver}, {row.steps} steps: its error to {what} is {far}, in {row.calls} network calls "
        f"and {row.vjps} vector–Jacobian products, {seconds(row.seconds)}"
    )
    text += f" and {size(row.peak_bytes)}." if row.peak_bytes is not None else "."
    others = len(fitting) - 1
    if others:
        kind = "exact within rounding" if exact else "within the tolerance"
        best = "fastest" if target == "sampler" else "cheapest"
        text += f" {others} other{'s are' if others > 1 else ' is'} {kind}; this is the {best}."
    smaller = [r for r in fitting if (r.peak_bytes or 0) < 0.9 * (row.peak_bytes or 0)]
    if smaller and target == "sampler":
        least = min(smaller, key=lambda r: r.peak_bytes or 0)
        text += (
            f" Where memory is short, {least.method} on {least.solver} holds {size(least.peak_bytes)} and takes "
            f"{seconds(least.seconds)}."
        )
    return text


def _nothing(
    sound: Sequence[Row], good: Sequence[Row], target: Target, tolerance: float, memory: int | None
) -> str:
    what = "the sampler's own gradient" if target == "sampler" else "the true flow's gradient"
    if good:
        least = min(good, key=lambda row: row.peak_bytes or 0)
        return (
            f"None: of {len(good)} rows within {number(tolerance, 2)} of {what} the smallest, {least.method}, holds "
            f"{size(least.peak_bytes)}, and {size(memory)} were allowed."
        )
    known = [row for row in sound if row.error(target) is not None]
    if not known:
        return f"None: no method gave {what}."
    nearest = min(known, key=lambda row: row.error(target) or 0.0)
    hint = " Take more steps, or a solver of higher order." if target == "flow" else ""
    return (
        f"None is within {number(tolerance, 2)} of {what}. The nearest is {nearest.method} on {nearest.solver}, "
        f"{nearest.steps} steps: {number(nearest.error(target), 2)} off at most.{hint}"
    )
