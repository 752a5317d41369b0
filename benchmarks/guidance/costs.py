"""What a run costs, in seconds of a machine that does nothing else: counts times unit times.

Runs are long and machines are shared, so that their wall times say little. Network calls, vector–Jacobian products and
decodings are counted exactly; their unit times are medians measured side by side in one process (:mod:`.units`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from .ways import DOODL, ITERATIONS, SAG, TFG, UNGUIDED, Way


class Counts(NamedTuple):
    """Of one run of a batch."""

    forward: int = 0
    redone: int = 0
    vjps: int = 0
    decodes: int = 0

    def __mul__(self, times: int) -> Counts:  # type: ignore[override]
        return Counts(*(times * n for n in self))

    def __add__(self, other: Counts) -> Counts:  # type: ignore[override]
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Units:
    """Seconds of one batch.

    Attributes:
        forward: a guided network call without a graph, and the scheduler's step.
        product: such a call redone with its graph, and its vector–Jacobian product.
        decode: a decoding, the loss of the pictures, and its gradient by the clean latents.
    """

    forward: float
    product: float
    decode: float

    def seconds(self, counts: Counts) -> float:
        """Of a run with these counts."""
        lone = counts.forward + counts.redone - counts.vjps
        return lone * self.forward + counts.vjps * self.product + counts.decodes * self.decode

    @property
    def facts(self) -> dict[str, Any]:
        """For the results file."""
        return asdict(self)


def attempt(way: Way) -> Counts:
    """Of one attempt at one guided step; of DOODL's one optimisation step on ``n`` steps of EDICT."""
    if way.rule == DOODL:
        return Counts(2 * way.n, 2 * way.n, 2 * way.n, 2)
    n = way.n if way.rule == SAG else 1
    return Counts(n, n, n, ITERATIONS if way.rule == TFG else 1)


def expected(way: Way, total: int) -> Counts:
    """Of a whole run of ``total`` steps (DOODL: of EDICT)."""
    if way.rule == UNGUIDED:
        return Counts(total)
    if way.rule == DOODL:
        return attempt(way) * way.attempts + Counts(2 * way.n)
    repeats, guided = way.repeats(total), way.guided(total)
    return attempt(way) * sum(repeats[i] for i in guided) + Counts(total - len(guided))


def attempts_for(seconds: float, way: Way, total: int, units: Units) -> int:
    """How many attempts come nearest to a run of so many seconds.

    At least one; of the other methods than ours, at least one at each step of the range, as published.
    """
    least = 1 if way.rule in (DOODL, SAG) else len(replace(way, attempts=0).guided(total))

    def beside(attempts: int) -> float:
        return units.seconds(expected(replace(way, attempts=attempts), total)) - seconds

    attempts = least
    while beside(attempts + 1) <= 0:
        attempts += 1
    return attempts if abs(beside(attempts)) <= abs(beside(attempts + 1)) else attempts + 1
