"""A loss, smoothed by Gaussian noise on the clean sample: LGD's Monte-Carlo loss and TFG's implicit dynamics.

With p(x0) = exp(-L(x0)) taken for the likelihood of what is wanted, the likelihood of a blurred sample is estimated
from m draws d_i ~ N(0, I):

    Ltilde(x0) = -log( 1/m * sum_i exp(-L(x0 + r d_i)) ),
    grad Ltilde(x0) = sum_i w_i grad L(x0 + r d_i),      w = softmax(-L(x0 + r d_i)) over i.

For r = 0 it is L itself. Losses that are maximised enter with the other sign.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..attempt import Attempt
from ..estimate import Estimate
from ..scoring import Score, wide
from .numbers import column


def draws(attempt: Attempt, count: int, spread: float) -> list[Tensor]:
    """``count`` displacements r d_i of a clean sample; a single 0 where the spread r is 0."""
    like = wide(attempt.x)
    return [spread * attempt.noise(like) for _ in range(count)] if spread else [torch.zeros_like(like)]


def smoothed(attempt: Attempt, x0: Tensor, displacements: Sequence[Tensor]) -> Score:
    """Ltilde (B,) at clean samples (B, …) and what to subtract from them, each sample's own.

    One decoding, loss and gradient for each displacement, one after the other: memory does not grow with their number.
    """
    scores = [attempt.score(x0 + by) for by in displacements]
    if len(scores) == 1:
        return scores[0]
    values = torch.stack([score.values for score in scores])
    likelihood = values if attempt.scoring.maximize else -values
    mean = torch.logsumexp(likelihood, 0) - math.log(len(scores))
    weights = torch.softmax(likelihood, 0)
    pull = torch.stack([column(w, x0) * score.pull for w, score in zip(weights, scores, strict=True)]).sum(0)
    return Score(mean if attempt.scoring.maximize else -mean, pull)


def pulled(attempt: Attempt, score: Callable[[Tensor], Score]) -> Estimate:
    """The one-step estimate from the attempt's state, scored by ``score``, with its pull on that state."""
    return attempt.pulled(1, score)
