"""Plain autograd: every call's activations are kept."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..denoiser import Denoiser
from ..stats import RunStats
from .base import Evaluator, GradientMethod


class Plain(GradientMethod):
    """Ordinary backpropagation through the run. Memory grows with every call; second derivatives work, and
    nothing is checked beyond what PyTorch checks. The yardstick for every other method."""

    takes_pairs = by_times = transforms = True

    def __repr__(self) -> str:
        return "Plain()"

    def begin(self, model: Denoiser, x: Tensor, cond: Any, evaluations: int, stats: RunStats) -> Evaluator:
        return _Run(model, x, cond, stats)


class _Run(Evaluator):
    def __init__(self, model: Denoiser, x: Tensor, cond: Any, stats: RunStats) -> None:
        self.model, self.stats = model, stats
        self.conditions = model.conditions(cond, len(x))

    def __call__(self, x: Tensor, t: float) -> Tensor:
        t = self.model.check_time(t)
        outputs = []
        for branch in self.conditions.at(self.interval):
            self.model.nfe += 1
            self.stats.calls_forward += 1
            # A node of its own gathers the gradients of all uses of x inside the network before they meet
            # those of the uses outside: the order of additions in which a redone call has to sum them.
            outputs.append(self.model.run(x.view_as(x), t, branch))
        return self.model.combine(outputs)
