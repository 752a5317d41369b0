"""How much each of a solver's evaluations counts in the integral of a quantity that does not feed back.

The gradients of weights and conditioning are pure quadratures, dL/ds = q(s): they take no part in the state. A method
whose coefficients do not depend on values gives them as Σ_j w_j q(s_j) over its own evaluations, multistep methods
included. The weights w_j are had from the method itself: one run on dL/ds = e_j, a unit vector for the j-th evaluation.
So each evaluation's contribution can be added to one buffer at once, with its final weight.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..forms import Form, Node
from ..solvers import Solver


class Evaluations(NamedTuple):
    """The evaluations of a run in their order: the times, and the weights w_j in the form's clock."""

    times: list[float]
    weights: list[float]


def evaluation_weights(solver: Solver, form: Form, nodes: Sequence[Node]) -> Evaluations:
    """Times and weights of a solver's evaluations along ``nodes``.

    Args:
        solver: with coefficients that depend on the nodes only.
        form: whose clock is stepped in.
        nodes: at least two, in the direction of the run.
    """
    count = sum(solver.evaluations(index) for index in range(len(nodes) - 1))
    impulses = _Impulses(form, count)
    stepper, total = solver.begin(), torch.zeros(1, count, dtype=torch.float64)
    for a, b in itertools.pairwise(nodes):
        total = stepper.step(impulses, total, a, b)
    made = len(impulses.times)
    return Evaluations(impulses.times, total[0, :made].tolist())


class _Impulses(Form):
    """A form whose drift is e_j at its j-th evaluation, and whose state is the integral itself."""

    def __init__(self, form: Form, count: int) -> None:
        super().__init__(form.name, form.schedule, form.prediction)
        self.count, self.times = count, list[float]()

    def scale(self, t: float) -> float:
        return 1.0

    def drift(self, x: Tensor, t: float) -> Tensor:
        found = torch.zeros_like(x)
        found[0, len(self.times)] = 1.0
        self.times.append(t)
        return found
