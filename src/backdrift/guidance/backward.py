"""Backward guidance (Bansal et al. 2023, Eqs. 7 to 9): the clean sample is moved until the loss likes it.

    D  = argmin_D L(x0 + D), by m steps of gradient descent from D = 0

and the sampler goes on as if its network had said x0 + D: in the paper's words eps' = eps - (alpha/sigma) D. That needs
no gradient through the network.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..host import Evaluation
from .attempt import Attempt
from .scoring import Score
from .strengths import Strength


def displaced(
    attempt: Attempt, x0: Tensor, steps: int, rate: float | Strength, first: Score | None = None
) -> Tensor:
    """D (B, …) after ``steps`` >= 1 steps of gradient descent.

    Args:
        attempt: scores clean samples.
        x0: (B, …).
        steps: m; one decoding and loss each.
        rate: the length of a step, in multiples of the gradient; or what a strength makes it.
        first: the score at ``x0``, where it is known.
    """
    evaluation, pull = attempt.evaluation, (first or attempt.score(x0)).pull
    moved = -stride(rate, evaluation, pull) * pull
    for _ in range(steps - 1):
        pull = attempt.score(x0 + moved).pull
        moved = moved - stride(rate, evaluation, pull) * pull
    return moved


def stride(rate: float | Strength, evaluation: Evaluation, pull: Tensor) -> Tensor:
    """What a step multiplies the gradient (B, …) with: a number (), or a strength's (B, 1, …)."""
    if isinstance(rate, Strength):
        return rate(evaluation, pull)
    return torch.tensor(rate, dtype=pull.dtype, device=pull.device)
