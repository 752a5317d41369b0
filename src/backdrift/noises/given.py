"""Noises handed in as tensors, one per step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

from ..errors import InputError
from ..schedules import Schedule
from .base import Draw, Noise


class GivenNoise(Noise):
    """The noises themselves; gradients reach those that require grad.

    Args:
        noises: one tensor per step of the run, in order, each of the state's shape (or all stacked in one, steps
            first). Standard normal for a sample of the model; any value is allowed.

    Raises:
        InputError: not tensors; when a run begins, another number than its steps, or another shape or device
            than its state.
    """

    def __init__(self, noises: Sequence[Tensor] | Tensor) -> None:
        found = tuple(noises)
        wrong = [n for n in found if not isinstance(n, Tensor) or not n.is_floating_point()]
        if wrong or not found:
            shown = (
                f"a {wrong[0].dtype} tensor"
                if wrong and isinstance(wrong[0], Tensor)
                else repr(wrong or found)[:60]
            )
            raise InputError(f"noises must be floating tensors, one per step; got {shown}")
        self.noises = found

    def __repr__(self) -> str:
        return f"GivenNoise({len(self.noises)} tensors)"

    def path(self, schedule: Schedule, times: Sequence[float], x: Tensor) -> Draw:
        if len(self.noises) != len(times) - 1:
            raise InputError(
                f"{len(self.noises)} noises were given for a run of {len(times) - 1} steps: give one each"
            )
        for i, noise in enumerate(self.noises):
            if noise.shape != x.shape or noise.device != x.device:
                raise InputError(
                    f"noise {i} has shape {tuple(noise.shape)} on {noise.device}; the state has "
                    f"{tuple(x.shape)} on {x.device}"
                )
        steps = dict(zip(itertools.pairwise(times), self.noises, strict=True))

        def draw(mean: Tensor, std: float, start: float, end: float) -> Tensor:
            if (start, end) not in steps:
                raise InputError(
                    f"a solver asked for the noise from t = {start:g} to {end:g}, which is not a step of the grid: "
                    "use noise=Brownian(seed), which can be read at any time"
                )
            return steps[start, end].to(mean.dtype)

        return draw
