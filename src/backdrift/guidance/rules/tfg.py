"""TFG: the unified framework of Training-Free Guidance (Ye et al., NeurIPS 2024, arXiv:2409.15761).

Algorithm 1, in this project's notation, for a step from t to t-1 with ᾱ = alpha², alpha_t = ᾱ_t/ᾱ_{t-1} and log f = -L:

    log ftilde(x0) = log E_d exp(-L(x0 + gamma_t d)),  d ~ N(0, I),  gamma_t = gamma sqrt(1 - ᾱ_t)
    D_t  =  rho_t grad_{x_t} log ftilde(xhat0(x_t))
    D_0 <-  D_0 + mu_t grad_{x0} log ftilde(xhat0 + D_0),  N_iter times from D_0 = 0
    x_{t-1}  =  Step(x_t, eps) + D_t / sqrt(alpha_t) + sqrt(ᾱ_{t-1}) D_0

(the paper's implicit dynamics, variance guidance and mean guidance) and N_recur recurrences by fresh noise, which are
time travel (``repeats``). The expectation is over ``samples`` draws, the same for D_t and for all iterations of D_0 (as
in the authors' code).

rho_t = rho w_t and mu_t = mu w_t follow schedules of mean 1 over the run: w_t in proportion to alpha_t
(``"increase"``), to 1 - alpha_t (``"decrease"``), or 1 (``"constant"``); gamma_t is gamma sqrt(1 - ᾱ_t)
(``"decrease"``) or gamma (``"constant"``).

A :class:`~backdrift.guidance.Relative` strength w in the place of rho or mu takes the gradients' own size out, with R
the guidance scale times RMS(eps_c - eps_0), measured for each sample:

    x_{t-1} moves by w_t * w * R * D_t / RMS(D_t),    each step of D_0 by w_t * w * R * grad / RMS(grad).

The other rules lie in this space (the paper's Theorem on its hyper-parameters; the tests hold each):

* DPS: mu = 0, gamma = 0, rho_t = sqrt(alpha_t) zeta / sqrt(L);   FreeDoM: the same with its own strength, and N_recur;
* LGD: mu = 0, gamma = 1, rho_t = sqrt(alpha_t) strength;
* MPGD with eps kept: rho = 0, gamma = 0, N_iter = 1, mu_t = c_t;
* Universal Guidance, forward and one backward step from a DDIM step: gamma = 0, N_iter = 1,
  rho_t = sqrt(alpha_t) s (alpha' sigma/alpha - sigma') sigma, mu_t = rate (1 - alpha sigma'/(alpha' sigma)).

Published settings for style (Stable Diffusion 1.5, 100 steps, eta = 1, all steps guided; L there is a hundredth of
the Frobenius norm between Gram matrices): rho 0.25, mu 2, gamma 0.1, N_iter 4, one draw, schedules
increase/increase/decrease.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...errors import InputError
from ...host import Host, Level
from ..attempt import Attempt
from ..scoring import Score, wide
from ..strengths import Strength
from .numbers import fits, positive, positive_or_strength, signal, whole
from .smoothed import draws, pulled, smoothed

Weights = Callable[[Level, Level], float]
Growth = Literal["increase", "decrease", "constant"] | Weights


@dataclass(frozen=True)
class TFGRule:
    """The next state, moved by a gradient at x_t and by one at x0.

    Costs the sampler's own network call, and with rho > 0 that call redone with its graph and one vector–Jacobian
    product; ``samples`` decodings for the first gradient by x0, which both parts share, and for each further
    iteration. Singular where alpha = 0.

    Args:
        rho: >= 0, of the gradient at x_t; or a strength, see above.
        mu: >= 0, of the gradient at x0; or a strength.
        gamma: >= 0, the paper's gamma-bar, spread of the implicit dynamics.
        iterations: N_iter >= 1.
        samples: draws of the implicit dynamics, >= 1.
        rho_schedule, mu_schedule: ``"increase"``, ``"decrease"``, ``"constant"``, or a function of the step's two
            levels in unit coordinates (alpha² + sigma² = 1), whose value multiplies rho or mu as it is.
        gamma_schedule: ``"decrease"`` or ``"constant"``.

    Raises:
        InputError: an argument is out of range, or rho = mu = 0.
    """

    rho: float | Strength = 0.25
    mu: float | Strength = 2.0
    gamma: float = 0.1
    iterations: int = 4
    samples: int = 1
    rho_schedule: Growth = "increase"
    mu_schedule: Growth = "increase"
    gamma_schedule: Literal["decrease", "constant"] = "decrease"

    def __post_init__(self) -> None:
        for name in ("rho", "mu"):
            positive_or_strength(name, getattr(self, name), zero=True)
        positive("gamma", self.gamma, zero=True)
        whole("iterations", self.iterations, 1)
        whole("samples", self.samples, 1)
        for name in ("rho_schedule", "mu_schedule"):
            growth = getattr(self, name)
            if not callable(growth) and growth not in ("increase", "decrease", "constant"):
                raise InputError(
                    f"{name} must be 'increase', 'decrease', 'constant', or a function of the step's two levels; got "
                    f"{growth!r}"
                )
        if self.gamma_schedule not in ("decrease", "constant"):
            raise InputError(f"gamma_schedule must be 'decrease' or 'constant'; got {self.gamma_schedule!r}")
        if self.rho == 0 and self.mu == 0:
            raise InputError("TFG with rho = 0 and mu = 0 does nothing: set one of them")

    def fits(self, batch: int) -> None:
        """Raise unless the strengths are for that many samples."""
        fits(batch, self.rho, self.mu)

    def __call__(self, attempt: Attempt) -> Tensor:
        """The state after the step.

        Raises:
            InputError: alpha = 0 at the step's beginning, or a schedule of mean 1 is asked for where the host does not
                tell its noise levels.
        """
        host = attempt.host
        signal("TFG", host)
        start, end = unit(host.start), unit(host.end)
        by = draws(
            attempt, self.samples, self.gamma * (start.sigma if self.gamma_schedule == "decrease" else 1.0)
        )
        seen: list[Score] = []

        def score(x0: Tensor) -> Score:
            seen.append(smoothed(attempt, x0, by))
            return seen[-1]

        following = attempt.take()
        strength: float | Tensor = 0.0
        pull: Tensor | None = None
        if self.rho:
            share = weight(self.rho_schedule, host)
            found = pulled(attempt, score)
            pull = found.pull
            if isinstance(self.rho, Strength):
                eta = share * self.rho(attempt.evaluation, pull)
                strength, following = eta.flatten(), attempt.pushed(following, eta * pull)
            else:
                strength = self.rho * share
                following = attempt.pushed(following, strength * end.alpha / start.alpha * pull)
        else:
            score(wide(attempt.evaluation.x0))
        first = seen[0]
        if self.mu:
            moved = self._mean(attempt, score, first)
            following = following + (host.end.alpha * moved).to(following.dtype)
        attempt.note(
            loss=first.values,
            strength=torch.zeros_like(first.values) + strength,
            pull=first.pull if pull is None else pull,
            n=1 if self.rho else None,
        )
        return following

    def _mean(self, attempt: Attempt, score: Callable[[Tensor], Score], first: Score) -> Tensor:
        """D_0 (B, …)."""
        share, evaluation = weight(self.mu_schedule, attempt.host), attempt.evaluation
        x0 = wide(evaluation.x0)

        def step(pull: Tensor) -> Tensor:
            if isinstance(self.mu, Strength):
                return share * self.mu(evaluation, pull) * pull
            return self.mu * share * pull

        moved = -step(first.pull)
        for _ in range(self.iterations - 1):
            moved = moved - step(score(x0 + moved).pull)
        return moved


def unit(level: Level) -> Level:
    """The level with alpha² + sigma² = 1."""
    size = math.hypot(*level)
    return Level(level.alpha / size, level.sigma / size)


def weight(growth: Growth, host: Host) -> float:
    """w_t of a host's step.

    Raises:
        InputError: the host does not tell the noise levels of the whole run.
    """
    if callable(growth):
        return float(growth(unit(host.start), unit(host.end)))
    if growth == "constant":
        return 1.0
    levels = host.levels
    if levels is None:
        raise InputError(
            f"{type(host).__name__} does not tell the noise levels of its run, over which the schedule {growth!r} has "
            "mean 1: use 'constant', or a function of the step's levels"
        )
    mean = sum(_grown(growth, *pair) for pair in levels) / len(levels)
    return _grown(growth, host.start, host.end) / mean


def _grown(growth: str, start: Level, end: Level) -> float:
    """alpha_t or 1 - alpha_t of a step."""
    kept = (unit(start).alpha / unit(end).alpha) ** 2
    return kept if growth == "increase" else 1 - kept
