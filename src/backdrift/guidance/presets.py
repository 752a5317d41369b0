"""The published rules as objects that users hold, with their papers' settings.

Each is a rule of :mod:`backdrift.guidance.rules`.

All take a loss first and end in the arguments of :class:`~backdrift.SymplecticAdjointGuidance`, and are used in the
same three ways. Where a number multiplies a gradient, a :class:`~backdrift.guidance.Relative` may stand in its place,
which serves every loss. docs/guidance-rules.md compares the rules and says what each costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypedDict, Unpack

from torch import Tensor

from .base import Guidance, Losses
from .estimate import Estimator
from .rules import DPSRule, LGDRule, MPGDRule, TFGRule, UniversalRule
from .rules.mpgd import Eps
from .rules.tfg import Growth
from .strengths import Strength, Value, strength_of
from .symplectic import Pull
from .when import Repeats, published

#: FreeDoM's repeats for styles, by parts of the run: three times for t = 70 to 41 of 100, then once.
FREEDOM = ((0.3, 3), (0.6, 1))


class Common(TypedDict, total=False):
    """What all presets take besides their own arguments; see :class:`~backdrift.SymplecticAdjointGuidance`."""

    steps: Sequence[int] | Sequence[bool] | None
    maximize: bool
    seed: int | Sequence[int]
    decode: Callable[[Tensor], Tensor] | None
    decode_chunk_size: int | None
    callback: Callable[[Any], Any] | None
    strip: bool | int
    prompts: str | Sequence[str] | None
    estimator: Estimator | None


class FreeDoM(Guidance):
    """FreeDoM (Yu et al., ICCV 2023, arXiv:2303.09833): the gradient at x_t of the one-step estimate's loss.

    Its Algorithm 1 and, with ``repeats``, 2: x_{t-1} = Step(x_t, eps) - rho_t grad_{x_t} L(xhat0(x_t)), then back
    to t by fresh noise and again. It is :class:`~backdrift.SymplecticAdjointGuidance` with n = 1.

    Its Stable Diffusion code has 100 steps of DDPM's posterior (a stochastic sampler: DDIM with eta = 1), guides
    those from 70 to 31 counted down, and takes the first 30 of them three times: ``repeats="published"``. A single
    number repeats all guided steps.

    Args:
        loss: as in SymplecticAdjointGuidance; the authors' is the Frobenius norm between Gram matrices of CLIP
            features.
        strength: w of rho_t = w * s * RMS(eps_c - eps_0)/RMS(grad), s the guidance scale; or a strength.
        repeats: attempts at each guided step; a number for each step of the run; pairs (part of the run, attempts from
            there on); or ``"published"`` for ``((0.3, 3), (0.6, 1))``.

    Raises:
        InputError: an argument has an impossible value.
    """

    def __init__(
        self,
        loss: Losses,
        strength: Value | Strength = 0.2,
        start: float = 0.3,
        stop: float = 0.7,
        *,
        repeats: Repeats | Literal["published"] = 3,
        **common: Unpack[Common],
    ) -> None:
        rule = Pull(1, strength_of(strength))
        repeats = published(repeats, FREEDOM)
        super().__init__(rule, loss, start=start, stop=stop, repeats=repeats, **common)


class DPS(Guidance):
    """Diffusion Posterior Sampling (Chung et al., ICLR 2023): pulls at x_t by zeta / sqrt(loss).

    All steps are guided, and the authors' sampler is DDPM with 1000 steps.

    Args:
        loss: never negative, 0 at its best: a squared distance.
        zeta: the paper's 0.1 to 1; its code's ``scale`` is twice that. A strength takes the place of zeta / sqrt(loss),
            for any loss; with ``Relative(0.2)`` it is FreeDoM, of all steps.

    Raises:
        InputError: an argument has an impossible value.

    See :mod:`backdrift.guidance.rules.dps`.
    """

    def __init__(
        self,
        loss: Losses,
        zeta: float | Strength = 1.0,
        start: float = 0.0,
        stop: float = 1.0,
        *,
        repeats: Repeats = 1,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(DPSRule(zeta), loss, start=start, stop=stop, repeats=repeats, **common)


class LGD(Guidance):
    """Loss-Guided Diffusion with Monte Carlo (Song et al., ICML 2023): averages over the clean sample's spread.

    Args:
        loss: whose differences count beside 1; weigh it.
        strength: multiplies the gradient; or a strength.
        samples: draws of the clean sample at each guided step.
        spread: multiplies the published r_t = sigma/sqrt(alpha² + sigma²).

    Raises:
        InputError: an argument has an impossible value.

    See :mod:`backdrift.guidance.rules.lgd`.
    """

    def __init__(
        self,
        loss: Losses,
        strength: float | Strength = 1.0,
        samples: int = 10,
        spread: float = 1.0,
        start: float = 0.0,
        stop: float = 1.0,
        *,
        repeats: Repeats = 1,
        **common: Unpack[Common],
    ) -> None:
        rule = LGDRule(strength, samples, spread)
        super().__init__(rule, loss, start=start, stop=stop, repeats=repeats, **common)


class UniversalGuidance(Guidance):
    """Universal Guidance (Bansal et al., ICLR 2024): changes eps by a gradient at x_t, at x0, or both.

    The defaults are those for style: 500 DDIM steps, all guided, each taken six times. With fewer steps the same weight
    does less: the changes of eps add up along the run as the score's do.

    Args:
        loss: as in SymplecticAdjointGuidance.
        weight: s of the forward rule, s_t = s sigma; 0 leaves it out. ``Relative(w)`` changes eps by w times what
            classifier-free guidance adds to it, whatever the loss and the number of steps.
        backward: steps of gradient descent on x0 of the backward rule; 0 leaves it out.
        rate: of that descent; or a strength.
        repeats: k, the self-recurrence.

    Raises:
        InputError: an argument has an impossible value.

    See :mod:`backdrift.guidance.rules.universal`.
    """

    def __init__(
        self,
        loss: Losses,
        weight: float | Strength = 6.0,
        backward: int = 0,
        rate: float | Strength = 0.01,
        start: float = 0.0,
        stop: float = 1.0,
        *,
        repeats: Repeats = 6,
        **common: Unpack[Common],
    ) -> None:
        rule = UniversalRule(weight, backward, rate)
        super().__init__(rule, loss, start=start, stop=stop, repeats=repeats, **common)


class MPGD(Guidance):
    """Manifold Preserving Guided Diffusion (He et al., ICLR 2024), without projection: moves x0 alone.

    Its Stable Diffusion code for style is ``MPGD(loss, 15.0, "recomputed")``, guided from 70 to 31 counted down in 100
    steps of DDPM's posterior. With fewer steps or another sampler the moved x0 has a larger share in each and 15 is far
    too much; the default is the paper's own step with a strength of about the same size.

    Args:
        loss: as in SymplecticAdjointGuidance.
        strength: w of c_t = w * s * RMS(eps_c - eps_0)/RMS(grad); or a strength.
        eps: ``"kept"`` (the paper's DDIM step), or ``"recomputed"`` from the moved x0 (its Stable Diffusion code).

    Raises:
        InputError: an argument has an impossible value.

    See :mod:`backdrift.guidance.rules.mpgd`.
    """

    def __init__(
        self,
        loss: Losses,
        strength: Value | Strength = 0.3,
        eps: Eps = "kept",
        start: float = 0.3,
        stop: float = 0.7,
        *,
        repeats: Repeats = 1,
        **common: Unpack[Common],
    ) -> None:
        rule = MPGDRule(strength, eps)
        super().__init__(rule, loss, start=start, stop=stop, repeats=repeats, **common)


class TFG(Guidance):
    """Training-Free Guidance (Ye et al., NeurIPS 2024): a gradient at x_t and one at x0, of a smoothed loss.

    The defaults are those for style: 100 steps of DDIM with eta = 1, all guided, for a loss that is a hundredth of
    the Frobenius norm between Gram matrices.

    Args:
        loss: -log of what is wanted; the strengths depend on its scale.
        rho, mu: strengths of the gradients at x_t and at x0; 0 leaves one out. With ``Relative(w)`` they do not depend
            on the loss's scale: the state, and x0 in each iteration, move by w times what classifier-free guidance adds
            to eps, times the schedule.
        gamma: spread of the implicit dynamics.
        iterations: steps of the gradient at x0.
        samples: draws of the implicit dynamics.
        rho_schedule, mu_schedule: ``"increase"``, ``"decrease"``, ``"constant"`` or a function of the step's levels.
        gamma_schedule: ``"decrease"`` or ``"constant"``.
        repeats: N_recur.

    Raises:
        InputError: an argument has an impossible value.

    See :mod:`backdrift.guidance.rules.tfg`.
    """

    def __init__(
        self,
        loss: Losses,
        rho: float | Strength = 0.25,
        mu: float | Strength = 2.0,
        gamma: float = 0.1,
        iterations: int = 4,
        samples: int = 1,
        start: float = 0.0,
        stop: float = 1.0,
        *,
        rho_schedule: Growth = "increase",
        mu_schedule: Growth = "increase",
        gamma_schedule: Literal["decrease", "constant"] = "decrease",
        repeats: Repeats = 1,
        **common: Unpack[Common],
    ) -> None:
        rule = TFGRule(rho, mu, gamma, iterations, samples, rho_schedule, mu_schedule, gamma_schedule)
        super().__init__(rule, loss, start=start, stop=stop, repeats=repeats, **common)
