"""What a way back needs of a stochastic run: its noise, and the exact gradient of one of its steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import MissingGradientError
from ..forms import Form
from ..integrate import Plan
from ..noises import GivenNoise
from ..solvers import StochasticSolver
from .accumulate import Sums
from .calls import Calls


class StochasticOwnStep:
    """One step ``mean + std * noise`` to go back over. The noise is added, so the gradient is the mean's.

    The step is one that needs no history: a one-step solver's, a run's first, or one aside.

    Args:
        plan: the run's.
        interval: the step's number in it.
        calls: makes the evaluations.
    """

    def __init__(self, plan: Plan, interval: int, calls: Calls) -> None:
        taken = plan.intervals[interval]
        solver = plan.solver.aside if taken.aside else plan.solver
        assert isinstance(solver, StochasticSolver)
        self.stepper, self.plan, self.name = solver.begin(), plan, taken.form
        form = plan.forms()[taken.form]
        self.a, self.b = form.node(taken.start), form.node(taken.end)
        self.interval, self.calls = interval, calls

    def back(self, x: Tensor, adjoint: Tensor, sums: Sums | None) -> Tensor:
        """dL/dx at the step's start from dL/dx at its end.

        Args:
            x: the state at the start.
            adjoint: at the end, of x's shape.
            sums: of the shared tensors' gradients.
        """
        evaluation = self.calls.again(x, self.a.t, self.interval)
        with torch.enable_grad():
            # The mean is affine in the state and in the network's output: its derivatives by both are read off.
            leaf, out = x.detach().requires_grad_(), evaluation.out.detach().requires_grad_()
            form = Form(self.name, self.plan.schedule, self.plan.prediction, lambda x, t: out)
            mean, _ = self.stepper.moments(form, leaf, self.a, self.b)
        on_x, on_out = torch.autograd.grad(mean, [leaf, out], adjoint, allow_unused=True)
        pulled = evaluation.pull(on_out, sums)
        return pulled if on_x is None else pulled + on_x


class StepNoise:
    """The noises of a run's steps, in y = x/alpha: eta sqrt(rho_a² - rho_b²) times a standard normal.

    Args:
        plan: the run's.
        x: a state of its shape.
    """

    def __init__(self, plan: Plan, x: Tensor) -> None:
        self.level, self.plan = noise_level(plan), plan
        self._draw = plan.noise.path(plan.schedule, plan.times, x) if plan.noise is not None else None

    def taken(self, y: Tensor, index: int, part: float = 1.0) -> Tensor:
        """``y`` less ``part`` of the noise of the step from node ``index`` to the next; as it is on the ODE."""
        if self._draw is None:
            return y
        start, end = self.plan.times[index], self.plan.times[index + 1]
        a, b = (float(self.plan.schedule.rho(t)) for t in (start, end))
        std = self.level * math.sqrt((a - b) * (a + b))
        return y.sub(self._draw(y, std, start, end), alpha=part * std)


def noise_level(plan: Plan) -> float:
    """eta of the run's SDE; 0 on the ODE."""
    return plan.solver.eta if isinstance(plan.solver, StochasticSolver) else 0.0


def check_noise(plan: Plan, method: str) -> None:
    """Raise if the run's noises want gradients, which the adjoint equation does not give.

    Raises:
        MissingGradientError: they do.
    """
    noises = plan.noise.noises if isinstance(plan.noise, GivenNoise) else ()
    for i, noise in enumerate(noises):
        if noise.requires_grad:
            raise MissingGradientError(
                f"noise {i} requires grad and would get none from {method}: detach the noises, or use gradient=Exact()"
            )
