"""At which steps guidance acts, and how often each is taken."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError

#: A number; one for each step of the run; or pairs (part of the run, number), each from that part on.
Repeats = int | Sequence[int] | Sequence[tuple[float, int]]


@dataclass(frozen=True)
class When:
    """The guided steps of a run, and the attempts at each step.

    Args:
        start, stop: fractions of the run: step i of N is guided where ``start <= i / N < stop``.
        steps: instead of them, the numbers of the guided steps (from 0), or a mask with one truth value per step.
        repeats: attempts at each guided step (1: no time travel); a number for each step of the run, guided or not; or
            pairs (fraction of the run, attempts at the guided steps from there on), rising: ``((0.3, 3), (0.6, 1))``
            is FreeDoM's three times from 0.3 on, once from 0.6 on. Guided steps before the first pair are taken once.

    Raises:
        InputError: an impossible value.
    """

    start: float = 0.3
    stop: float = 0.7
    steps: tuple[int, ...] | tuple[bool, ...] | None = None
    repeats: int | tuple[int, ...] | tuple[tuple[float, int], ...] = 1

    def __post_init__(self) -> None:
        numbers = all(isinstance(at, int | float) for at in (self.start, self.stop))
        if not (numbers and 0 <= self.start < self.stop <= 1):
            raise InputError(
                f"guided steps lie in 0 <= start < stop <= 1, fractions of the run; got start = {self.start!r}, "
                f"stop = {self.stop!r} (for numbers of steps use steps=)"
            )
        if self.steps is not None and not self.is_mask:
            bad = [i for i in self.steps if isinstance(i, bool) or not isinstance(i, int) or i < 0]
            if bad or not self.steps or len(set(self.steps)) < len(self.steps):
                raise InputError(
                    f"steps are different numbers from 0 on, or one truth value (True, False) per step; got "
                    f"{self.steps!r}"
                )
        if self._pairs is None:
            counts = [self.repeats] if isinstance(self.repeats, int) else list(self.repeats)
            if not counts or not all(map(_counts, counts)):
                raise InputError(
                    "repeats are whole numbers >= 1, one or one for each step, or pairs (part of the run, number); got "
                    f"{self.repeats!r}"
                )
        elif not all(_counts(k) and 0 <= at < 1 for at, k in self._pairs) or not _rising(self._pairs):
            raise InputError(
                f"repeats={self.repeats!r} must be whole numbers >= 1 from rising parts of the run on, in [0, 1), such "
                "as ((0.3, 1), (0.4, 2))"
            )

    @property
    def _pairs(self) -> list[tuple[float, int]] | None:
        """:attr:`repeats`, where they go by parts of the run."""
        if isinstance(self.repeats, int) or not self.repeats:
            return None
        each = [entry for entry in self.repeats if isinstance(entry, tuple | list)]
        return [(at, k) for at, k in each] if len(each) == len(self.repeats) and _twos(each) else None

    @classmethod
    def of(
        cls,
        start: float,
        stop: float,
        steps: Sequence[int] | Sequence[bool] | None,
        repeats: Repeats,
    ) -> When:
        """The same from lists.

        Raises:
            InputError: an impossible value.
        """
        return cls(
            start, stop, None if steps is None else _listed("steps", steps), _listed("repeats", repeats)
        )

    @property
    def is_mask(self) -> bool:
        """Whether :attr:`steps` has one truth value per step."""
        return bool(self.steps) and all(isinstance(i, bool) for i in self.steps or ())

    def guided(self, total: int) -> list[int]:
        """The guided steps of a run of ``total`` steps, rising.

        Raises:
            InputError: a step is asked for that the run does not have, or none is guided.
        """
        if self.steps is None:
            found = [i for i in range(total) if self.start <= i / total < self.stop]
            if not found:
                low = math.ceil(self.start * total)
                raise InputError(
                    f"no step of {total} lies between {self.start:g} and {self.stop:g} of the run (step {low} begins "
                    f"at {low / total:g}): widen start and stop, or take more steps"
                )
            return found
        if self.is_mask:
            if len(self.steps) != total:
                raise InputError(f"the mask has {len(self.steps)} values for a run of {total} steps")
            found = [i for i, on in enumerate(self.steps) if on]
            if not found:
                raise InputError("the mask guides no step: leave the guidance out, or set one")
            return found
        over = [i for i in self.steps if i >= total]
        if over:
            raise InputError(f"guided step {over[0]} is out of range: the run has steps 0 to {total - 1}")
        return sorted({int(i) for i in self.steps})

    def attempts(self, total: int) -> list[int]:
        """How often each step of a run is taken, in all.

        Raises:
            InputError: the list of repeats is not as long as the run.
        """
        guided, pairs = set(self.guided(total)), self._pairs
        if pairs is not None:
            by_part = [next((k for at, k in reversed(pairs) if at <= i / total), 1) for i in range(total)]
            return [k if i in guided else 1 for i, k in enumerate(by_part)]
        if isinstance(self.repeats, int):
            return [self.repeats if i in guided else 1 for i in range(total)]
        if len(self.repeats) != total:
            raise InputError(
                f"repeats has {len(self.repeats)} numbers for a run of {total} steps; give one, {total}, or pairs "
                "(part of the run, number)"
            )
        return list(self.repeats)  # type: ignore[arg-type]


def published(repeats: Repeats | str, theirs: Repeats) -> Repeats:
    """``repeats``, or a paper's where they are ``"published"``.

    Raises:
        InputError: it is another word.
    """
    if not isinstance(repeats, str):
        return repeats
    if repeats != "published":
        raise InputError(f"repeats are numbers, or 'published' for the paper's, {theirs!r}; got {repeats!r}")
    return theirs


def _listed(name: str, value: Any) -> Any:
    """A whole number as it is, lists as tuples.

    Raises:
        InputError: it is neither.
    """
    if isinstance(value, int) and name == "repeats":
        return value
    if isinstance(value, str | int | float) or not isinstance(value, Iterable):
        what = "numbers from 0 on, or one truth value per step" if name == "steps" else "whole numbers >= 1"
        raise InputError(f"{name} are {what}, in a list; got {value!r}")
    return tuple(tuple(entry) if isinstance(entry, list) else entry for entry in value)


def _counts(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _twos(entries: Sequence[Sequence[Any]]) -> bool:
    return all(len(e) == 2 and isinstance(e[0], int | float) and not isinstance(e[0], bool) for e in entries)


def _rising(pairs: Sequence[tuple[float, int]]) -> bool:
    places = [at for at, _ in pairs]
    return places == sorted(set(places))
