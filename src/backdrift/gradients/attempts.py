"""Sums of the shared tensors' gradients along adaptive steps, which may yet be rejected.

The gradients of weights and conditioning take no part in the state, nor in the error that steps are chosen by. In a
step of size h they are h Σ_i b_i q_i, q_i the product at stage i; but h is final only when the step is accepted, after
its last evaluation. So each product is added, as soon as it is there, to the sums of the step that is being attempted,
with h left out, and those go over to the whole run's sums if the step is accepted. Stage 7 of a step is stage 1 of the
next, whose size is yet unknown: it has sums of its own. That makes three buffers for each shared tensor beside the
run's one, whatever the number of stages, and no product twice.
"""

from __future__ import annotations

from ..solvers.adaptive import STAGES, Witness
from ..solvers.runge_kutta import DORMAND_PRINCE
from .accumulate import Sums

_WEIGHTS = (*DORMAND_PRINCE.b, 0.0)


class Attempts(Witness):
    """What an adaptive way back adds to the shared tensors' sums.

    Args:
        sums: the whole run's.
        size: what the products have to be multiplied by.
    """

    def __init__(self, sums: Sums, size: float) -> None:
        self.total, self.size = sums, size
        self._first, self._inner, self._last = (sums.alike() for _ in range(3))
        self._stage = STAGES  # the one that comes next, from 0; STAGES for none

    def begun(self) -> None:
        self._first.clear()
        self._stage = 0

    def attempted(self) -> None:
        self._stage = 1

    def next(self) -> tuple[Sums, float] | None:
        """Where the next evaluation's product goes to, and its weight there; None if nowhere."""
        stage, self._stage = self._stage, self._stage + 1
        if stage == 0:
            self._stage = STAGES  # if another comes before a step is attempted, it is a guess at its size
            return self._first, 1.0
        if stage == STAGES - 1:
            return self._last, 1.0
        return (self._inner, _WEIGHTS[stage]) if stage < STAGES and _WEIGHTS[stage] != 0 else None

    def accepted(self, step: float) -> None:
        self.total.gather(self._first, step * self.size * _WEIGHTS[0])
        self.total.gather(self._inner, step * self.size)
        self._first, self._last = self._last, self._first
        self.rejected()

    def rejected(self) -> None:
        self._inner.clear()
        self._last.clear()
