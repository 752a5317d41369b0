"""What every schedule offers: alpha, sigma and the clocks, at checked times, in float64."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError

Times = float | Sequence[float] | Tensor


def float64(value: Times) -> Tensor:
    """``value`` as a float64 tensor on the CPU; keeps the graph of a tensor that has one."""
    return torch.as_tensor(value, dtype=torch.float64, device="cpu")


class Schedule(ABC):
    """alpha, sigma and the two other clocks of one forward process.

    Attributes:
        t_max: the noisiest time at which the schedule is defined.
        t_min: the cleanest time at which the schedule is defined and a network may be asked.
        t_clean: the time at which sigma is 0 and alpha is 1. It equals ``t_min`` unless the trained times
            stop short of it (a discrete schedule).
        start, end: the ends a grid takes when it is not told any.
    """

    t_max: float
    t_min: float = 0.0
    t_clean: float = 0.0
    start: float
    end: float

    @abstractmethod
    def _log_alpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _dalpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _alpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _sigma(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _dsigma(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _inverse(self, lam: Tensor) -> Tensor:
        """t at which log(alpha/sigma) is ``lam``; infinite values are allowed."""

    def times(self, t: Times) -> Tensor:
        """``t`` as float64, checked against the range.

        Raises:
            InputError: a time lies outside [t_min, t_max] and is not ``t_clean``.
        """
        t = float64(t)
        # An inverse may miss an end by rounding; the formulas hold there, so nothing is clamped.
        slack = 1e-12 * max(1.0, abs(self.t_max))
        bad = ~((t >= self.t_min - slack) & (t <= self.t_max + slack)) & (t != self.t_clean)
        if bool(bad.any()):
            wrong = t[bad].flatten()[0].item()
            clean = "" if self.t_clean == self.t_min else f", or exactly {self.t_clean:g} for the clean end"
            raise InputError(
                f"{self!r} is defined for t in [{self.t_min:g}, {self.t_max:g}]{clean}; got t = {wrong:.17g}"
            )
        return t

    def log_alpha(self, t: Times) -> Tensor:
        """log alpha(t), shape of ``t``; -inf where alpha is 0."""
        return self._log_alpha(self.times(t))

    def alpha(self, t: Times) -> Tensor:
        """The signal's scale alpha(t), shape of ``t``."""
        return self._alpha(self.times(t))

    def sigma(self, t: Times) -> Tensor:
        """The noise's scale sigma(t), shape of ``t``."""
        return self._sigma(self.times(t))

    def lam(self, t: Times) -> Tensor:
        """Half the log signal-to-noise ratio log(alpha/sigma); ±inf at the ends where one of them is 0."""
        t = self.times(t)
        return self._log_alpha(t) - self._sigma(t).log()

    def rho(self, t: Times) -> Tensor:
        """The noise-to-signal ratio sigma/alpha; inf where alpha is 0."""
        t = self.times(t)
        return self._sigma(t) / self._alpha(t)

    def dalpha(self, t: Times) -> Tensor:
        """d alpha / dt."""
        return self._dalpha(self.times(t))

    def dsigma(self, t: Times) -> Tensor:
        """d sigma / dt; infinite where a variance-preserving sigma reaches 0 like a square root."""
        return self._dsigma(self.times(t))

    def f(self, t: Times) -> Tensor:
        """The drift coefficient f = d log alpha / dt of the forward process."""
        t = self.times(t)
        return self._dalpha(t) / self._alpha(t)

    def g2(self, t: Times) -> Tensor:
        """The squared diffusion coefficient g² = d sigma²/dt - 2 f sigma²."""
        t = self.times(t)
        sigma = self._sigma(t)
        return 2 * sigma * (self._dsigma(t) - self._dalpha(t) / self._alpha(t) * sigma)

    def t_from_lam(self, lam: Times) -> Tensor:
        """The inverse of :meth:`lam`.

        Raises:
            InputError: no time of the schedule has that ratio.
        """
        lam = float64(lam)
        if bool(torch.isnan(lam).any()):
            raise InputError("t_from_lam was given NaN")
        return self.times(self._inverse(lam))

    def t_from_rho(self, rho: Times) -> Tensor:
        """The inverse of :meth:`rho`.

        Raises:
            InputError: ``rho`` is negative, NaN, or no time of the schedule has it.
        """
        rho = float64(rho)
        if not bool((rho >= 0).all()):
            raise InputError(f"rho = sigma/alpha is never negative or NaN; got {rho.min().item():g}")
        return self.t_from_lam(-rho.log())
