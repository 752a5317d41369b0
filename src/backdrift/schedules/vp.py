"""Variance-preserving schedules: linear, cosine, and any trained table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..curves import Curve, MonotoneLine, MonotoneSpline
from ..errors import InputError
from .base import Schedule


def _one_minus(log_alpha: Tensor) -> Tensor:
    """sqrt(1 - alpha²) without cancellation."""
    return (-torch.expm1(2 * log_alpha)).sqrt()


def _log_alpha_of_lam(lam: Tensor) -> Tensor:
    """log alpha of a variance-preserving process: -softplus(-2 lam)/2, without torch's threshold."""
    return -0.5 * torch.logaddexp(torch.zeros_like(lam), -2 * lam)


class VP(Schedule):
    """Variance-preserving schedules: alpha² + sigma² = 1. Make one with :meth:`linear`, :meth:`cosine` or
    :meth:`discrete`."""

    @staticmethod
    def linear(beta0: float = 0.1, beta1: float = 20.0) -> VPLinear:
        """beta(t) rises linearly from ``beta0`` to ``beta1`` over t in [0, 1] (Song et al. 2021, Eq. 33)."""
        return VPLinear(beta0, beta1)

    @staticmethod
    def cosine(s: float = 0.008) -> VPCosine:
        """alpha(t) = cos((t+s)/(1+s) pi/2) / cos(s/(1+s) pi/2), t in [0, 1] (Nichol & Dhariwal 2021, Eq. 17)."""
        return VPCosine(s)

    @staticmethod
    def discrete(
        alphas_cumprod: Tensor | Sequence[float], interpolation: Literal["linear", "spline"] = "linear"
    ) -> VPDiscrete:
        """A trained table; t is the step's index, any real number between the first and the last."""
        return VPDiscrete(alphas_cumprod, interpolation)

    def _alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def _sigma(self, t: Tensor) -> Tensor:
        return _one_minus(self._log_alpha(t))

    def _dsigma(self, t: Tensor) -> Tensor:
        return -self._alpha(t) * self._dalpha(t) / self._sigma(t)


class VPLinear(VP):
    """log alpha = -(beta1 - beta0) t²/4 - beta0 t/2, t in [0, 1]."""

    t_max = 1.0
    start, end = 1.0, 1e-3

    def __init__(self, beta0: float = 0.1, beta1: float = 20.0) -> None:
        if not (0 < beta0 <= beta1 and math.isfinite(beta1)):
            raise InputError(f"VP.linear needs 0 < beta0 <= beta1; got beta0 = {beta0!r}, beta1 = {beta1!r}")
        self.beta0, self.beta1 = float(beta0), float(beta1)

    def __repr__(self) -> str:
        return f"VP.linear({self.beta0:g}, {self.beta1:g})"

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -((self.beta1 - self.beta0) * t / 4 + self.beta0 / 2) * t

    def _dalpha(self, t: Tensor) -> Tensor:
        return -self._alpha(t) * (self.beta0 + (self.beta1 - self.beta0) * t) / 2

    def _inverse(self, lam: Tensor) -> Tensor:
        c = -_log_alpha_of_lam(lam)
        # The root of a t² + b t - c written so that nothing cancels (and a may be 0).
        a, b = (self.beta1 - self.beta0) / 4, self.beta0 / 2
        return 2 * c / (b + (b * b + 4 * a * c).sqrt())


class VPCosine(VP):
    """The cosine schedule. alpha(1) is exactly 0, so a run that starts at t = 1 needs a prediction that is
    defined there (see :mod:`backdrift.forms`); the default start is DPM-Solver's 0.9946."""

    t_max = 1.0
    start, end = 0.9946, 1e-3

    def __init__(self, s: float = 0.008) -> None:
        if not (0 < s < 1):
            raise InputError(f"VP.cosine needs 0 < s < 1; got {s!r}")
        self.s = float(s)
        self._rate = math.pi / 2 / (1 + self.s)
        self._u0 = self.s * self._rate

    def __repr__(self) -> str:
        return f"VP.cosine({self.s:g})"

    # Angles are measured from the end they vanish at, so alpha(1) = 0 and sigma(0) = 0 hold exactly.
    def _alpha(self, t: Tensor) -> Tensor:
        return torch.sin((1 - t) * self._rate) / math.cos(self._u0)

    def _log_alpha(self, t: Tensor) -> Tensor:
        return self._alpha(t).log()

    def _sigma(self, t: Tensor) -> Tensor:
        product = torch.sin(t * self._rate) * torch.sin((t + 2 * self.s) * self._rate)
        return product.sqrt() / math.cos(self._u0)

    def _dalpha(self, t: Tensor) -> Tensor:
        return -self._rate * torch.cos((1 - t) * self._rate) / math.cos(self._u0)

    def _inverse(self, lam: Tensor) -> Tensor:
        alpha, sigma2 = torch.sigmoid(2 * lam).sqrt(), torch.sigmoid(-2 * lam)
        cos0, sin0 = math.cos(self._u0), math.sin(self._u0)
        angle = torch.atan2((sin0**2 + sigma2 * cos0**2).sqrt(), alpha * cos0)
        return angle / self._rate - self.s


