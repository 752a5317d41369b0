"""DPS: Diffusion Posterior Sampling (Chung et al., ICLR 2023, arXiv:2209.14687).

Algorithm 1, in this project's notation, with L(x0) = ||y - A(x0)||² and xhat0 the one-step estimate from x_t:

    x_{t-1}  =  Step(x_t, eps)  -  zeta_t * grad_{x_t} L(xhat0(x_t)),        zeta_t = zeta / sqrt(L(xhat0)).

The scaled gradient is 2 zeta times that of the distance sqrt(L). The authors' code is written so: its ``scale`` is
2 zeta, and 0.3 for super-resolution and deblurring, 0.5 for inpainting, 1 for phase retrieval. The paper recommends
zeta from 0.1 to 1.

Any loss that is never negative and 0 where all is well can stand for the squared distance. L is each sample's own,
where the authors' code takes one norm over the batch. States are in unit coordinates
(:mod:`~backdrift.guidance.strengths`), so that the rule is the paper's on variance-preserving schedules and the
same rule on every other.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...errors import InputError
from ..attempt import Attempt
from ..estimate import Estimate
from ..strengths import Strength
from .numbers import column, fits, positive_or_strength


@dataclass(frozen=True)
class DPSRule:
    """The next state, pulled by zeta / sqrt(L) times the gradient at x_t.

    Costs the sampler's own network call, that call redone with its graph, one vector–Jacobian product and one
    decoding. Singular where alpha = 0, unless the network predicts x0, v or u: eps says nothing of x0 there.

    Args:
        zeta: zeta > 0; or a :class:`~backdrift.guidance.Strength` in the place of zeta / sqrt(L), for losses that are
            no squared distances. With :class:`~backdrift.guidance.Relative` the rule is FreeDoM's.

    Raises:
        InputError: zeta is not a positive number.
    """

    zeta: float | Strength = 1.0

    def __post_init__(self) -> None:
        positive_or_strength("zeta", self.zeta)

    def fits(self, batch: int) -> None:
        """Raise unless the strengths are for that many samples."""
        fits(batch, self.zeta)

    def __call__(self, attempt: Attempt) -> Tensor:
        """The state after the step.

        Raises:
            InputError: a loss is negative, or to be maximised: it has no square root that could fall to 0.
        """
        if isinstance(self.zeta, Strength):
            found = attempt.estimate(n=1)
            strength = self.zeta(attempt.evaluation, found.pull)
        else:
            found, strength = self._distance(attempt, self.zeta)
        attempt.note(loss=found.values, strength=strength, pull=found.pull, n=found.n)
        return attempt.pushed(attempt.take(), strength * found.pull)

    def _distance(self, attempt: Attempt, zeta: float) -> tuple[Estimate, Tensor]:
        """The estimate, and zeta / sqrt(L)."""
        if attempt.scoring.maximize:
            raise InputError(
                "DPS divides by the square root of a distance that is to fall to 0, and maximize=True asks for a loss "
                "that rises: use FreeDoM or SymplecticAdjointGuidance, or a loss that is 0 at its best"
            )
        found = attempt.estimate(n=1)
        if bool((found.values < 0).any()):
            raise InputError(
                f"DPS divides by the square root of the loss; got a loss of {float(found.values.min()):.4g} in step "
                f"{attempt.host.index + 1} of {attempt.host.total}: use a loss that is never negative (a squared "
                "distance), or FreeDoM, whose strength does not depend on the loss's scale"
            )
        root = column(found.values, found.pull).sqrt()
        # Where the loss is 0 its gradient is, and there is nothing to pull at.
        return found, zeta / root.clamp_min(1e-30) * (root > 0)
