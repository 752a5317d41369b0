"""Where in time a solver steps: falling nodes t_0 > t_1 > … > t_N for a schedule, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import InputError
from .schedules import Schedule

RULES = ("uniform", "logsnr", "quadratic", "karras")


class TimeGrid:
    """A rule for the nodes, or the nodes themselves.

    Args:
        rule: how the nodes are spaced, or falling times (a tensor that requires grad gets each node's own gradient):
            ``"uniform"`` equal steps in t;
            ``"logsnr"`` equal steps in lam = log(alpha/sigma) (DPM-Solver);
            ``"quadratic"`` equal steps in sqrt(t) (DDIM, DPM-Solver);
            ``"karras"`` equal steps in rho^(1/exponent), rho = sigma/alpha (EDM, Eq. 5).
        steps: number of intervals N >= 1 (nodes are N + 1). Not given with explicit times.
        start: first, noisiest time; the schedule's ``start`` if None. A tensor that requires grad gets its gradient,
            and the nodes between move with it by the rule.
        end: last, cleanest time; the schedule's ``end`` if None. A tensor likewise.
        clean_end: let the last of the N intervals go from ``end`` to the schedule's ``t_clean`` (sigma = 0).
        exponent: of ``"karras"``.

    Raises:
        InputError: for an unknown rule, no interval, or times that do not fall.
    """

    def __init__(
        self,
        rule: str | Sequence[float] | Tensor = "uniform",
        steps: int | None = None,
        *,
        start: float | Tensor | None = None,
        end: float | Tensor | None = None,
        clean_end: bool = False,
        exponent: float = 7.0,
    ) -> None:
        self._times: Tensor | None = None
        if isinstance(rule, str):
            if rule not in RULES:
                raise InputError(
                    f"the rule of a TimeGrid is one of {', '.join(RULES)} or the times; got {rule!r}"
                )
            if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1 + clean_end:
                raise InputError(
                    f"TimeGrid({rule!r}) needs steps >= {1 + clean_end}, a whole number; got {steps!r}"
                )
            self.rule, self.steps = rule, steps
        else:
            self._times = torch.as_tensor(rule, dtype=torch.float64, device="cpu").clone()
            self.rule, self.steps = "explicit", len(self._times) - 1 if self._times.ndim == 1 else 0
            if steps is not None or start is not None or end is not None or clean_end:
                raise InputError("explicit times say everything: leave out steps, start, end and clean_end")
            if self.steps < 1:
                raise InputError(
                    f"explicit times must be a row of at least 2; got shape {tuple(self._times.shape)}"
                )
        if not (exponent > 0 and math.isfinite(exponent)):
            raise InputError(f"exponent must be positive; got {exponent!r}")
        for name, end_time in (("start", start), ("end", end)):
            if isinstance(end_time, Tensor) and end_time.numel() != 1:
                raise InputError(f"{name} is one time; got a tensor of shape {tuple(end_time.shape)}")
        self.start, self.end, self.clean_end, self.exponent = start, end, clean_end, float(exponent)

    def __repr__(self) -> str:
        start, end = (t.item() if isinstance(t, Tensor) else t for t in (self.start, self.end))
        return f"TimeGrid({self.rule!r}, steps={self.steps}, start={start}, end={end})"

    def nodes(self, schedule: Schedule) -> Tensor:
        """The N + 1 falling times, float64, checked against the schedule's range; the ends are met exactly.

        Raises:
            InputError: an end lies outside the schedule, the clock of the rule is infinite there, or times
                do not fall strictly.
        """
        if self._times is not None:
            times = schedule.times(self._times)
        else:
            start = schedule.start if self.start is None else self.start
            end = schedule.end if self.end is None else self.end
            times = self._spaced(schedule, _time(start), _time(end), self.steps - self.clean_end)
            if self.clean_end:
                times = torch.cat([times, times.new_tensor([schedule.t_clean])])
        if not bool((times[1:] < times[:-1]).all()):
            raise InputError(
                f"times must fall strictly from noise to data; {self!r} on {schedule!r} gives {times.tolist()[:5]} …"
            )
        return times

    def _spaced(self, schedule: Schedule, start: Tensor, end: Tensor, intervals: int) -> Tensor:
        schedule.times(torch.stack([start, end]))
        w = torch.linspace(0, 1, intervals + 1, dtype=torch.float64)[1:-1]
        if self.rule == "uniform":
            middle = start + w * (end - start)
        elif self.rule == "quadratic":
            if end < 0:
                raise InputError(f"a quadratic grid needs times >= 0; got end = {end.item():g}")
            middle = (start.sqrt() + w * (end.sqrt() - start.sqrt())) ** 2
        else:
            middle = self._spaced_in_noise(schedule, start, end, w)
        return torch.cat([start[None], middle, end[None]])

    def _spaced_in_noise(self, schedule: Schedule, start: Tensor, end: Tensor, w: Tensor) -> Tensor:
        high, low = schedule.rho(start), schedule.rho(end)
        if not bool(high.isfinite()):
            raise InputError(
                f"alpha is 0 at t = {start.item():g} on {schedule!r}, infinitely far away for a {self.rule!r} grid: "
                f"give a start below {start.item():g}, or use 'uniform' or 'quadratic'"
            )
        if self.rule == "logsnr":
            if low == 0:
                raise InputError(
                    f"sigma is 0 at t = {end.item():g} on {schedule!r}, infinitely far away for a 'logsnr' grid: "
                    "give an end above it (clean_end=True adds the last step to sigma = 0)"
                )
            return schedule.t_from_lam(-high.log() + w * (high.log() - low.log()))
        root = 1 / self.exponent
        return schedule.t_from_rho((high**root + w * (low**root - high**root)) ** self.exponent)


def _time(t: float | Tensor) -> Tensor:
    return torch.as_tensor(t, dtype=torch.float64, device="cpu").reshape(())
