"""Universal Guidance (Bansal et al., ICLR 2024, arXiv:2302.07121): forward and backward guidance.

Algorithm 1, in this project's notation (the paper's alpha_t is alpha² here), with xhat0 = (x_t - sigma eps)/alpha:

    forward (Eq. 6):    eps' = eps + s_t grad_{x_t} L(xhat0),                 s_t = s sqrt(1 - alpha²) = s sigma
    backward (Eq. 7):   D    = argmin_D L(xhat0 + D), by m steps of gradient descent from D = 0
             (Eq. 9):   eps' <- eps' - (alpha/sigma) D
    step:               x_{t-1} = Step(x_t, eps')

and self-recurrence, k times: back to x_t by fresh noise, which is time travel (``repeats``). The backward rule is
the step that a network saying x0 = xhat0 + D would have led to. sigma grad L is the same in all coordinates, and
for every schedule forward guidance is the step that a score raised by -s grad L would have led to.

In the authors' Stable Diffusion code there is no backward guidance (m = 0) and s is 6 for style (k = 6), 20000 for
faces (k = 2), 400 for segmentation (k = 10), 100 for object locations (k = 5), over 250 to 500 DDIM steps. Their
pixel code minimises with Adam at rate 0.01, here plain gradient descent as the paper has it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ..attempt import Attempt
from ..backward import displaced
from ..estimate import Score
from .numbers import positive, signal, whole, wide
from .smoothed import pulled


@dataclass(frozen=True)
class UniversalRule:
    """The sampler's own step with a changed eps.

    Forward guidance costs the sampler's own network call, that call redone with its graph and one vector–Jacobian
    product; backward guidance alone only the sampler's call. There is one decoding, which both use, and m - 1 more for
    backward guidance. Singular where alpha = 0: eps is fixed by x_t there.

    Args:
        weight: s >= 0 of the forward rule; 0 leaves it out.
        backward: m >= 0 steps of gradient descent of the backward rule; 0 leaves it out.
        rate: the descent's step on x0, > 0; its size depends on the loss's.

    Raises:
        InputError: an argument is out of range, or neither rule is asked for.
    """

    weight: float = 6.0
    backward: int = 0
    rate: float = 0.01

    def __post_init__(self) -> None:
        positive("weight", self.weight, zero=True)
        whole("backward", self.backward, 0)
        positive("rate", self.rate)
        if self.weight == 0 and self.backward == 0:
            raise InputError(
                "Universal Guidance with weight = 0 and backward = 0 does nothing: set one of them"
            )

    def __call__(self, attempt: Attempt) -> Tensor:
        """The state after the step.

        Raises:
            InputError: alpha = 0 at the step's beginning.
        """
        signal("Universal Guidance", attempt.host)
        evaluation, level = attempt.evaluation, attempt.host.start
        first: list[Score] = []

        def score(x0: Tensor) -> Score:
            first.append(attempt.score(x0))
            return first[-1]

        if self.weight:
            found = pulled(attempt, score)
            eps = wide(evaluation.eps) + self.weight * level.sigma / math.hypot(*level) * found.pull
            attempt.note(
                loss=found.values,
                strength=torch.full_like(found.values, self.weight),
                pull=found.pull,
                n=found.n,
            )
        else:
            eps = wide(evaluation.eps)
            seen = score(wide(evaluation.x0))
            attempt.note(
                loss=seen.values, strength=torch.full_like(seen.values, self.rate), pull=seen.pull, n=None
            )
        if self.backward:
            moved = displaced(attempt, wide(evaluation.x0), self.backward, self.rate, first[0])
            eps = eps - level.alpha / level.sigma * moved
        return attempt.take(evaluation.with_eps(eps.to(evaluation.z.dtype)))
