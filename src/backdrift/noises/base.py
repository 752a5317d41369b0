"""What a source of noise offers: standard normals for the steps of one run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor

from ..schedules import Schedule

Draw = Callable[[Tensor, float, float, float], Tensor]
"""``draw(mean, std, start, end)`` -> the noise of the step from time ``start`` to ``end``, which goes to ``mean + std *
noise``: standard normal, of the mean's shape, dtype and device."""


class Noise(ABC):
    """A source of noise. It is asked, not consumed: the same step of the same run always gets the same noise."""

    @abstractmethod
    def path(self, schedule: Schedule, times: Sequence[float], x: Tensor) -> Draw:
        """The noise of one run.

        Args:
            schedule: the forward process.
            times: the run's falling nodes.
            x: its first state (B, …).

        Raises:
            InputError: the source does not fit the run.
        """
