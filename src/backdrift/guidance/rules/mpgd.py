"""MPGD: Manifold Preserving Guided Diffusion (He et al., ICLR 2024, arXiv:2311.16424), the shortcut without projection.

The gradient is taken by the clean sample alone: it goes through the decoder and the loss, not through the network.

    x0' = xhat0 - c_t grad_{x0} L(xhat0),
    kept:        x_{t-1} = alpha' x0' + sqrt(sigma'² - s²) eps + s xi,
    recomputed:  x_{t-1} = Step(x_t, x0').

``"kept"`` is the paper's DDIM step, and the authors' pixel code: eps stays what the network said. ``"recomputed"`` is
their Stable Diffusion code, which takes the posterior mean of x_{t-1} given x_t and x0'. In both the sampler's own step
is taken; ``"kept"`` then adds alpha' (x0' - xhat0), which is its equation for every step that is affine in x0 and eps,
and leaves the history of a multistep sampler alone.

A number w makes c_t = w * s RMS(eps_c - eps_0) / RMS(grad), s the guidance scale, as the Stable Diffusion code has it
(w = 15 with ``"recomputed"``; 15 to 30, it says). There the share of x0' in the next state is a few hundredths
(alpha' - alpha sigma'/sigma in a DDIM step); with ``"kept"`` it is alpha', so that w = 0.2 to 0.5 is of the same size.
The pixel code has c_t = 0.015 / (RMS(grad) alpha') for faces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from ...errors import InputError
from ..attempt import Attempt
from ..scoring import wide
from ..strengths import Strength, Value, strength_of

Eps = Literal["kept", "recomputed"]


@dataclass(frozen=True)
class MPGDRule:
    """The sampler's own step from a moved x0.

    Costs one decoding and loss beside the sampler's own network call; no network call is redone and none is
    differentiated. ``"recomputed"`` is singular where sigma = 0 (nothing is left to guide there); ``"kept"``
    nowhere that x0 can be read.

    Args:
        strength: w > 0, or a :class:`~backdrift.guidance.Strength` (which gets the gradient by x0).
        eps: ``"kept"`` or ``"recomputed"``.

    Raises:
        InputError: an argument is out of range.
    """

    strength: Value | Strength = 0.3
    eps: Eps = "kept"

    def __post_init__(self) -> None:
        strength_of(self.strength)
        if self.eps not in get_args(Eps):
            raise InputError(
                f"eps is {' or '.join(map(repr, get_args(Eps)))} when x0 is moved; got {self.eps!r}"
            )

    def fits(self, batch: int) -> None:
        """Raise unless the strengths are for that many samples."""
        strength_of(self.strength).check(batch)

    def __call__(self, attempt: Attempt) -> Tensor:
        """The state after the step."""
        evaluation = attempt.evaluation
        x0 = wide(evaluation.x0)
        score = attempt.score(x0)
        strength = strength_of(self.strength)(evaluation, score.pull)
        moved = -strength * score.pull
        attempt.note(loss=score.values, strength=strength, pull=score.pull)
        if self.eps == "recomputed":
            return attempt.take(evaluation.with_x0((x0 + moved).to(evaluation.z.dtype)))
        following = attempt.take()
        return following + (attempt.host.end.alpha * moved).to(following.dtype)
