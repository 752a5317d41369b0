"""A guided run on a small host, and its levels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import backdrift as bd
from pictured import SCHEDULES, denoiser, times_at

RHOS = [8.0, 5.0, 3.2, 2.1, 1.4, 0.9, 0.55, 0.3, 0.15, 0.06]
STEPS = len(RHOS)


def level(schedule: Any, t: float) -> tuple[float, float]:
    return float(schedule.alpha(t)), float(schedule.sigma(t))


def guided_run(guidance: Any, x: Tensor, name: str = "vp", scale: float = 2.0, **kwargs: Any) -> Any:
    schedule, prediction = SCHEDULES[name]
    model, _ = denoiser(schedule, prediction, scale)
    times = times_at(schedule, RHOS)
    cond = torch.full((1, 3, 2, 2), 0.1, dtype=torch.float64)
    first = x * math.hypot(*level(schedule, times[0]))
    return bd.sample(
        model, first, cond, grid=bd.TimeGrid(times), form="exponential", guidance=guidance, **kwargs
    )
