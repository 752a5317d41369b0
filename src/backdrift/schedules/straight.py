"""Schedules whose sigma is the time itself: EDM and rectified flow."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import InputError
from .base import Schedule, Times, float64


class EDM(Schedule):
    """alpha = 1, sigma = t (Karras et al. 2022; also "variance exploding"). ``x_T`` is noise times sigma(T).

    The default ends are the paper's 80 and 0.002.
    """

    t_max = math.inf
    start, end = 80.0, 0.002

    def __repr__(self) -> str:
        return "EDM()"

    def _log_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return t

    def _dalpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def _dsigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _inverse(self, lam: Tensor) -> Tensor:
        return (-lam).exp()

    def times(self, t: Times) -> Tensor:
        t = float64(t)
        if not bool(((t >= 0) & torch.isfinite(t)).all()):
            raise InputError(
                f"EDM() is defined for finite t = sigma >= 0; got t = {t.min().item():g}…{t.max().item():g}"
            )
        return t


class Flow(Schedule):
    """Rectified flow: alpha = 1 - t, sigma = t, t in [0, 1] (Liu et al. 2023; Lipman et al. 2023)."""

    t_max = 1.0
    start, end = 1.0, 0.0

    def __repr__(self) -> str:
        return "Flow()"

    def _alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def _log_alpha(self, t: Tensor) -> Tensor:
        return torch.log1p(-t)

    def _sigma(self, t: Tensor) -> Tensor:
        return t

    def _dalpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def _dsigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _inverse(self, lam: Tensor) -> Tensor:
        return torch.sigmoid(-lam)
