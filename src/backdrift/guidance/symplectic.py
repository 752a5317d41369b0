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
from typing import Any, Literal

from torch import Tensor

from ..errors import InputError
from ..gradients import GradientMethod, SymplecticAdjoint
from ..solvers import Euler, Solver
from .adaptive import Adaptive
from .attempt import Attempt
from .backward import displaced
from .base import Guidance, Losses
from .estimate import Estimator
from .strengths import Strength, Value, strength_of
from .subgrids import check_subgrid
from .when import Repeats, published

Steps = int | Sequence[int] | str

#: The paper's repeats for styles, by parts of the run: once for t = 70 to 61 of 100, then twice (appendix B.1).
PUBLISHED = ((0.3, 1), (0.4, 2))


@dataclass(frozen=True)
class Pull:
    """The rule: the sampler's step, and the estimate's pull on what follows.

    Args:
        n: steps of the estimate: a number, one for each step of the run, or
            :class:`~backdrift.guidance.Adaptive`.
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

    def fits(self, batch: int) -> None:
        """Raise unless the strengths are for that many samples."""
        self.strength.check(batch)

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
        if isinstance(self.n, Adaptive):
            estimate, n = self.n.estimated(attempt)
        else:
            estimate = attempt.estimate(n=self.n if isinstance(self.n, int) else self.n[attempt.host.index])
            n = estimate.n
        eta = self.strength(attempt.evaluation, estimate.pull)
        attempt.note(loss=estimate.values, strength=eta, pull=estimate.pull, n=n)
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
        strength: w of eta = w * s * RMS(eps_c - eps_0)/RMS(g), measured per sample (the paper's 0.2); one w for each
            sample; or a :class:`~backdrift.guidance.Constant` or :class:`~backdrift.guidance.Relative`.
        steps: numbers of the guided steps, or a mask, instead of ``start`` and ``stop``.
        repeats: attempts at each guided step; one number for each step of the run; pairs (part of the run, attempts
            from there on); or ``"published"`` for the paper's ``((0.3, 1), (0.4, 2))``.
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
        decode_chunk_size: how many samples are decoded and scored together, all by default: memory for seconds. The
            loss must be one of each picture alone, as all of ours are that hold no reference for each sample.
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
        strength: Value | Strength = 0.2,
        *,
        steps: Sequence[int] | Sequence[bool] | None = None,
        repeats: Repeats | Literal["published"] = 1,
        subgrid: str = "paper",
        solver: Solver | None = None,
        gradient: GradientMethod | None = None,
        backward: int = 0,
        backward_rate: float = 0.01,
        maximize: bool = False,
        seed: int | Sequence[int] = 0,
        decode: Callable[[Tensor], Tensor] | None = None,
        decode_chunk_size: int | None = None,
        callback: Callable[[Any], Any] | None = None,
        strip: bool | int = False,
        prompts: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__(
            Pull(_steps(n), strength_of(strength), backward, backward_rate),
            loss,
            estimator=Estimator(check_subgrid(subgrid), solver or Euler(), gradient or SymplecticAdjoint()),
            start=start,
            stop=stop,
            steps=steps,
            repeats=published(repeats, PUBLISHED),
            maximize=maximize,
            seed=seed,
            decode=decode,
            decode_chunk_size=decode_chunk_size,
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
    elif isinstance(n, int | Sequence):
        numbers: list[Any] = [n] if isinstance(n, int) else list(n)
        if numbers and all(isinstance(k, int) and not isinstance(k, bool) and k >= 1 for k in numbers):
            return n if isinstance(n, int) else tuple(numbers)
    raise InputError(
        f"n is a whole number >= 1, one for each step of the run, 'adaptive' or Adaptive(...); got {n!r}"
    )
