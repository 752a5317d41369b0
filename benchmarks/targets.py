"""What the exact gradient promises, checked against a results file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from .methods import LADDER
from .record import Figures

TO_PLAIN = {"all": 1.30, "x_T": 1.50}
AT_MAX = 1.05
TO_CHECKPOINT = 1.03
TO_ONE_STEP = 1.05
TO_BUDGET = 1.05
FLAT = 1.05
TO_TORCHDIFFEQ_MEMORY = 0.4
# A rung keeps more calls than the one below it; two medians may still differ by this much by chance.
CHANCE = 1.03


@dataclass(frozen=True)
class Target:
    """One promise: ``value`` must not exceed ``limit``."""

    text: str
    value: float
    limit: float

    @property
    def met(self) -> bool:
        return self.value <= self.limit

    def __str__(self) -> str:
        return f"{'pass' if self.met else 'FAIL'}  {self.text}: {self.value:.3f} (at most {self.limit:g})"


def targets(figures: Figures) -> list[Target]:
    """All promises that the measurements can decide."""
    found: list[Target] = []
    for steps, wants in figures.cases:
        case = f"N={steps} {wants}"
        found += _times(figures, steps, wants, case)
        found += _counts(figures, steps, wants, case)
    for wants in ("all", "x_T"):
        found += _memory(figures, wants)
    return found


def _times(figures: Figures, steps: int, wants: str, case: str) -> Iterator[Target]:
    pairs = [
        ("exact-min", "plain", TO_PLAIN[wants]),
        ("exact-max", "plain", AT_MAX),
        ("exact-min", "checkpoint", TO_CHECKPOINT),
        ("exact-min", "torchdiffeq", 1.0),
    ]
    for method, to, limit in pairs:
        ratio = figures.ratio(steps, wants, method, to)
        if ratio is not None:
            yield Target(f"{case}: time of {method} over {to}", ratio, limit)
    ladder = ["exact-min", *LADDER, "exact-max"]
    measured = [(m, figures.seconds(steps, wants, m)) for m in ladder]
    timed = [(m, s) for m, s in measured if s is not None]
    for (less, before), (more, after) in pairwise(timed):
        yield Target(f"{case}: time of {more} over {less}, which has less memory", after / before, CHANCE)


def _counts(figures: Figures, steps: int, wants: str, case: str) -> Iterator[Target]:
    ours = [name for name in figures.methods(steps, wants) if name.startswith("exact")]
    runs = [run for name in ours for run in figures.repeats(steps, wants, name)]
    if runs:
        yield Target(
            f"{case}: most network calls of a plan over N", max(run["calls"] for run in runs) / steps, 2.0
        )
        differing = sum(not run["bits_equal"] for run in runs)
        yield Target(
            f"{case}: runs of {len(runs)} whose gradients differ in a bit from plain's", differing, 0
        )


def _memory(figures: Figures, wants: str) -> Iterator[Target]:
    one_step = figures.peak(1, wants, "one step")
    measured = figures.steps_with_peak(wants, "exact-min")
    latent = figures.data["settings"]["latent_bytes"]
    for steps in measured:
        peak = figures.peak(steps, wants, "exact-min")
        assert peak is not None
        if one_step is not None:
            beside = peak - (steps + 1) * latent
            text = f"N={steps} {wants}: memory of exact-min, latents aside, over one step's backpropagation"
            yield Target(text, beside / one_step, TO_ONE_STEP)
        peer = figures.peak(steps, wants, "torchdiffeq")
        if peer is not None and wants == "all":
            yield Target(
                f"N={steps} {wants}: memory of exact-min over torchdiffeq", peak / peer, TO_TORCHDIFFEQ_MEMORY
            )
        for rung in LADDER:
            budget, held = figures.budget(steps, wants, rung), figures.peak(steps, wants, rung)
            if budget is not None and held is not None:
                yield Target(f"N={steps} {wants}: memory of {rung} over its budget", held / budget, TO_BUDGET)
    if len(measured) > 1:
        ends = [
            (figures.peak(n, wants, "exact-min") or 0) - (n + 1) * latent for n in (measured[0], measured[-1])
        ]
        first, last = ends
        text = f"{wants}: memory of exact-min, latents aside, at N={measured[-1]} over N={measured[0]}"
        yield Target(text, last / first, FLAT)
