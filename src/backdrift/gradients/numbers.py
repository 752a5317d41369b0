"""The numbers of one Runge–Kutta step, and how a loss depends on the step's two times through them.

A step touches its times through few numbers only: h b_i, h a_ij, the scales of x, the coefficients of the drift, and
the times at which the network is asked. The gradient by each is a dot product of two tensors that the way back has
at hand anyway; from there to the two times it is a matter of 0-dimensional tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..accelerators import doubled
from ..errors import InputError
from ..forms import Form, Node
from ..scalars import Scalar, graphed, value
from ..solvers.runge_kutta import RungeKutta, Tableau

Key = tuple[Any, ...]


def live_stages(tableau: Tableau) -> list[int]:
    """The stages that the step's result depends on."""
    live: set[int] = set()
    for i in reversed(range(len(tableau.b))):
        if tableau.b[i] != 0 or any(tableau.a[j][i] != 0 for j in live):
            live.add(i)
    return sorted(live)


class StepNumbers:
    """Of a step of ``solver`` on ``form`` from ``start`` to ``end``.

    Args:
        start, end: times; tensors () where gradients by them are wanted.

    Attributes:
        live: the stages that the result depends on; the numbers below are those of these stages.
        first, last: scale of x at both ends.
        weights: h b_i by stage.
        rows: h a_ij by stage i and earlier stage j.
        times, scales, on_x, on_output: by stage: where it stands, scale of x there, coefficients of the drift.
        timed: whether :meth:`gradient` can be asked.
    """

    def __init__(self, solver: RungeKutta, form: Form, start: Scalar, end: Scalar) -> None:
        self.timed, self._ends = isinstance(start, Tensor), None
        if self.timed:
            times = [
                torch.as_tensor(t, dtype=torch.float64).as_subclass(Tensor).detach() for t in (start, end)
            ]
            self._ends = torch.stack(times).requires_grad_()
            with torch.enable_grad():  # a backward pass is a place without
                self._all = self._read(solver, form, *map(graphed, self._ends))
        else:
            self._all = self._read(solver, form, start, end)
        floats = {key: value(number) for key, number in self._all.items()}
        self.first, self.last = floats["first",], floats["last",]
        self.weights, self.times = ({i: floats[kind, i] for i in self.live} for kind in ("weight", "time"))
        self.scales = {i: floats["scale", i] for i in self.live}
        self.on_x, self.on_output = ({i: floats[k, i] for i in self.live} for k in ("on_x", "on_output"))
        self.rows = {i: {j: floats["row", i, j] for j in self.live if j < i} for i in self.live}

    def _read(self, solver: RungeKutta, form: Form, start: Any, end: Any) -> dict[Key, Scalar]:
        a, b = form.node(start), form.node(end)
        tableau, h = solver.tableau_at(a, b), b.s - a.s
        self.live = live_stages(tableau)
        found: dict[Key, Scalar] = {("first",): form.scale(a.t), ("last",): form.scale(b.t)}
        for i in self.live:
            node = _node(form, a, b, tableau.c[i])
            found["weight", i] = h * tableau.b[i]
            found |= {("row", i, j): h * tableau.a[i][j] for j in self.live if j < i}
            found |= {("time", i): node.t, ("scale", i): form.scale(node.t)}
            found["on_x", i], found["on_output", i] = form.coefficients(node.t)
        return found

    def gradient(self, found: Mapping[Key, Tensor]) -> Tensor:
        """The gradient by the two ends, float64 (2,), from those by the numbers."""
        if self._ends is None:
            raise InputError("the step was made from plain times")
        pairs = [
            (number, found[key])
            for key, number in self._all.items()
            if isinstance(number, Tensor) and number.requires_grad and key in found
        ]
        with torch.enable_grad():
            numbers = [number.as_subclass(Tensor) for number, _ in pairs]
            (total,) = torch.autograd.grad(numbers, self._ends, [g.cpu().double() for _, g in pairs])
        return total


def dot(left: Tensor, right: Tensor) -> Tensor:
    """The sum of products, float64 ()."""
    return (doubled(left) * doubled(right)).sum()


def _node(form: Form, a: Node, b: Node, c: Scalar) -> Node:
    # As the forward method finds it.
    return b if c == 1 else a if c == 0 else form.between(a.s + c * (b.s - a.s))  # type: ignore[arg-type]
