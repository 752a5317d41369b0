"""Universal Guidance (Bansal et al., ICLR 2024, arXiv:2302.07121): forward and backward guidance.

Algorithm 1, in this project's notation (the paper's alpha_t is alpha² here), with xhat0 = (x_t - sigma eps)/alpha:

    forward (Eq. 6):    eps' = eps + s_t grad_{x_t} L(xhat0),                 s_t = s sqrt(1 - alpha²) = s sigma
    backward (Eq. 7):   D    = argmin_D L(xhat0 + D), by m steps of gradient descent from D = 0
             (Eq. 9):   eps' <- eps' - (alpha/sigma) D
    step:               x_{t-1} = Step(x_t, eps')

and self-recurrence, k times: back to x_t by fresh noise, which is time travel (``repeats``). The backward rule is
the step that a network saying x0 = xhat0 + D would have led to. sigma grad L is the same in all coordinates, and
for every schedule forward guidance is the step that a score raised by -s grad L would have led to.

A :class:`~backdrift.guidance.Relative` w in the place of s makes forward guidance as large as classifier-free guidance:

    eps' = eps + w * R * g / RMS(g),        g = grad_{x_t} L(xhat0),    R = guidance scale * RMS(eps_c - eps_0),

so that it means the same for every loss, and, as a change of eps does, for every number of steps. In the place of the
descent's rate it makes each of the m steps move x0 by w * R (MPGD's measure).

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
from ..backward import displaced, stride
from ..scoring import Score, wide
from ..strengths import Strength
from .numbers import fits, positive_or_strength, signal, whole
from .smoothed import pulled


@dataclass(frozen=True)
class UniversalRule:
    """The sampler's own step with a changed eps.

    Forward guidance costs the sampler's own network call, that call redone with its graph and one vector–Jacobian
    product; backward guidance alone only the sampler's call. There is one decoding, which both use, and m - 1 more for
    backward guidance. Singular where alpha = 0: eps is fixed by x_t there.

    Args:
        weight: s >= 0 of the forward rule; 0 leaves it out; or a strength, see above.
        backward: m >= 0 steps of gradient descent of the backward rule; 0 leaves it out.
        rate: the descent's step on x0, > 0, its size depends on the loss's; or a strength.

    Raises:
        InputError: an argument is out of range, or neither rule is asked for.
    """

    weight: float | Strength = 6.0
    backward: int = 0
    rate: float | Strength = 0.01

    def __post_init__(self) -> None:
        positive_or_strength("weight", self.weight, zero=True)
        whole("backward", self.backward, 0)
        positive_or_strength("rate", self.rate)
        if self.weight == 0 and self.backward == 0:
            raise InputError(
                "Universal Guidance with weight = 0 and backward = 0 does nothing: set one of them"
            )

    def fits(self, batch: int) -> None:
        """Raise unless the strengths are for that many samples."""
        fits(batch, self.weight, self.rate)

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
            if isinstance(self.weight, Strength):
                strength = self.weight(evaluation, found.pull)
                eps = wide(evaluation.eps) + strength * found.pull
            else:
                strength = torch.full_like(found.values, self.weight)
                eps = wide(evaluation.eps) + self.weight * level.sigma / math.hypot(*level) * found.pull
            attempt.note(loss=found.values, strength=strength, pull=found.pull, n=found.n)
        else:
            eps = wide(evaluation.eps)
            seen = score(wide(evaluation.x0))
            strength = torch.zeros_like(seen.values) + stride(self.rate, evaluation, seen.pull).flatten()
            attempt.note(loss=seen.values, strength=strength, pull=seen.pull, n=None)
        if self.backward:
            moved = displaced(attempt, wide(evaluation.x0), self.backward, self.rate, first[0])
            eps = eps - level.alpha / level.sigma * moved
        return attempt.take(evaluation.with_eps(eps.to(evaluation.z.dtype)))
