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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from ..errors import InputError
from ..forms import Form, Node
from .base import Solver, Stepper, rescaled
from .runge_kutta import ExplicitRungeKutta


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
    """

    target: int
    keep: float
    mix: float
    weight: float
    base: Solver
    start: Node
    stop: Node

    @property
    def other(self) -> int:
        """Which is not moved."""
        return 1 - self.target

    def inverse(self) -> Kick:
        """The kick that undoes this one."""
        keep = self.keep
        return replace(self, keep=1 / keep, mix=-self.mix / keep, weight=-self.weight / keep)

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
        self._kicked = [0, 0]
        self._slope: tuple[tuple[object, ...], Tensor] | None = None

    def step(self, form: Form, x: Tensor, a: Node, b: Node) -> Tensor:
        if self.pair is None:
            self.pair = Pair(x, x)
        self.steps += 1
        return self.take(form, self.solver.leg(self.steps - 1, form.name, a, b)).first

    def take(self, form: Form, leg: Leg) -> Pair:
        """The pair after one step from :attr:`pair`, which must be given."""
        if self.pair is None:
            raise InputError("this run has no pair to start from")
        ys = [rescaled(x, 1 / form.scale(leg.start.t)) for x in self.pair]
        for kick in leg.kicks:
            push = self._push(form, kick, ys[kick.other]) if kick.weight != 0 else None
            ys[kick.target] = kick.moved(ys, push)
            self._kicked[kick.target] += 1
        scale = form.scale(leg.end.t)
        self.pair = Pair(rescaled(ys[0], scale), rescaled(ys[1], scale))
        return self.pair

    def _push(self, form: Form, kick: Kick, y: Tensor) -> Tensor:
        base, a, b = kick.base, kick.start, kick.stop
        if not isinstance(base, ExplicitRungeKutta):
            x = rescaled(y, form.scale(a.t))
            return rescaled(base.begin().step(form, x, a, b), 1 / form.scale(b.t)) - y
        # A step's last push and the next one's first may start from the same state: one evaluation serves both.
        where = (form.name, a.t, kick.other, self._kicked[kick.other])
        if self._slope is None or self._slope[0] != where:
            self._slope = (where, form.drift(rescaled(y, form.scale(a.t)), a.t))
        return base.increment(form, y, a, b, self._slope[1])
