"""The flow as dy/ds = f(s, y), in rising clocks, for packages that solve ordinary differential equations.

| clock | s | y | dy/ds |
|---|---|---|---|
| ``"time"`` | -t | x | -(f x + g²/(2 sigma) eps): the original form |
| ``"rho"`` | -rho | x/alpha | -eps: the exponential form |
| ``"lam"`` | log(alpha/sigma) | x/alpha | -rho eps: the exponential form, for solvers whose steps must be equal |
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from backdrift.forms import Form

from .work import Work


class Equation(nn.Module):
    """One work's flow in one clock. The network is no submodule: shared tensors are handed over by name.

    Args:
        work: the work.
        clock: ``"time"``, ``"rho"`` or ``"lam"``.
        times: falling nodes at which a solver will stop; at these the clock's inverse is exact.
    """

    def __init__(self, work: Work, clock: str, times: Tensor) -> None:
        super().__init__()
        self._work, self.name = [work], clock
        self._form = Form("original", work.schedule, "epsilon")
        clocks = torch.tensor([self.clock(t) for t in times.tolist()], dtype=torch.float64)
        # A solver hands clocks over in the state's dtype: each rounded one stands for its node's own time.
        self.nodes = clocks.to(work.x_T.device)
        self._times = dict(zip(clocks.to(work.x_T.dtype).tolist(), times.tolist(), strict=True))
        self._times |= dict(zip(clocks.tolist(), times.tolist(), strict=True))
        self._low, self._high = self.clock(work.start), self.clock(work.end)

    @property
    def work(self) -> Work:
        """The work."""
        return self._work[0]

    def clock(self, t: float) -> float:
        """s at time ``t``."""
        if self.name == "time":
            return -t
        rho = float(self.work.schedule.rho(t))
        return -rho if self.name == "rho" else -math.log(rho)

    def time(self, s: float) -> float:
        """t where the clock shows ``s``; the work's ends where rounding has led beyond them."""
        if s in self._times:
            return self._times[s]
        if s <= self._low:
            return self.work.start
        if s >= self._high:
            return self.work.end
        if self.name == "time":
            return -s
        schedule = self.work.schedule
        return float(schedule.t_from_rho(-s) if self.name == "rho" else schedule.t_from_lam(s))

    def scale(self, t: float) -> float:
        """x = scale * y."""
        return 1.0 if self.name == "time" else float(self.work.schedule.alpha(t))

    def begin(self) -> Tensor:
        """y at the work's start, with x_T's graph."""
        return self.work.x_T / self.scale(self.work.start)

    def finish(self, y: Tensor) -> Tensor:
        """x at the work's end."""
        return y * self.scale(self.work.end)

    def forward(self, s: Tensor, y: Tensor) -> Tensor:
        """dy/ds."""
        t = self.time(float(s.detach()))
        if self.name == "time":
            on_x, on_eps = self._form.coefficients(t)
            return -on_x * y - on_eps * self.work.eps(y, t)
        eps = self.work.eps(y * self.scale(t), t)
        return -eps if self.name == "rho" else -float(self.work.schedule.rho(t)) * eps
