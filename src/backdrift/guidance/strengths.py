"""How far a gradient pulls: the number eta, one for each sample, in x' <- x' - eta * dL/dx.

States are compared in *unit coordinates* u = x / sqrt(alpha² + sigma²), in which every schedule has states of about
unit variance (for variance-preserving ones u = x). Guidance is then the same whichever coordinates a scheduler keeps:
the same network under DDIM, under Euler's method on x0 + sigma eps, or written as a flow makes the same guided picture.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import InputError
from ..host import Evaluation

Reference = Literal["guidance", "epsilon", "velocity"]


def rms(x: Tensor) -> Tensor:
    """Root mean square of each sample, (B, 1, …)."""
    return x.flatten(1).square().mean(1).sqrt().view(-1, *[1] * (x.ndim - 1))


class Strength(ABC):
    """A rule for eta."""

    @abstractmethod
    def __call__(self, evaluation: Evaluation, pull: Tensor) -> Tensor:
        """eta, (B, 1, …).

        Args:
            evaluation: of the network at the step's state.
            pull: dL/du, (B, …), in unit coordinates.
        """


@dataclass(frozen=True)
class Constant(Strength):
    """The same eta everywhere.

    Args:
        value: eta > 0; its size depends on the loss's.
    """

    value: float

    def __post_init__(self) -> None:
        _check(self.value)

    def __call__(self, evaluation: Evaluation, pull: Tensor) -> Tensor:
        return torch.full_like(rms(pull), self.value)


@dataclass(frozen=True)
class Relative(Strength):
    """eta = w * R / RMS(dL/du): the pull moves a state by w * R in the root mean square, whatever the loss's scale.

    Args:
        value: w > 0; FreeDoM's and SAG's 0.2.
        to: R is, for each sample,
            ``"guidance"``: s * RMS(eps_c - eps_0), s the guidance scale (FreeDoM, SAG as published); without
            classifier-free guidance (guidance-distilled and many flow models) RMS(eps) takes its place;
            ``"epsilon"``: RMS(eps) of the guided prediction;
            ``"velocity"``: RMS(eps - x0).
    """

    value: float = 0.2
    to: Reference = "guidance"

    def __post_init__(self) -> None:
        _check(self.value)
        if self.to not in get_args(Reference):
            raise InputError(
                f"a strength is relative to {', '.join(map(repr, get_args(Reference)))}; got {self.to!r}"
            )

    def __call__(self, evaluation: Evaluation, pull: Tensor) -> Tensor:
        unit = self.reference(evaluation)
        return self.value * unit / rms(pull).clamp_min(torch.finfo(pull.dtype).tiny)

    def reference(self, evaluation: Evaluation) -> Tensor:
        """R, (B, 1, …)."""
        if self.to == "velocity":
            return rms(evaluation.read("flow_prediction"))
        if self.to == "guidance" and (more := evaluation.difference("epsilon")) is not None:
            return evaluation.guidance_scale * rms(more)
        return rms(evaluation.eps)


def strength_of(value: float | Strength) -> Strength:
    """A number is :class:`Relative` to the guidance, as published.

    Raises:
        InputError: it is neither a positive number nor a strength.
    """
    if isinstance(value, Strength):
        return value
    _check(value)
    return Relative(float(value))


def _check(value: object) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not (value > 0 and math.isfinite(value))
    ):
        raise InputError(
            f"a strength is a positive number, Constant(...) or Relative(...); got {value!r} (to maximise a loss use "
            "maximize=True, to switch guidance off leave it out)"
        )
