"""The noises that lead through given states."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

from ..errors import InputError
from ..schedules import Schedule
from .base import Draw, Noise


class Toward(Noise):
    """Of each step the noise with which it ends at a given state: ``(state - mean) / std``.

    Args:
        states: one per node of the run after the first.

    Attributes:
        found: the noises of the last run, one per step that had any.
    """

    def __init__(self, states: Sequence[Tensor]) -> None:
        self.states = tuple(states)
        self.found: list[Tensor] = []

    def __repr__(self) -> str:
        return f"Toward({len(self.states)} states)"

    def path(self, schedule: Schedule, times: Sequence[float], x: Tensor) -> Draw:
        steps = dict(zip(itertools.pairwise(times), self.states, strict=True))
        self.found = []

        def draw(mean: Tensor, std: float, start: float, end: float) -> Tensor:
            if (start, end) not in steps:
                raise InputError(
                    f"the solver adds noise from t = {start:g} to {end:g}, inside a step: no single noise leads "
                    "through given states; use a solver that adds one noise a step"
                )
            self.found.append((steps[start, end] - mean) / std)
            return self.found[-1]

        return draw
