"""Adaptive Dormand–Prince: torchdiffeq chooses the steps, and the run on those steps is an ordinary one.

The gradient of an adaptive run is that of the steps it accepted, with their sizes held fixed. So the steps are
searched for first, without gradients (:func:`accepted_steps`); what is then solved, stored, redone or differentiated
is :class:`~backdrift.solvers.DormandPrince` on the accepted nodes, and every gradient method that takes an explicit
Runge–Kutta method takes it. The price is a second forward pass: 6 evaluations a step attempted in the search, and 6 a
step accepted in the run. A method that needs no more of the forward pass than its states takes the search for the run
(:class:`~backdrift.gradients.ContinuousAdjoint` does): a :class:`Witness` tells it of every step as it is taken.

The pair is "first same as last": a step's last evaluation is the next one's first, so a step attempted costs 6.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..accelerators import has_float64
from ..errors import InputError, NonFiniteError, UnsupportedError
from ..forms import Form, Node
from .base import Solver, Stepper, add_scaled, rescaled
from .runge_kutta import DormandPrince

Drift = Callable[[float, Tensor], Tensor]

STAGES = 7  # of the pair, the one at the step's end included, which is the next step's first

# Weights of the stages for the state halfway through a step, exact to order 4 (Shampine 1986, Some practical
# Runge–Kutta formulas; the fifth-order formula's continuous extension at 1/2).
_HALFWAY = (
    6025192743 / 30085553152 / 2,
    0.0,
    51252292925 / 65400821598 / 2,
    -2691868925 / 45128329728 / 2,
    187940372067 / 1594534317056 / 2,
    -1776094331 / 19743644256 / 2,
    11237099 / 235043384 / 2,
)

# Song et al. 2021 (score SDE) sample with these.
TOLERANCE = 1e-5


class Accepted(NamedTuple):
    """The steps that an adaptive method accepted on one interval.

    Attributes:
        clocks: the nodes (n + 1), both ends among them.
        states: at the nodes after the first (n).
        middles: halfway between the nodes (n), if they were asked for.
        last: size of the last step before the end was in its way, to begin the next interval with.
    """

    clocks: list[float]
    states: list[Tensor]
    middles: list[Tensor]
    last: float


class Witness:
    """Told what an adaptive method does with its evaluations; by itself it does nothing.

    On an interval the method makes one evaluation at the start (stage 1), at most one more to guess a first step, and
    then 6 for each step it attempts (stages 2 to 7). A step's stage 7 is the stage 1 of the step after it.
    """

    def begun(self) -> None:
        """An interval begins: stage 1 comes."""

    def attempted(self) -> None:
        """A step begins: stages 2 to 7 come."""

    def accepted(self, step: float) -> None:
        """It was accepted; ``step`` is its size, with its sign."""

    def rejected(self) -> None:
        """It was not: it will be tried again from where it began, with another size."""

    def beside(self) -> None:
        """Another method took a step, to or from an end where the form is singular."""


def accepted_steps(
    drift: Drift,
    y: Tensor,
    start: float,
    stop: float,
    *,
    rtol: float = TOLERANCE,
    atol: float = TOLERANCE,
    first_step: float | None = None,
    max_steps: int = 1000,
    where: Callable[[float], str] = "clock = {:g}".format,
    witness: Witness | None = None,
    middles: bool = False,
) -> Accepted:
    """Solve dy/ds = drift(s, y) from ``start`` to ``stop`` (either way) by torchdiffeq's dopri5, without gradients.

    Nothing is evaluated beyond ``stop``: torchdiffeq is told that a step must end there.

    Args:
        drift: ``drift(s, y)``, of y's shape; ``s`` lies between the two ends.
        y: the state, float32 or float64.
        start, stop: the ends, in the drift's own clock.
        rtol, atol: a step is accepted if the root mean square of its error over ``atol + rtol * |y|`` is at most 1.
        first_step: size of the first attempt; chosen with one more evaluation if None.
        max_steps: attempts before giving up.
        where: how messages say at which clock something happened.
        witness: told of every step.
        middles: whether the states halfway through the steps are wanted.

    Raises:
        NonFiniteError: the drift is NaN or infinite.
        InputError: too many steps, or steps below the resolution of the clock.
        UnsupportedError: torchdiffeq is not installed.
    """
    odeint, watching = _odeint(), witness or Witness()
    run = _Search(drift, start, stop, watching, middles)
    left = 6 * max_steps + 2

    def too_small(what: object) -> InputError:
        return InputError(
            f"adaptive Dormand–Prince needs steps too small for {y.dtype} between {where(start)} and {where(stop)} "
            f"({what}): raise rtol and atol ({rtol:g}, {atol:g}), or use a state of more precision"
        )

    def inner(s: Tensor, y: Tensor) -> Tensor:
        nonlocal left
        left -= 1
        if not bool(s.isfinite()):
            raise too_small("the size of a step is not finite")
        clock = run.inside(float(s))
        if left < 0:
            raise InputError(
                f"{max_steps} steps of adaptive Dormand–Prince lead only from {where(start)} to {where(clock)}, not to "
                f"{where(stop)}: raise rtol and atol ({rtol:g}, {atol:g}), or max_steps"
            )
        k = run.evaluated(clock, y)
        if not bool(k.isfinite().all()):
            raise NonFiniteError(
                f"the drift became NaN or infinite at {where(clock)} while adaptive steps were looked for: the "
                "network's output is not finite there, or the state it was given is far off"
            )
        return k

    # torchdiffeq looks for callbacks on the function it is given.
    inner.callback_step = lambda s, y, h: run.attempted()  # type: ignore[attr-defined]
    inner.callback_accept_step = lambda s, y, h: run.accepted(float(s), y, float(h))  # type: ignore[attr-defined]
    inner.callback_reject_step = lambda s, y, h: watching.rejected()  # type: ignore[attr-defined]
    precise = torch.float64 if has_float64(y.device) else y.dtype
    ends = torch.tensor([start, stop], dtype=precise, device=y.device)
    options: dict[str, Any] = {"step_t": ends[1:].clone(), "first_step": first_step}
    watching.begun()
    try:
        with torch.no_grad():
            odeint(inner, y, ends, rtol=rtol, atol=atol, method="dopri5", options=options)
    except AssertionError as error:  # its way of saying that a step no longer changes the clock
        raise too_small(error) from error
    return run.found()


class _Search:
    """What one search has asked for and accepted so far."""

    def __init__(self, drift: Drift, start: float, stop: float, witness: Witness, middles: bool) -> None:
        self.drift, self.start, self.stop, self.witness = drift, start, stop, witness
        self.middles: list[Tensor] | None = [] if middles else None
        self.clocks: list[float] = []  # where each step begins
        self.states: list[Tensor] = []  # where each step ends
        self.sizes: list[float] = []
        self._stages: list[Tensor] = []  # drifts of the step attempted, while middles are wanted
        self._asked: Tensor | None = None  # the state of the last evaluation

    def inside(self, s: float) -> float:
        """torchdiffeq hands s over in y's dtype, in which an end may be rounded to beyond itself."""
        return min(max(s, min(self.start, self.stop)), max(self.start, self.stop))

    def evaluated(self, clock: float, y: Tensor) -> Tensor:
        self._asked = y
        k = self.drift(clock, y)
        if self.middles is not None:
            self._stages.append(k)
        return k

    def attempted(self) -> None:
        del self._stages[1:]  # what is left is the step's first stage
        self.witness.attempted()

    def accepted(self, s: float, y: Tensor, size: float) -> None:
        assert self._asked is not None  # the last stage is asked for at the step's end state
        step = math.copysign(size, self.stop - self.start)
        self.clocks.append(s)
        self.states.append(self._asked)
        self.sizes.append(size)
        if self.middles is not None:
            terms = [(step * w, k) for w, k in zip(_HALFWAY, self._stages, strict=True) if w != 0]
            self.middles.append(add_scaled(y, terms))
            self._stages = self._stages[-1:]
        self.witness.accepted(step)

    def found(self) -> Accepted:
        clocks = [self.start, *self.clocks[1:], self.stop]
        return Accepted(clocks, self.states, self.middles or [], max(self.sizes[-2:]))


