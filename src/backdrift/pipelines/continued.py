"""A Denoiser that knows its first answer: how the estimate of a guided step shares the sampler's own network call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import nests
from ..ambient import Ambient
from ..conditioning import Branch
from ..denoiser import Denoiser
from ..scalars import Scalar, value
from ..schedules import Schedule
from .replayed import StepNetwork

__all__ = ["ContinuedDenoiser"]


class ContinuedDenoiser(Denoiser):
    """The networks of a captured step, for :func:`backdrift.sample`.

    At the state ``z`` and the time ``t`` of the step itself its answer is ``output``, without a network call; a
    gradient through that answer makes the call when it is asked for. Everywhere else the networks are called with what
    they were given in the step, and the time unrounded.

    Args:
        network: of the step.
        schedule, prediction: the coordinates of its input, and what it returns.
        time_scale: the network is given ``time_scale * t``.
        z, output: (B, …), without a graph; None for both where nothing is known.
        t: the schedule's time of ``z``.

    Attributes:
        nfe: network calls of forward passes; the known answer is none.
    """

    def __init__(
        self,
        network: StepNetwork,
        schedule: Schedule,
        prediction: str,
        *,
        time_scale: float,
        z: Tensor | None = None,
        output: Tensor | None = None,
        t: float = 0.0,
    ) -> None:
        self._count, self._counted = 0, False
        super().__init__(
            network, schedule, prediction, time_scale=time_scale, dtype=_arithmetic(network.dtype)
        )
        self._z, self._known, self._t = z, output, t

    # Whoever makes a call counts it first, except where it is redone.
    @property
    def nfe(self) -> int:  # type: ignore[override]
        return self._count

    @nfe.setter
    def nfe(self, count: int) -> None:
        self._counted = count > self._count
        self._count = count

    def run(self, x: Tensor, t: Scalar, branch: Branch) -> Tensor:
        counted, self._counted = self._counted, False
        if not self._knows(x, t, branch):
            return super().run(x, t, branch)
        assert self._known is not None
        self._count -= counted
        output = self._known.to(x.dtype)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return output.clone()
        return _Known.apply(x, self, value(t), branch, output)  # type: ignore[no-any-return]

    def again(self, x: Tensor, t: float, branch: Branch) -> Tensor:
        """The network's answer at ``x`` and ``t``, known or not."""
        return super().run(x, t, branch)

    def _knows(self, x: Tensor, t: Scalar, branch: Branch) -> bool:
        if self._known is None or self._z is None or value(t) != self._t or x.shape != self._z.shape:
            return False
        # A gradient by the time or the conditioning has to come from a call of its own.
        wanted = [c for c in nests.tensors(branch.cond) if c.requires_grad]
        if (
            wanted
            or (isinstance(t, Tensor) and t.requires_grad)
            or torch._C._are_functorch_transforms_active()
        ):
            return False
        return torch.equal(x.detach(), self._z.to(x))


class _Known(torch.autograd.Function):
    """A known answer, whose network call is made when a gradient is asked for."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, model: ContinuedDenoiser, t: float, branch: Branch, output: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.model, ctx.t, ctx.branch, ctx.ambient = model, t, branch, Ambient([x])
        return output.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        leaf = x.detach().requires_grad_()
        with ctx.ambient.restored(), torch.enable_grad():
            out = ctx.model.again(leaf, ctx.t, ctx.branch)
        (found,) = torch.autograd.grad(out, leaf, cotangent)
        return found, None, None, None, None


def _arithmetic(dtype: torch.dtype) -> torch.dtype | None:
    return dtype if dtype.is_floating_point else None
