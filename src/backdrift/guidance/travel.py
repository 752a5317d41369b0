"""Time travel: from a state back to a noisier level, by fresh noise.

From x_s = alpha_s x0 + sigma_s eps back to a noisier t by

    x_t = r x_s + sqrt(sigma_t² - r² sigma_s²) xi,     r = alpha_t / alpha_s,   xi ~ N(0, I)

Given x0 the result has mean alpha_t x0 and variance sigma_t², so the forward marginal at t is preserved, for every
schedule with x = alpha x0 + sigma eps: variance preserving (RePaint's and FreeDoM's rule: r² is the quotient of their
alpha-bars), variance exploding (r = 1), and rectified flow, where r = (1 - t)/(1 - s), also from t = 1, where r = 0
and the state is fresh noise.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..errors import InputError
from ..host import Level


def renoised(x: Tensor, at: Level, to: Level, noise: Tensor) -> Tensor:
    """The state at the noisier level ``to`` from the state ``x`` at ``at``.

    Args:
        x: (B, …).
        noise: standard normal, of x's shape.

    Raises:
        InputError: ``to`` is not noisier.
    """
    ratio = to.alpha / at.alpha if at.alpha else math.inf
    spread = to.sigma**2 - (ratio * at.sigma) ** 2
    if spread < -1e-9 * max(1.0, to.sigma**2):
        raise InputError(f"time travel goes to noisier levels; {to} is cleaner than {at}")
    return ratio * x + math.sqrt(max(spread, 0.0)) * noise
