"""What a gradient method is: a way to make the network calls of one run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from ..denoiser import Denoiser
from ..forms import Call
from ..stats import RunStats


class GradientMethod(ABC):
    """How the gradient of a run is had. The time loop is the same for all; only its network calls differ."""

    @abstractmethod
    def begin(self, model: Denoiser, x: Tensor, cond: Any, evaluations: int, stats: RunStats) -> Call:
        """The evaluation ``call(x, t)`` to use throughout one run.

        Args:
            model: the denoiser.
            x: the run's first state; its batch and device are the run's.
            cond: the conditioning, any nest.
            evaluations: how many evaluations the run will make.
            stats: counts are added here, also by later backward passes.
        """