class Stretch(NamedTuple):
    """An interval of the grid in the steps that an adaptive solver accepted on it.

    Attributes:
        times: of the nodes after the interval's first (n).
        states: x there.
        middles: time and x halfway through each step, in the form's clock; None where they were not asked for.
        last: size of the last step, to begin the next interval with; None if there is none to go by.
    """

    times: list[float]
    states: list[Tensor]
    middles: list[tuple[float, Tensor] | None]
    last: float | None


class AdaptiveDormandPrince(Solver):
    """Dormand and Prince's 5(4) pair with steps chosen by its error estimate, through torchdiffeq (dopri5).

    The grid's nodes are kept, and as many more are put between them as the tolerances ask for; without a grid
    there is one interval, from the schedule's ``start`` to its ``end``. :attr:`Solution.times` are the nodes used. One
    step size serves the whole batch. Gradients are those of the accepted steps, their sizes held fixed.

    A run with gradients makes two forward passes (see :mod:`backdrift.solvers.adaptive`); under ``torch.no_grad()``,
    and with :class:`~backdrift.gradients.ContinuousAdjoint`, the search is the run. ``nfe`` and
    ``stats.calls_forward`` count all.

    Needs torchdiffeq (``pip install "backdrift[adaptive]"``).

    Args:
        rtol, atol: a step is accepted if the root mean square of its error over ``atol + rtol * |Y|`` is at most 1, Y
            the form's variable (x, x/alpha or x/sigma).
        max_steps: attempts on one interval of the grid before giving up.

    Raises:
        InputError: a tolerance is not positive, or ``max_steps`` no whole number above 0.
    """

    order = 5

    def __init__(self, rtol: float = TOLERANCE, atol: float = TOLERANCE, max_steps: int = 1000) -> None:
        for name, value in (("rtol", rtol), ("atol", atol)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise InputError(f"{name} must be a positive number; got {value!r}")
        if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
            raise InputError(f"max_steps must be a whole number >= 1; got {max_steps!r}")
        self.rtol, self.atol, self.max_steps = float(rtol), float(atol), max_steps

    def __repr__(self) -> str:
        return f"AdaptiveDormandPrince(rtol={self.rtol:g}, atol={self.atol:g})"

    @property
    def fixed(self) -> Solver:
        """The method on the accepted steps."""
        return DormandPrince()

    @property
    def aside(self) -> Solver:
        return self.fixed

    def begin(self) -> Stepper:
        raise InputError(f"{self!r} has no steps of its own: they are found first, as sample() does")

    def evaluations(self, index: int) -> int:
        raise InputError(f"the evaluations of {self!r} are known when its steps have been found")

    def accepted(
        self,
        form: Form,
        x: Tensor,
        a: Node,
        b: Node,
        first_step: float | None = None,
        *,
        witness: Witness | None = None,
        middles: bool = False,
    ) -> Stretch:
        """The steps accepted from ``a`` to ``b``.

        Args:
            form: with the model.
            x: state at ``a``.
            a, b: an interval on which the form is regular.
            first_step: the last step of the interval before.
            witness: told of every step.
            middles: whether the states halfway are wanted.
        """
        y = rescaled(x, 1 / form.scale(a.t))

        def node(s: float) -> Node:
            return a if s == a.s else b if s == b.s else form.between(s)

        def drift(s: float, y: Tensor) -> Tensor:
            t = node(s).t
            return form.drift(rescaled(y, form.scale(t)), t)

        found = accepted_steps(
            drift,
            y,
            a.s,
            b.s,
            rtol=self.rtol,
            atol=self.atol,
            first_step=first_step,
            max_steps=self.max_steps,
            where=lambda s: f"t = {node(s).t:g}",
            witness=witness,
            middles=middles,
        )
        times = [node(s).t for s in found.clocks[1:]]
        states = [rescaled(y, form.scale(t)) for y, t in zip(found.states, times, strict=True)]
        between: list[tuple[float, Tensor] | None] = [None] * len(times)
        for i, y in enumerate(found.middles):
            t = form.between((found.clocks[i] + found.clocks[i + 1]) / 2).t
            between[i] = (t, rescaled(y, form.scale(t)))
        return Stretch(times, states, between, found.last)


def _odeint() -> Callable[..., Tensor]:
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise UnsupportedError(
            'adaptive steps are chosen by torchdiffeq, which is not installed: pip install "backdrift[adaptive]"'
        ) from error
    return odeint
