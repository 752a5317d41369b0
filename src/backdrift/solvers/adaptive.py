"""Adaptive Dormand–Prince: torchdiffeq chooses the steps, and the run on those steps is an ordinary one.

The gradient of an adaptive run is that of the steps it accepted, with their sizes held fixed. So the steps are
searched for first, without gradients (:func:`accepted_steps`); what is then solved, stored, redone or differentiated
is :class:`~backdrift.solvers.DormandPrince` on the accepted nodes, and every gradient method that takes an explicit
Runge–Kutta method takes it. The price is a second forward pass: 6 evaluations a step attempted in the search, and 6 a
step accepted in the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError, NonFiniteError, UnsupportedError
from ..forms import Form, Node
from .base import Solver, Stepper, rescaled
from .runge_kutta import DormandPrince

Drift = Callable[[float, Tensor], Tensor]

# Song et al. 2021 (score SDE) sample with these.
TOLERANCE = 1e-5


class Accepted(NamedTuple):
    """The steps that an adaptive method accepted on one interval.

    Attributes:
        clocks: the nodes (n + 1), both ends among them.
        states: at the nodes after the first (n).
        last: size of the last step before the end was in its way, to begin the next interval with.
    """

    clocks: list[float]
    states: list[Tensor]
    last: float


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

    Raises:
        NonFiniteError: the drift is NaN or infinite.
        InputError: too many steps, or steps below the resolution of the clock.
        UnsupportedError: torchdiffeq is not installed.
    """
    odeint = _odeint()
    low, high = min(start, stop), max(start, stop)
    steps: list[tuple[float, Tensor, float]] = []  # where each begins, the state there, its size
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
        # torchdiffeq hands s over in y's dtype, in which an end may be rounded to beyond itself.
        clock = min(max(float(s), low), high)
        if left < 0:
            raise InputError(
                f"{max_steps} steps of adaptive Dormand–Prince lead only from {where(start)} to {where(clock)}, not to "
                f"{where(stop)}: raise rtol and atol ({rtol:g}, {atol:g}), or max_steps"
            )
        k = drift(clock, y)
        if not bool(k.isfinite().all()):
            raise NonFiniteError(
                f"the drift became NaN or infinite at {where(clock)} while adaptive steps were looked for: the "
                "network's output is not finite there, or the state it was given is far off"
            )
        return k

    # torchdiffeq looks for callbacks on the function it is given.
    inner.callback_accept_step = lambda s, y, h: steps.append((float(s), y, float(h)))  # type: ignore[attr-defined]
    ends = torch.tensor([start, stop], dtype=torch.float64, device=y.device)
    options: dict[str, Any] = {"step_t": ends[1:].clone(), "first_step": first_step}
    try:
        with torch.no_grad():
            found = odeint(inner, y, ends, rtol=rtol, atol=atol, method="dopri5", options=options)
    except AssertionError as error:  # its way of saying that a step no longer changes the clock
        raise too_small(error) from error
    clocks = [start, *(s for s, _, _ in steps[1:]), stop]
    return Accepted(clocks, [*(y for _, y, _ in steps[1:]), found[-1]], max(size for *_, size in steps[-2:]))


class AdaptiveDormandPrince(Solver):
    """Dormand and Prince's 5(4) pair with steps chosen by its error estimate, through torchdiffeq (dopri5).

    The grid's nodes are kept, and as many more are put between them as the tolerances ask for; without a grid
    there is one interval, from the schedule's ``start`` to its ``end``. :attr:`Solution.times` are the nodes used. One
    step size serves the whole batch. Gradients are those of the accepted steps, their sizes held fixed.

    A run with gradients makes two forward passes (see :mod:`backdrift.solvers.adaptive`); under ``torch.no_grad()`` the
    search is the run. ``nfe`` and ``stats.calls_forward`` count both.

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
        self, form: Form, x: Tensor, a: Node, b: Node, first_step: float | None = None
    ) -> tuple[list[float], list[Tensor], float]:
        """The times after ``a``'s that the accepted steps lead to, the states x there, and the size of the last step.

        Args:
            form: with the model.
            x: state at ``a``.
            a, b: an interval on which the form is regular.
            first_step: the last step of the interval before.
        """
        y = rescaled(x, 1 / form.scale(a.t))

        def node(s: float) -> Node:
            return a if s == a.s else b if s == b.s else form.between(s)

        def drift(s: float, y: Tensor) -> Tensor:
            t = node(s).t
            return form.drift(rescaled(y, form.scale(t)), t)

        clocks, ys, last = accepted_steps(
            drift,
            y,
            a.s,
            b.s,
            rtol=self.rtol,
            atol=self.atol,
            first_step=first_step,
            max_steps=self.max_steps,
            where=lambda s: f"t = {node(s).t:g}",
        )
        times = [node(s).t for s in clocks[1:]]
        return times, [rescaled(y, form.scale(t)) for y, t in zip(ys, times, strict=True)], last


def _odeint() -> Callable[..., Tensor]:
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise UnsupportedError(
            'adaptive steps are chosen by torchdiffeq, which is not installed: pip install "backdrift[adaptive]"'
        ) from error
    return odeint
