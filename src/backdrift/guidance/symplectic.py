"""Symplectic Adjoint Guidance (Pan et al. 2023): guidance by the exact gradient of an n-step estimate.

At a guided step from x_t (their Algorithm 1):

    x0'   = n steps of the probability-flow ODE from x_t to sigma = 0            (Eq. 6)
    g     = dL(decode(x0')) / dx_t, by the symplectic adjoint                    (Eqs. 7, 8)
    x_t'  = the sampler's own step from x_t,   then   x_t' <- x_t' - eta g

and, with repeats, back to t by fresh noise and again. n = 1 is FreeDoM (Yu et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..gradients import GradientMethod, SymplecticAdjoint
from ..solvers import Euler, Solver
from .attempt import Attempt
from .backward import displaced
from .base import Guidance, Losses
from .estimate import Estimator
from .strengths import Strength, rms, strength_of
from .subgrids import check_subgrid

Steps = int | Sequence[int] | str


@dataclass
class Adaptive:
    """As many steps as the estimate needs: n for which n and n + 1 steps agree.

    Euler's error falls like 1/n, so estimates with n and n + 1 steps differ by about C/(n (n + 1)). C is measured at
    each guided step, by a second estimate without a gradient (n network calls more, its first being known), and the
    next step takes the least n with C/(n (n + 1)) <= tolerance. C falls with the noise: n is large early, 1 at the end.

    Args:
        tolerance: root mean square of the difference, relative to the estimate's; every sample's must be below.
        most: no more steps than that; where C is not known yet, the first guided step takes as many.
    """

    tolerance: float = 0.1
    most: int = 8

    def __post_init__(self) -> None:
        if not (self.tolerance > 0 and math.isfinite(self.tolerance)) or self.most < 1:
            raise InputError(f"{self}: needs tolerance > 0 and most >= 1")
        self._next = self.most

    def begin(self) -> None:
        """A new run."""
        self._next = self.most

    def choose(self, left: int) -> int:
        """Steps of the estimate, with ``left`` steps of the run to go."""
        return max(1, min(self._next, self.most, left))

    def learn(self, n: int, coarse: Tensor, fine: Tensor) -> float:
        """From the estimates with n and n + 1 steps: their relative difference."""
        apart = float((rms(coarse - fine) / rms(fine).clamp_min(torch.finfo(fine.dtype).tiny)).max())
        constant = apart * n * (n + 1)
        # least n with n (n + 1) >= C / tolerance
        self._next = max(1, math.ceil((math.sqrt(1 + 4 * constant / self.tolerance) - 1) / 2 - 1e-9))
        return apart


@dataclass(frozen=True)
class Pull:
    """The rule: the sampler's step, and the estimate's pull on what follows.

    Args:
        n: steps of the estimate: a number, one for each step of the run, or :class:`Adaptive`.
        strength: eta.
        backward: steps of gradient descent on the one-step estimate before the sampler's step
            (:mod:`~backdrift.guidance.backward`).
        rate: of that descent.
    """

    n: int | tuple[int, ...] | Adaptive
    strength: Strength
    backward: int = 0
    rate: float = 0.01

    def __post_init__(self) -> None:
        if isinstance(self.backward, bool) or not isinstance(self.backward, int) or self.backward < 0:
            raise InputError(f"backward is a whole number of steps >= 0; got {self.backward!r}")
        if not (self.rate > 0 and math.isfinite(self.rate)):
            raise InputError(f"backward_rate must be positive; got {self.rate!r}")

    def begin(self) -> None:
        """A new run."""
        if isinstance(self.n, Adaptive):
            self.n.begin()

    def check(self, guided: Sequence[int], total: int) -> None:
        """Raise if the estimate asks for more steps than are left.

        Raises:
            InputError: naming the first step where it does.
        """
        if isinstance(self.n, Adaptive):
            return
        if not isinstance(self.n, int) and len(self.n) != total:
            raise InputError(f"n has {len(self.n)} numbers for a run of {total} steps; give one, or {total}")
        for i in guided:
            n = self.n if isinstance(self.n, int) else self.n[i]
            if n > total - i:
                raise InputError(
                    f"n = {n} is more than the {total - i} steps that are left at guided step {i} of {total}: lower n, "
                    "stop guiding earlier, or use n='adaptive'"
                )

    def __call__(self, attempt: Attempt) -> Tensor:
        host = attempt.host
        if isinstance(self.n, Adaptive):
            n = self.n.choose(host.total - host.index)
        else:
            n = self.n if isinstance(self.n, int) else self.n[host.index]
        estimate = attempt.estimate(n=n)
        if isinstance(self.n, Adaptive):
            self.n.learn(n, estimate.x0, attempt.clean(n + 1))
        eta = self.strength(attempt.evaluation, estimate.pull)
        attempt.note(loss=estimate.values, strength=eta, pull=estimate.pull, n=estimate.n)
        evaluation = attempt.evaluation
        if self.backward:
            x0 = evaluation.x0
            evaluation = evaluation.with_x0(x0 + displaced(attempt, x0, self.backward, self.rate))
        return attempt.pushed(attempt.take(evaluation), eta * estimate.pull)


class SymplecticAdjointGuidance(Guidance):
    """Training-free guidance by the exact gradient of an n-step estimate of the finished picture.

    Used in three ways: ``pipe(prompt, callback_on_step_end=guidance)``, ``bd.sample(..., guidance=guidance)`` and
    ``bd.guide(pipe, prompt, guidance)`` (docs/guidance.md says how they differ). Other rules have this object's
    arguments too: :mod:`backdrift.guidance.presets`.

    Args:
        loss: pictures (B, 3, H, W) in [0, 1], not clamped, and optionally prompts -> (B,); a spec string, callable,
            :class:`~backdrift.losses.Loss`, a mapping to weights, or a list of (weight, loss).
        n: steps of the estimate. 1 is FreeDoM; the paper's 4 or 5; a list with one number for each step of the run;
            ``"adaptive"`` or an :class:`Adaptive`.
        start, stop: step i of N is guided where ``start <= i/N < stop``; the paper's 0.3 to 0.7 (of 100 steps those
            from 70 to 31, counted down).
        strength: w of eta = w * s * RMS(eps_c - eps_0)/RMS(g), per sample (the paper's 0.2), or a
            :class:`~backdrift.guidance.Constant` or :class:`~backdrift.guidance.Relative`.
        steps: numbers of the guided steps, or a mask, instead of ``start`` and ``stop``.
        repeats: attempts at each guided step (the paper's 2), or one number for each step of the run.
        subgrid: where the estimate steps: ``"paper"``, ``"uniform"`` or ``"logsnr"``
            (:func:`~backdrift.guidance.subgrids.subgrid`).
        solver: of the estimate; any explicit one.
        gradient: any gradient method that takes the solver. The default makes n forward calls a step, the sampler's own
            among them, n again on the way back, and n vector–Jacobian products, with one call's activations at a time.
        backward: steps of Universal Guidance's backward guidance before each guided step: gradient descent on the
            one-step estimate, at ``backward_rate`` times the loss's gradient, with no call of the network.
        backward_rate: see there.
        maximize: let the loss rise.
        seed: of the fresh noise of time travel; one number, or one for each sample. Samples have streams of their own.
        decode: clean samples -> pictures, in place of the pipeline's own decoder; needed by ``bd.sample`` where the
            samples are not pictures already.
        callback: called after each attempt with its :class:`~backdrift.guidance.trace.Entry`.
        prompts: for losses that compare with a text: one per sample, or one for all. ``bd.guide`` knows them.
        strip: keep the estimates' pictures in the trace, at most so many pixels high and wide (True: 128).

    Attributes:
        trace: what was done in the last run (:class:`~backdrift.guidance.trace.GuidanceTrace`).

    Raises:
        InputError: an argument has an impossible value.
    """

    def __init__(
        self,
        loss: Losses,
        n: Steps | Adaptive = 4,
        start: float = 0.3,
        stop: float = 0.7,
        strength: float | Strength = 0.2,
        *,
        steps: Sequence[int] | Sequence[bool] | None = None,
        repeats: int | Sequence[int] = 1,
        subgrid: str = "paper",
        solver: Solver | None = None,
        gradient: GradientMethod | None = None,
        backward: int = 0,
        backward_rate: float = 0.01,
        maximize: bool = False,
        seed: int | Sequence[int] = 0,
        decode: Callable[[Tensor], Tensor] | None = None,
        callback: Callable[[Any], Any] | None = None,
        strip: bool | int = False,
        prompts: Sequence[str] | None = None,
    ) -> None:
        super().__init__(
            Pull(_steps(n), strength_of(strength), backward, backward_rate),
            loss,
            estimator=Estimator(check_subgrid(subgrid), solver or Euler(), gradient or SymplecticAdjoint()),
            start=start,
            stop=stop,
            steps=steps,
            repeats=repeats,
            maximize=maximize,
            seed=seed,
            decode=decode,
            callback=callback,
            strip=strip,
            prompts=prompts,
        )


def _steps(n: Steps | Adaptive) -> int | tuple[int, ...] | Adaptive:
    if isinstance(n, Adaptive):
        return n
    if isinstance(n, str):
        if n == "adaptive":
            return Adaptive()
    else:
        numbers = [n] if isinstance(n, int) else list(n)
        if numbers and all(isinstance(k, int) and not isinstance(k, bool) and k >= 1 for k in numbers):
            return n if isinstance(n, int) else tuple(numbers)
    raise InputError(
        f"n is a whole number >= 1, one for each step of the run, 'adaptive' or Adaptive(...); got {n!r}"
    )
