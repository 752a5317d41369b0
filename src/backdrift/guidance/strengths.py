"""How far a gradient pulls: the number eta, one for each sample, in x' <- x' - eta * dL/dx.

States are compared in *unit coordinates* u = x / sqrt(alpha² + sigma²), in which every schedule has states of about
unit variance (for variance-preserving ones u = x). Guidance is then the same whichever coordinates a scheduler keeps:
the same network under DDIM, under Euler's method on x0 + sigma eps, or written as a flow makes the same guided picture.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import InputError
from ..host import Evaluation

Reference = Literal["guidance", "epsilon", "velocity"]
Value = float | Sequence[float]


def rms(x: Tensor) -> Tensor:
    """Root mean square of each sample, (B, 1, …); also where its squares leave the range of x's dtype."""
    flat, tiny = x.flatten(1), torch.finfo(x.dtype).tiny
    found, largest = flat.square().mean(1).sqrt(), flat.abs().amax(1)
    scaled = largest * (flat / largest.clamp_min(tiny)[:, None]).square().mean(1).sqrt()
    lost = (found < 1e3 * tiny**0.5) | found.isinf()
    return torch.where(lost, scaled, found).view(-1, *[1] * (x.ndim - 1))


class Strength(ABC):
    """A rule for eta."""

    def check(self, batch: int) -> None:  # noqa: B027 - most rules serve any batch
        """Raise unless the rule is for that many samples.

        Raises:
            InputError: it has numbers for another batch.
        """

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
        value: eta > 0, its size depends on the loss's; or one for each sample, where 0 leaves a sample alone.
    """

    value: Value

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", _checked(self.value))

    def check(self, batch: int) -> None:
        _fits(self.value, batch)

    def __call__(self, evaluation: Evaluation, pull: Tensor) -> Tensor:
        return torch.zeros_like(rms(pull)) + _column(self.value, pull)


@dataclass(frozen=True)
class Relative(Strength):
    """eta = w * R / RMS(dL/du): the pull moves a state by w * R in the root mean square, whatever the loss's scale.

    A sample whose gradient is 0 is not moved.

    Args:
        value: w > 0, FreeDoM's and SAG's 0.2; or one for each sample, where 0 leaves a sample alone.
        to: R is, for each sample,
            ``"guidance"``: s * RMS(eps_c - eps_0), s the guidance scale (FreeDoM, SAG as published); without
            classifier-free guidance (guidance-distilled and many flow models) RMS(eps) takes its place;
            ``"epsilon"``: RMS(eps) of the guided prediction;
            ``"velocity"``: RMS(eps - x0).
    """

    value: Value = 0.2
    to: Reference = "guidance"

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", _checked(self.value))
        if self.to not in get_args(Reference):
            raise InputError(
                f"a strength is relative to {', '.join(map(repr, get_args(Reference)))}; got {self.to!r}"
            )

    def check(self, batch: int) -> None:
        _fits(self.value, batch)

    def __call__(self, evaluation: Evaluation, pull: Tensor) -> Tensor:
        unit, size = self.reference(evaluation), rms(pull)
        least = 1e3 * torch.finfo(pull.dtype).tiny  # below it the quotient would be infinite
        eta = _column(self.value, pull) * unit / size.clamp_min(least)
        return torch.where(size < least, torch.zeros_like(eta), eta)

    def reference(self, evaluation: Evaluation) -> Tensor:
        """R, (B, 1, …)."""
        if self.to == "velocity":
            return rms(evaluation.read("flow_prediction"))
        if self.to == "guidance" and (more := evaluation.difference("epsilon")) is not None:
            return evaluation.guidance_scale * rms(more)
        return rms(evaluation.eps)


def strength_of(value: Value | Strength) -> Strength:
    """A number, or one for each sample, is :class:`Relative` to the guidance, as published.

    Raises:
        InputError: it is neither positive numbers nor a strength.
    """
    return value if isinstance(value, Strength) else Relative(value)


def _checked(value: object) -> float | tuple[float, ...]:
    """A positive number, or numbers >= 0, one for each sample and not all 0.

    Raises:
        InputError: it is neither.
    """
    if _is_number(value) and value > 0:  # type: ignore[operator]
        return value  # type: ignore[return-value]
    if isinstance(value, Tensor) and value.ndim == 1:
        value = value.tolist()
    if isinstance(value, list | tuple) and all(_is_number(v) and v >= 0 for v in value) and any(value):
        return tuple(float(v) for v in value)
    raise InputError(
        f"a strength is a positive number, or one number >= 0 for each sample, Constant(...) or Relative(...); got "
        f"{value!r} (to maximise a loss use maximize=True, to switch guidance off leave it out)"
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _fits(value: Value, batch: int) -> None:
    if isinstance(value, tuple) and len(value) != batch:
        raise InputError(f"got {len(value)} strengths for {batch} samples: give one, or one for each")


def _column(value: Value, like: Tensor) -> float | Tensor:
    """A number as it is; numbers for each sample as (B, 1, …)."""
    if not isinstance(value, tuple):
        return value  # type: ignore[return-value]
    _fits(value, len(like))
    return torch.tensor(value, dtype=like.dtype, device=like.device).view(-1, *[1] * (like.ndim - 1))
