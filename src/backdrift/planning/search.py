"""Of all choices that fit a budget, the one that costs least time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from .choices import Choices
from .job import Job
from .timeline import Estimate, estimate

__all__ = ["Option", "fitting", "frontier", "next_faster", "smallest"]


@dataclass(frozen=True)
class Option:
    """Choices and what they need."""

    choices: Choices
    needs: Estimate

    @property
    def _rank(self) -> tuple[float, int, int]:
        return (self.needs.cost, len(self.choices.changes), self.needs.peak)


def option(job: Job, choices: Choices) -> Option:
    return Option(choices, estimate(job, choices))


def fitting(job: Job, tactics: Sequence[Choices], budget: int) -> Option | None:
    """The fastest option within ``budget`` bytes, with as many calls kept as fit; None if nothing fits.

    One that repeats the undivided arithmetic is taken before any that divides a batch, which costs the last digit; and
    both before any that brings weights layer by layer, which costs most time.
    """
    plain = option(job, Choices(weights=tactics[0].weights))
    if plain.needs.peak <= budget:  # nothing else has to be measured
        return plain
    for streamed in (False, True):
        some = [choices for choices in tactics if streamed or choices.weights != "stream"]
        same = [choices for choices in some if choices.same_bits]
        found = _fastest(job, same, budget) or _fastest(job, some, budget)
        if found is not None:
            return found
    return None


def _fastest(job: Job, tactics: Iterable[Choices], budget: int) -> Option | None:
    found: Option | None = None
    for everything in sorted((option(job, choices) for choices in tactics), key=lambda o: o._rank):
        # With all calls kept a way is as fast as it gets.
        if found is not None and everything.needs.cost > found.needs.cost:
            break
        best = _most_kept(job, everything, budget)
        if best is not None and (found is None or best._rank < found._rank):
            found = best
    return found


def smallest(job: Job, tactics: Sequence[Choices]) -> Option:
    """The option that needs the least memory; among equals the fastest."""
    options = [option(job, replace(choices, keep=0)) for choices in tactics]
    return min(options, key=lambda o: (o.needs.peak, *o._rank))


def next_faster(job: Job, tactics: Sequence[Choices], chosen: Option) -> Option | None:
    """Of the options that are faster than ``chosen``, the one that needs least memory beyond its; None for the fastest.

    Only of its own kind: no batch is divided that it leaves whole, no weights are brought layer by layer.
    """
    own = chosen.choices
    found: list[Option] = []
    for choices in tactics:
        if (own.same_bits and not choices.same_bits) or (choices.weights == "stream" != own.weights):
            continue
        fastest = option(job, choices)
        if fastest.needs.cost >= chosen.needs.cost:
            continue
        low, high = -1, job.graded_calls  # low is too slow; high is fast enough
        while high - low > 1:
            middle = (low + high) // 2
            if option(job, replace(choices, keep=middle)).needs.cost < chosen.needs.cost:
                high = middle
            else:
                low = middle
        some = [] if high == job.graded_calls else [option(job, replace(choices, keep=high))]
        found += [o for o in (fastest, *some) if o.needs.peak > chosen.needs.peak]
    return min(found, key=lambda o: o.needs.peak, default=None)


def frontier(job: Job, tactics: Sequence[Choices]) -> list[Option]:
    """The options that no other beats in both time and memory, the fastest first: all calls kept, none, some between.

    Of options whose time differs by less than a hundredth, the one with the least memory stands for all.
    """
    total = job.graded_calls
    kept = sorted(
        {None, 0, *(total * i // 4 for i in (1, 2, 3))} - {total}, key=lambda k: (k is not None, -(k or 0))
    )
    options = [option(job, replace(choices, keep=k)) for choices in tactics for k in kept]
    options.sort(key=lambda o: (o._rank[0], o.needs.peak, o._rank[1]))
    found: list[Option] = []
    for candidate in options:
        if not found:
            found.append(candidate)
        elif candidate.needs.peak < 0.99 * found[-1].needs.peak:
            if candidate.needs.cost < 1.01 * found[-1].needs.cost and len(found) > 1:
                found.pop()
            found.append(candidate)
    return found


def _most_kept(job: Job, everything: Option, budget: int) -> Option | None:
    """The same tactics with as many calls kept as fit."""
    if everything.needs.peak <= budget:
        return everything
    best = option(job, replace(everything.choices, keep=0))
    if best.needs.peak > budget:
        return None
    low, high = 0, job.graded_calls + 1  # low fits; high is more than there are
    while high - low > 1:
        middle = (low + high) // 2
        tried = option(job, replace(everything.choices, keep=middle))
        if tried.needs.peak <= budget:
            low, best = middle, tried
        else:
            high = middle
    return best
