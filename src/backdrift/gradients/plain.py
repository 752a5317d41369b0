"""Plain autograd: every call's activations are kept."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..denoiser import Denoiser
from ..forms import Call
from ..stats import RunStats
from .base import GradientMethod


class Plain(GradientMethod):
    """Ordinary backpropagation through the run. Memory grows with every call; second derivatives work, and
    nothing is checked beyond what PyTorch checks. The yardstick for every other method."""

    takes_pairs = True

    def __repr__(self) -> str:
        return "Plain()"

    def begin(self, model: Denoiser, x: Tensor, cond: Any, evaluations: int, stats: RunStats) -> Call:
        branches = model.branches(cond, len(x))

        def call(x: Tensor, t: float) -> Tensor:
            t = model.check_time(t)
            outputs = []
            for branch in branches:
                model.nfe += 1
                stats.calls_forward += 1
                # A node of its own gathers the gradients of all uses of x inside the network before they meet
                # those of the uses outside: the order of additions in which a redone call has to sum them.
                outputs.append(model.run(x.view_as(x), t, branch.cond, branch.paired))
            return model.combine(outputs)

        return call
