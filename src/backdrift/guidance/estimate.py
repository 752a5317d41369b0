"""The n-step estimate of the clean sample, and the pull of a loss on it back to the state it started from.

From a state at time t the probability-flow ODE is solved in n steps to sigma = 0 (SAG, Eq. 6; n = 1 is the one-step
estimate x0 = (x - sigma eps)/alpha). The loss's gradient there is brought back through these steps by any gradient
method; :class:`~backdrift.SymplecticAdjoint` with Euler's method is SAG's Eqs. 7 and 8, and exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..conditioning import Branch
from ..denoiser import Denoiser
from ..errors import InputError, UnsupportedError
from ..gradients import GradientMethod, SymplecticAdjoint
from ..grids import TimeGrid
from ..host import Evaluation, Host
from ..sampling import Solution, sample
from ..scalars import Scalar
from ..solvers import AdaptiveDormandPrince, Euler, ReversibleSolver, Solver, StochasticSolver
from .scoring import Score, scaled
from .subgrids import Subgrid, check_subgrid, subgrid


class Estimate(NamedTuple):
    """An estimate of the clean sample, and what the loss says there.

    Attributes:
        x0: (B, …).
        values: (B,), the loss at it.
        pull: the gradient by the state that the estimate started from, in unit coordinates
            (:mod:`~backdrift.guidance.strengths`).
        n: steps taken.
    """

    x0: Tensor
    values: Tensor
    pull: Tensor
    n: int


@dataclass
class Calls:
    """Network calls of the estimates of one attempt.

    Attributes:
        forward: made (not those that the sampler had made already).
        redone: made again on the way back.
        vjps: vector–Jacobian products.
    """

    forward: int = 0
    redone: int = 0
    vjps: int = 0


@dataclass(frozen=True)
class Estimator:
    """How clean samples are estimated.

    Args:
        subgrid: where the steps lie (:mod:`~backdrift.guidance.subgrids`).
        solver: any explicit deterministic one.
        gradient: any gradient method that takes the solver.

    Raises:
        InputError: the solver is of another kind.
    """

    subgrid: Subgrid = "paper"
    solver: Solver = field(default_factory=Euler)
    gradient: GradientMethod = field(default_factory=SymplecticAdjoint)

    def __post_init__(self) -> None:
        check_subgrid(self.subgrid)
        if not isinstance(self.solver, Solver) or isinstance(
            self.solver, StochasticSolver | ReversibleSolver | AdaptiveDormandPrince
        ):
            raise InputError(
                f"an estimate is made with an explicit solver of the ODE on a fixed grid, such as Euler(), Heun() or "
                f"AdamsBashforth(2); got {self.solver!r}"
            )
        if not isinstance(self.gradient, GradientMethod):
            raise InputError(
                f"gradient must be a gradient method such as SymplecticAdjoint(); got {self.gradient!r}"
            )
        if isinstance(self.gradient, SymplecticAdjoint):
            self.gradient.check_solver(self.solver)

    def pulled(
        self, host: Host, evaluation: Evaluation, n: int, score: Callable[[Tensor], Score], calls: Calls
    ) -> Estimate:
        """The estimate in n steps from the evaluation's state, and the loss's pull on that state.

        The loss is scored by itself, between the run and the way back, so that the decoder's and the loss's graphs
        are gone when the first network call is differentiated.
        """
        z = _widened(evaluation.z).requires_grad_()
        solution, scale = self._solve(host, evaluation, z, n, calls)
        found = score(solution.x0.detach())
        large, factors = scaled(found.pull.to(solution.x0.dtype))  # half precision has no small numbers
        with torch.enable_grad():
            (pull,) = torch.autograd.grad(solution.x0, z, large)
        pull = pull / factors.view(-1, *[1] * (pull.ndim - 1))
        calls.redone += solution.stats.calls_redone
        calls.vjps += solution.stats.vjps
        unit = math.hypot(*host.start)
        steps = len(solution.times) - 1
        return Estimate(solution.x0.detach(), found.values, pull * (scale * unit), steps)

    def clean(self, host: Host, evaluation: Evaluation, n: int, calls: Calls) -> Tensor:
        """The estimate alone."""
        with torch.no_grad():
            return self._solve(host, evaluation, _widened(evaluation.z), n, calls)[0].x0

    def _solve(
        self, host: Host, evaluation: Evaluation, z: Tensor, n: int, calls: Calls
    ) -> tuple[Solution, float]:
        model, cond, scale, times = host.continuation(evaluation)
        # Methods that go call by call need the first call's graph, so it is made again for them.
        whole = not z.requires_grad or not self.gradient.by_calls
        told = Told.of(model, evaluation) if whole else model
        nodes = subgrid(self.subgrid, n, times, model.schedule)
        with torch.set_grad_enabled(z.requires_grad):
            solution = sample(told, z, cond, solver=self.solver, grid=TimeGrid(nodes), gradient=self.gradient)
        calls.forward += solution.stats.calls_forward - (told.answered if isinstance(told, Told) else 0)
        return solution, scale


class Told(Denoiser):
    """A denoiser whose first evaluation is known: it is answered without the network.

    Attributes:
        answered: calls answered so.
    """

    _known: Evaluation | None
    answered: int

    @classmethod
    def of(cls, model: Denoiser, evaluation: Evaluation) -> Told:
        """``model``, which has said ``evaluation``."""
        told: Told = object.__new__(cls)
        told.__dict__ |= model.__dict__
        told._known, told.answered, told.nfe = evaluation, 0, 0
        return told

    def run(self, x: Tensor, t: Scalar, branch: Branch) -> Tensor:
        known = self._known
        if known is None or float(t) != known.t:
            self._known = None
            return super().run(x, t, branch)
        self.answered += 1
        if branch.paired or self.guidance_scale == 1 or self.answered == 2:
            self._known = None
        # Of two calls, one for each half of guidance, both are told the guided output: their difference is 0.
        return _Said.apply(x, known.output.to(x.dtype))


class _Said(torch.autograd.Function):
    """An output that depends on x in a way that nobody differentiates."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor) -> Tensor:
        return out.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise UnsupportedError("an evaluation that the sampler had made has no graph")


def _widened(z: Tensor) -> Tensor:
    z = z.detach()
    return z.clone() if z.dtype in (torch.float32, torch.float64) else z.float()
