"""Reversible solvers: the state is a pair, and a step is a row of *kicks* that can each be undone in closed form.

A kick moves one of the two by the other, which stays where it is:

    target' = keep * target + mix * other + weight * push(other),      push(Y) = base(Y, a -> b) - Y

with an explicit one-step method ``base``. So the other is known afterwards too, its push can be computed again, and

    target = (target' - mix * other - weight * push(other)) / keep

is a kick itself. Nothing has to be stored to go back, in exact arithmetic. In floating point every undone kick
divides the rounding by ``keep``: over a run it grows by Π 1/keep.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from ..errors import InputError
from ..forms import Form, Node
from .base import Solver, Stepper, rescaled
from .runge_kutta import RungeKutta


class Pair(NamedTuple):
    """The state of a reversible solver: two states x, each (B, …), of one shape, dtype and device.

    Attributes:
        first: the one that is the sample at the end.
        second: its companion, as close to it as the solver's order says.
    """

    first: Tensor
    second: Tensor


State = Tensor | Pair
"""What a run steps from node to node: a tensor (B, …), or a reversible solver's pair."""


@dataclass(frozen=True)
class Kick:
    """One move of one of the two (in the form's variable Y) by the other.

    Attributes:
        target: which is moved, 0 or 1.
        keep, mix, weight: the numbers of the formula above; ``keep`` is not 0.
        base: the explicit one-step method that pushes, where ``weight`` is not 0.
        start, stop: the nodes between which it pushes.
        lag: the push is made with the conditioning of the step that many before (of the first one at most).
        shares: whether the slope at ``start`` is the one that the push before it began with: nothing it depends on
            has changed. Set where the row of steps is known (:func:`linked`).
    """

    target: int
    keep: float
    mix: float
    weight: float
    base: Solver
    start: Node
    stop: Node
    lag: int = 0
    shares: bool = False

    @property
    def other(self) -> int:
        """Which is not moved."""
        return 1 - self.target

    def inverse(self) -> Kick:
        """The kick that undoes this one."""
        keep = self.keep
        return replace(self, keep=1 / keep, mix=-self.mix / keep, weight=-self.weight / keep)

    def push(self, form: Form, y: Tensor, slope: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """What the other, at ``y``, pushes with; and the slope that the push begins with, if the base tells it.

        Args:
            form: evaluates the drift.
            y: the other, in Y.
            slope: the drift there, where it is known.
        """
        a, b = self.start, self.stop
        if not isinstance(self.base, RungeKutta):
            x = rescaled(y, form.scale(a.t))
            return rescaled(self.base.begin().step(form, x, a, b), 1 / form.scale(b.t)) - y, None
        if slope is None:
            slope = form.drift(rescaled(y, form.scale(a.t)), a.t)
        return self.base.increment(form, y, a, b, slope), slope

    def moved(self, ys: Sequence[Tensor], push: Tensor | None) -> Tensor:
        """The target after the kick.

        Args:
            ys: the two, in Y.
            push: of the other; None where ``weight`` is 0.
        """
        y = rescaled(ys[self.target], self.keep)
        if self.mix != 0:
            y = y.add(ys[self.other], alpha=self.mix)
        return y if push is None else y.add(push, alpha=self.weight)


@dataclass(frozen=True)
class Leg:
    """One step of a pair over interval number ``interval``: ``kicks`` in order, on the form of that name, from node
    ``start`` to ``end``."""

    interval: int
    form: str
    start: Node
    end: Node
    kicks: tuple[Kick, ...]

    def inverse(self) -> Leg:
        """The step that undoes this one."""
        kicks = tuple(kick.inverse() for kick in reversed(self.kicks))
        return Leg(self.interval, self.form, self.end, self.start, kicks)

    def conditioning(self, kick: Kick) -> int:
        """The interval whose conditioning a kick's push is made with."""
        return max(self.interval - kick.lag, 0)

    def scaled(self, form: Form, pair: Pair) -> list[Tensor]:
        """A pair at :attr:`start` in Y."""
        return [rescaled(x, 1 / form.scale(self.start.t)) for x in pair]

    def unscaled(self, form: Form, ys: Sequence[Tensor]) -> Pair:
        """The pair at :attr:`end` from its Y."""
        scale = form.scale(self.end.t)
        return Pair(rescaled(ys[0], scale), rescaled(ys[1], scale))


def linked(legs: Sequence[Leg]) -> list[Leg]:
    """The steps in that order, with ``shares`` set where one evaluation serves two pushes."""
    moves, before, found = [0, 0], None, []
    for leg in legs:
        kicks = []
        for kick in leg.kicks:
            if kick.weight != 0:
                here = (leg.form, kick.start.t, kick.other, moves[kick.other], leg.conditioning(kick))
                kick, before = replace(kick, shares=here == before), here
            moves[kick.target] += 1
            kicks.append(kick)
        found.append(replace(leg, kicks=tuple(kicks)))
    return found


class ReversibleSolver(Solver):
    """A method whose steps can be undone in closed form."""

    @abstractmethod
    def kicks(self, a: Node, b: Node, index: int) -> tuple[Kick, ...]:
        """Step number ``index`` of a run (from 0), from node ``a`` to ``b``."""

    def begin(self, pair: Pair | None = None) -> PairRun:
        """A fresh run, from ``pair``; from its first state, twice, if None."""
        return PairRun(self, pair)

    @property
    def aside(self) -> ReversibleSolver:
        # A step of a pair is complete in itself, so another form can take over for an interval.
        return self

    def leg(self, interval: int, form: str, a: Node, b: Node) -> Leg:
        """The step over interval number ``interval`` of a run, on the form of that name."""
        return Leg(interval, form, a, b, self.kicks(a, b, interval))

    @staticmethod
    def _one_step(base: Solver, name: str) -> Solver:
        if not isinstance(base, Solver) or base.begin() is not base:
            raise InputError(
                f"{name} couples an explicit one-step method such as Heun(); got {base!r}, "
                + ("a multistep method" if isinstance(base, Solver) else "no solver")
            )
        return base


class PairRun(Stepper):
    """A run of a pair. As a :class:`Stepper` it starts both from the first state, and steps to first states.

    Args:
        solver: the method.
        pair: where to start; at the first step's state, twice, if None.
    """

    def __init__(self, solver: ReversibleSolver, pair: Pair | None = None) -> None:
        self.solver, self.pair, self.steps = solver, pair, 0
        self._slope: Tensor | None = None

    def step(self, form: Form, x: Tensor, a: Node, b: Node) -> Tensor:
        if self.pair is None:
            self.pair = Pair(x, x)
        self.steps += 1
        return self.take(form, self.solver.leg(self.steps - 1, form.name, a, b)).first

    def take(self, form: Form, leg: Leg, enter: Callable[[int], None] | None = None) -> Pair:
        """The pair after one step from :attr:`pair`, which must be given.

        Args:
            form: evaluates the drift.
            leg: the step.
            enter: told the interval whose conditioning the next evaluations are made with.
        """
        if self.pair is None:
            raise InputError("this run has no pair to start from")
        ys = leg.scaled(form, self.pair)
        for kick in leg.kicks:
            push = None
            if kick.weight != 0:
                if enter is not None:
                    enter(leg.conditioning(kick))
                slope = self._slope if kick.shares else None
                push, self._slope = kick.push(form, ys[kick.other], slope)
            ys[kick.target] = kick.moved(ys, push)
        self.pair = leg.unscaled(form, ys)
        return self.pair
