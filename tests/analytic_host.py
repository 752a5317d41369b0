"""A host of guidance with nothing in it but closed forms: DDIM on data with a known best prediction."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from backdrift.denoiser import Denoiser
from backdrift.guidance import Guidance
from backdrift.host import Continuation, Evaluation, Host, Level
from backdrift.schedules import Schedule


def picture(x0: Tensor) -> Tensor:
    """Pictures (B, 3, 1, 1) near [0, 1] of three numbers each; curved, as a decoder is."""
    return (0.5 + 0.2 * x0 + 0.05 * torch.sin(2 * x0)).view(len(x0), 3, 1, 1)


class AnalyticHost(Host):
    """One DDIM step x' = alpha' x0 + sigma' eps of a run over ``times``.

    Args:
        network: ``network(z, t, cond)`` in ``prediction``, z in the schedule's coordinates.
        scales: of the host's own coordinates, one per node: ``x = z / scale``.
        guidance_scale: with ``uncond``, as in Denoiser.
    """

    def __init__(
        self,
        network: Any,
        schedule: Schedule,
        prediction: str,
        times: Sequence[float],
        index: int,
        x: Tensor,
        cond: Any,
        *,
        uncond: Any = None,
        guidance_scale: float = 1.0,
        exploding: bool = False,
    ) -> None:
        self.model = Denoiser(network, schedule, prediction, guidance_scale=guidance_scale, uncond=uncond)
        self.times, self.index, self.total, self.x, self.cond = list(times), index, len(times) - 1, x, cond
        native = [Level(float(schedule.alpha(t)), float(schedule.sigma(t))) for t in times]
        self.scales = [level.alpha if exploding else 1.0 for level in native]
        own = [Level(level.alpha / s, level.sigma / s) for level, s in zip(native, self.scales, strict=True)]
        self.levels = tuple(itertools.pairwise(own))
        self.native, self.calls = native[index], 0
        self.start, self.end = self.levels[index]
        self._known: Evaluation | None = None

    def evaluate(self, x: Tensor) -> Evaluation:
        if x is self.x and self._known is not None:
            return self._known
        self.calls += 1
        z, t = self.scales[self.index] * x, self.times[self.index]
        clock = torch.full((len(z),), t, dtype=torch.float64)
        output, more = self.model.network(z, clock, self.cond), None
        if self.model.guidance_scale != 1:
            uncond = self.model.network(z, clock, self.model.uncond)
            more = output - uncond
            output = uncond + self.model.guidance_scale * more
        found = Evaluation(z, output, self.model.prediction, self.native, t, more, self.model.guidance_scale)
        if x is self.x:
            self._known = found
        return found

    def step(self, x: Tensor, evaluation: Evaluation) -> Tensor:
        return self.end.alpha * evaluation.x0 + self.end.sigma * evaluation.eps

    def continuation(self, evaluation: Evaluation) -> Continuation:
        return Continuation(self.model, self.cond, self.scales[self.index], tuple(self.times[self.index :]))

    def decode(self, x0: Tensor) -> Tensor:
        return picture(x0)


def run(guidance: Guidance, x: Tensor, times: Sequence[float], **how: Any) -> list[Tensor]:
    """The states at the nodes of a guided run, in unit coordinates (alpha² + sigma² = 1), from a state in them."""
    guidance.begin(len(times) - 1, len(x))
    states = [x]
    for index, _ in enumerate(itertools.pairwise(times)):
        first = AnalyticHost(times=times, index=index, x=x, **how)
        host = AnalyticHost(times=times, index=index, x=states[-1] * math.hypot(*first.start), **how)
        with torch.no_grad():
            states.append(guidance.advance(host) / math.hypot(*host.end))
    return states
