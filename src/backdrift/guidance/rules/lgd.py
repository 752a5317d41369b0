"""LGD-MC: Loss-Guided Diffusion with Monte Carlo (Song et al., ICML 2023).

DPS takes the clean sample behind x_t for a point, xhat0; LGD for a Gaussian, q(x0 | x_t) = N(xhat0, r_t² I), and
estimates the likelihood of what is wanted from m samples of it (in the paper's variance-exploding notation
r_t = s/sqrt(1 + s²) with s = sigma/alpha):

    r_t = sigma / sqrt(alpha² + sigma²),            x0_i = xhat0 + r_t d_i,    d_i ~ N(0, I),
    g   = -grad_{x_t} log( 1/m * sum_i exp(-L(x0_i)) ),
    x_{t-1} = Step(x_t, eps) - strength * g.

All samples branch off one xhat0, so that one vector–Jacobian product through the network serves for them all. As
r_t -> 0 the rule is DPS's without its division. The exponentials set a scale: a loss whose differences between
samples are small beside 1 is averaged, one whose differences are large picks its best sample; weigh the loss
accordingly. The authors published no code; ``strength`` multiplies g as in the transcriptions of TFG's authors and of
InverseBench.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..attempt import Attempt
from ..strengths import Constant, Strength
from .numbers import fits, positive, positive_or_strength, whole
from .smoothed import draws, pulled, smoothed


@dataclass(frozen=True)
class LGDRule:
    """The next state, pulled by the gradient at x_t of the loss smoothed over the clean sample's spread.

    Costs the sampler's own network call, that call redone with its graph, one vector–Jacobian product, and
    ``samples`` decodings. Singular where DPS is.

    Args:
        strength: a number multiplies g, as published; a :class:`~backdrift.guidance.Strength` sets the multiplier by
            sizes.
        samples: m >= 1; InverseBench's 10.
        spread: r_t is multiplied by it; 1 as published, 0 for a point.

    Raises:
        InputError: an argument is out of range.
    """

    strength: float | Strength = 1.0
    samples: int = 10
    spread: float = 1.0

    def __post_init__(self) -> None:
        positive_or_strength("strength", self.strength)
        whole("samples", self.samples, 1)
        positive("spread", self.spread, zero=True)

    def fits(self, batch: int) -> None:
        """Raise unless the strengths are for that many samples."""
        fits(batch, self.strength)

    def __call__(self, attempt: Attempt) -> Tensor:
        """The state after the step."""
        level = attempt.host.start
        by = draws(attempt, self.samples, self.spread * level.sigma / math.hypot(*level))
        found = pulled(attempt, lambda x0: smoothed(attempt, x0, by))
        rule = self.strength if isinstance(self.strength, Strength) else Constant(self.strength)
        strength = rule(attempt.evaluation, found.pull)
        attempt.note(loss=found.values, strength=strength, pull=found.pull, n=found.n)
        return attempt.pushed(attempt.take(), strength * found.pull)
