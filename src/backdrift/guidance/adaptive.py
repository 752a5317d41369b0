"""As many steps of the estimate as it needs, measured at each guided step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from .attempt import Attempt
from .estimate import Estimate
from .strengths import rms


@dataclass
class Adaptive:
    """As many steps as the estimate needs: n for which n and n + 1 steps agree.

    Euler's error falls like 1/n, so estimates with n and n + 1 steps differ by about C/(n (n + 1)). C is measured at
    each guided step, by a second estimate without a gradient (n network calls more, its first being known), and the
    next step takes the least n with C/(n (n + 1)) <= tolerance. C falls with the noise: n is large early, 1 at the end.
    Where only n steps of the run are left, n - 1 and n are compared.

    Each sample of a batch has its own C and n. Estimates are made of the whole batch, one for each number of steps
    that some sample asks for.

    Args:
        tolerance: root mean square of the difference, relative to the estimate's.
        most: no more steps than that; where C is not known yet, the first guided step takes as many.

    Raises:
        InputError: a number is out of range.
    """

    tolerance: float = 0.1
    most: int = 8

    def __post_init__(self) -> None:
        whole = isinstance(self.most, int) and not isinstance(self.most, bool)
        if not (self.tolerance > 0 and math.isfinite(self.tolerance)) or not whole or self.most < 1:
            raise InputError(f"{self}: needs tolerance > 0 and a whole number most >= 1")
        self._next: list[int] = []

    def begin(self) -> None:
        """A new run."""
        self._next = []

    def choose(self, left: int, batch: int = 1) -> list[int]:
        """Steps of each sample's estimate, with ``left`` steps of the run to go."""
        self._next = self._next or [self.most] * batch
        return [max(1, min(n, self.most, left)) for n in self._next]

    def learn(self, n: int, coarse: Tensor, fine: Tensor, rows: Sequence[int] | None = None) -> None:
        """From some samples' estimates with n and n + 1 steps.

        Args:
            coarse, fine: (B, …).
            rows: which samples learn from them; all by default.
        """
        self._next = self._next or [self.most] * len(fine)
        apart = (rms(coarse - fine) / rms(fine).clamp_min(torch.finfo(fine.dtype).tiny)).flatten()
        for row in range(len(fine)) if rows is None else rows:
            constant = float(apart[row]) * n * (n + 1)
            # least n with n (n + 1) >= C / tolerance
            needed = (math.sqrt(1 + 4 * constant / self.tolerance) - 1) / 2
            self._next[row] = max(1, math.ceil(min(self.most, needed) - 1e-9))

    def estimated(self, attempt: Attempt) -> tuple[Estimate, int | list[int]]:
        """Each sample's estimate in as many steps as it needs, and that number, or numbers where they differ."""
        left = attempt.host.total - attempt.host.index
        ns = self.choose(left, len(attempt.x))
        found: Estimate | None = None
        for n in sorted(set(ns), reverse=True):
            rows = [row for row, needed in enumerate(ns) if needed == n]
            estimate = attempt.estimate(n=n)
            if n < left:
                self.learn(n, estimate.x0, attempt.clean(n + 1), rows)
            elif n > 1:
                self.learn(n - 1, attempt.clean(n - 1), estimate.x0, rows)
            found = estimate if found is None else _with_rows(found, estimate, rows)
        assert found is not None
        return found, ns[0] if len(set(ns)) == 1 else ns


def _with_rows(whole: Estimate, other: Estimate, rows: list[int]) -> Estimate:
    """``whole`` with some samples of another estimate in it."""
    x0, values, pull = whole.x0.clone(), whole.values.clone(), whole.pull.clone()
    x0[rows], values[rows], pull[rows] = other.x0[rows], other.values[rows], other.pull[rows]
    return Estimate(x0, values, pull, whole.n)
