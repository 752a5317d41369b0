"""At which steps guidance acts, and how often each is taken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InputError


@dataclass(frozen=True)
class When:
    """The guided steps of a run, and the attempts at each step.

    Args:
        start, stop: fractions of the run: step i of N is guided where ``start <= i / N < stop``.
        steps: instead of them, the numbers of the guided steps (from 0), or a mask with one truth value per step.
        repeats: attempts at each guided step (1: no time travel), or a number for each step of the run, guided or not.

    Raises:
        InputError: an impossible value.
    """

    start: float = 0.3
    stop: float = 0.7
    steps: tuple[int, ...] | tuple[bool, ...] | None = None
    repeats: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        if not (0 <= self.start < self.stop <= 1):
            raise InputError(
                f"guided steps lie in 0 <= start < stop <= 1, fractions of the run; got start = {self.start!r}, "
                f"stop = {self.stop!r} (for numbers of steps use steps=)"
            )
        if self.steps is not None and not self.is_mask:
            bad = [i for i in self.steps if isinstance(i, bool) or not isinstance(i, int) or i < 0]
            if bad or not self.steps:
                raise InputError(
                    f"steps are numbers from 0 on, or one truth value per step; got {self.steps!r}"
                )
        counts = [self.repeats] if isinstance(self.repeats, int) else list(self.repeats)
        if not counts or any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in counts):
            raise InputError(
                f"repeats are whole numbers >= 1, one or one for each step; got {self.repeats!r}"
            )

    @classmethod
    def of(
        cls,
        start: float,
        stop: float,
        steps: Sequence[int] | Sequence[bool] | None,
        repeats: int | Sequence[int],
    ) -> When:
        """The same from lists."""
        return cls(
            start,
            stop,
            None if steps is None else tuple(steps),
            repeats if isinstance(repeats, int) else tuple(repeats),
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
        if isinstance(self.repeats, int):
            guided = set(self.guided(total))
            return [self.repeats if i in guided else 1 for i in range(total)]
        if len(self.repeats) != total:
            raise InputError(
                f"repeats has {len(self.repeats)} numbers for a run of {total} steps; give one, or {total}"
            )
        return list(self.repeats)
