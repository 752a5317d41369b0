"""Backward guidance (Bansal et al. 2023, Eqs. 7 to 9): the clean sample is moved until the loss likes it.

    D  = argmin_D L(x0 + D), by m steps of gradient descent from D = 0

and the sampler goes on as if its network had said x0 + D: in the paper's words eps' = eps - (alpha/sigma) D. That needs
no gradient through the network.
"""

from __future__ import annotations

from torch import Tensor

from .attempt import Attempt
from .estimate import Score


def displaced(attempt: Attempt, x0: Tensor, steps: int, rate: float, first: Score | None = None) -> Tensor:
    """D (B, …) after ``steps`` >= 1 steps of gradient descent.

    Args:
        attempt: scores clean samples.
        x0: (B, …).
        steps: m; one decoding and loss each.
        rate: the length of a step, in multiples of the gradient.
        first: the score at ``x0``, where it is known.
    """
    moved = -rate * (first or attempt.score(x0)).pull
    for _ in range(steps - 1):
        moved = moved - rate * attempt.score(x0 + moved).pull
    return moved
