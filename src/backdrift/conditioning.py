"""Conditioning: the same in every step, another one in each, or a function of time; and the network calls it makes.

| ``cond`` (or ``uncond``) | in a run |
|---|---|
| a nest of tensors | the same throughout; one gradient, the sum over the steps |
| :class:`PerStep` | entry i throughout step i (also where a solver asks at the step's end); one gradient each |
| a callable ``cond(t)`` | called anew at each evaluation with its time; gradients reach the leaves it uses |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import nests
from .errors import InputError
from .scalars import Scalar, value


class PerStep:
    """One conditioning for each step of a run, in the order of the steps (from noise to data).

    Args:
        steps: nests of tensors; as many as the grid has intervals. One that occurs several times is one
            tensor, with one gradient.

    Raises:
        InputError: there are none, or one is itself per step or a function of time.

    Example:
        >>> embeddings = [embedding.clone().requires_grad_() for _ in range(20)]
        >>> solution = sample(model, x_T, PerStep(embeddings), grid=TimeGrid("uniform", 20))
    """

    def __init__(self, steps: Sequence[Any]) -> None:
        self.steps = tuple(steps)
        if not self.steps:
            raise InputError("PerStep needs at least one conditioning")
        if any(isinstance(c, PerStep) or moves(c) for c in self.steps):
            raise InputError("an entry of PerStep is a nest of tensors, no PerStep and no function of time")

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, step: int) -> Any:
        return self.steps[step]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.steps)


def moves(cond: Any) -> bool:
    """Whether a conditioning is a function of time."""
    return callable(cond) and not isinstance(cond, torch.Tensor)


@dataclass(frozen=True)
class Branch:
    """One network call of an evaluation.

    Attributes:
        cond: its conditioning, built once per run, so that a tensor in it (two embeddings in one batch, say) is
            one node of the graph however many calls use it. A function of time; or, where one of a guided pair is,
            the two as a tuple.
        paired: whether the call holds both halves of a guided batch.
        moving: whether the conditioning has to be made anew for each call.
        witness: is told what the network itself has returned, one row for each of its own: before guidance, which
            magnifies rounding.
    """

    cond: Any
    paired: bool
    moving: bool = False
    witness: Callable[[torch.Tensor], None] | None = None

    def at(self, t: Scalar, batch: int) -> Any:
        """The network's conditioning at time ``t`` for a state of ``batch`` rows.

        Raises:
            InputError: the halves can no longer share a batch.
        """
        if not self.moving:
            return self.cond
        if not self.paired:
            return _at(self.cond, t)
        fits, both = nests.concatenate(_at(self.cond[0], t), _at(self.cond[1], t), batch)
        if not fits:
            raise InputError(
                f"cond and uncond could share a batch when the run began, but not at t = {value(t):g}: their "
                "shapes change"
            )
        return both


class Conditions:
    """The network calls of an evaluation, interval by interval.

    Args:
        branches: ``branches(uncond, cond)`` -> the calls for one pair of conditionings.
        uncond, cond: a nest, a :class:`PerStep` or a function of time each.

    Attributes:
        steps: how many intervals the conditionings are for; None if for any number.

    Raises:
        InputError: two PerStep are of different lengths.
    """

    def __init__(self, branches: Callable[[Any, Any], tuple[Branch, ...]], uncond: Any, cond: Any) -> None:
        lengths = {len(c) for c in (uncond, cond) if isinstance(c, PerStep)}
        if len(lengths) > 1:
            raise InputError(f"cond and uncond are given for different numbers of steps: {sorted(lengths)}")
        self.steps = lengths.pop() if lengths else None
        made: dict[tuple[int, int], tuple[Branch, ...]] = {}
        self._each: list[tuple[Branch, ...]] = []
        for step in range(self.steps or 1):
            u, c = (x[step] if isinstance(x, PerStep) else x for x in (uncond, cond))
            key = (id(u), id(c))
            if key not in made:
                made[key] = branches(u, c)
            self._each.append(made[key])

    def at(self, interval: int) -> tuple[Branch, ...]:
        """The calls of an evaluation in that interval."""
        return self._each[interval if self.steps is not None else 0]

    @property
    def calls(self) -> int:
        """The most calls that an evaluation makes."""
        return max(map(len, self._each))

    def all(self) -> list[Branch]:
        """The calls of all intervals."""
        return [branch for each in self._each for branch in each]


def check_steps(conds: Sequence[Any], intervals: int) -> None:
    """Raise if a run of that many intervals cannot use the conditionings.

    Raises:
        InputError: one is given per step, for another number of steps.
    """
    for cond in conds:
        if isinstance(cond, PerStep) and len(cond) != intervals:
            raise InputError(
                f"the conditioning is given for {len(cond)} steps and the run has {intervals}: PerStep needs one entry "
                "per interval of the grid (an adaptive solver has more than its grid: give a function of time)"
            )


def alone(cond: Any) -> Branch:
    """A call with one conditioning."""
    return Branch(cond, False, moves(cond))


def together(uncond: Any, cond: Any, batch: int, t: float) -> Branch | None:
    """Both halves of a guided evaluation as one call, or None where they cannot share a batch.

    Args:
        t: a time at which functions of time are asked, to see whether they can.
    """
    moving = moves(uncond) or moves(cond)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not moving):
        fits, both = nests.concatenate(_at(uncond, t), _at(cond, t), batch)
    if not (fits and nests.tensors(both)):
        return None
    return Branch((uncond, cond), True, True) if moving else Branch(both, True)


def _at(cond: Any, t: Scalar) -> Any:
    return cond(t) if moves(cond) else cond