class VPDiscrete(VP):
    """A table of alphas_cumprod (alpha²), interpolated in log alpha between the trained steps 0 … n - 1.

    A table that ends in 0 (zero terminal signal-to-noise ratio) has no logarithm there, so its last interval is
    linear in alpha. ``t = -1`` is the clean end, sigma = 0: a place to step *to*; nothing is defined between it
    and 0, and the network cannot be asked there.

    Args:
        alphas_cumprod: (n,) falling numbers in (0, 1]; the last may be 0.
        interpolation: ``"linear"`` (continuous; a solver's order above 1 stalls near the table's resolution)
            or ``"spline"`` (twice differentiable, so high orders hold).
    """

    t_clean = -1.0

    def __init__(
        self, alphas_cumprod: Tensor | Sequence[float], interpolation: Literal["linear", "spline"] = "linear"
    ) -> None:
        # A float32 table is what pipelines carry; its values are taken as they are.
        table = torch.as_tensor(alphas_cumprod).detach().to("cpu", torch.float64)
        if table.ndim != 1 or len(table) < 4:
            raise InputError(
                f"alphas_cumprod must be one row of at least 4 numbers; got shape {tuple(table.shape)}"
            )
        if not bool((table[1:] < table[:-1]).all()) or not (table[-1] >= 0 and table[0] <= 1):
            raise InputError("alphas_cumprod must fall strictly and lie in [0, 1] (0 only at the end)")
        if interpolation not in ("linear", "spline"):
            raise InputError(f"interpolation is 'linear' or 'spline'; got {interpolation!r}")
        self.zero_terminal = bool(table[-1] == 0)
        if self.zero_terminal and interpolation == "spline":
            raise InputError(
                "alphas_cumprod ends in 0, which a spline in log alpha cannot reach; use 'linear'"
            )
        self.interpolation = interpolation
        self.t_max = float(len(table) - 1)
        self.start, self.end = self.t_max, 0.0
        log_alpha = 0.5 * (table[:-1] if self.zero_terminal else table).log()
        self._alpha_last = float(log_alpha[-1].exp())
        self._curve: Curve = (
            MonotoneLine(log_alpha) if interpolation == "linear" else MonotoneSpline(log_alpha)
        )

    def __repr__(self) -> str:
        return f"VP.discrete({int(self.t_max) + 1} steps, {self.interpolation!r})"

    def _in_tail(self, t: Tensor) -> Tensor:
        return (t > self.t_max - 1) & self.zero_terminal

    def _alpha(self, t: Tensor) -> Tensor:
        body = self._curve(t.clamp(min=0.0)).exp()
        body = torch.where(self._in_tail(t), self._alpha_last * (self.t_max - t), body)
        return torch.where(t == self.t_clean, torch.ones_like(t), body)

    def _log_alpha(self, t: Tensor) -> Tensor:
        body = self._curve(t.clamp(min=0.0))
        body = torch.where(self._in_tail(t), (self._alpha_last * (self.t_max - t)).log(), body)
        return torch.where(t == self.t_clean, torch.zeros_like(t), body)

    def _dalpha(self, t: Tensor) -> Tensor:
        slope = self._alpha(t) * self._curve.slope(t.clamp(min=0.0))
        return torch.where(self._in_tail(t), torch.full_like(t, -self._alpha_last), slope)

    def _inverse(self, lam: Tensor) -> Tensor:
        log_alpha = _log_alpha_of_lam(lam)
        t = self._curve.inverse(log_alpha)
        if self.zero_terminal:
            tail = self.t_max - log_alpha.exp() / self._alpha_last
            t = torch.where(log_alpha < self._curve.values[-1], tail, t)
        return torch.where(lam == math.inf, torch.full_like(t, self.t_clean), t)
