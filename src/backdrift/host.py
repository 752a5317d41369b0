"""One step of a sampler, held open: what a rule of guidance may ask of the sampler that it guides.

A sampler (a *host*) is about to step from a state ``x`` at one noise level to the next. A rule looks at what the
network says there, changes it or the state that follows, and may take the same step again from another state. Whose
sampler it is, a diffusers pipeline's or :func:`backdrift.sample`'s, a rule does not know.

Two systems of coordinates appear. The state ``x = alpha x0 + sigma eps`` has the host's own scales (for diffusers'
Euler schedulers alpha = 1). The network sees ``z = scale * x``, in the coordinates of the :class:`~backdrift.Denoiser`
that reads it; ``x0`` and ``eps`` are the same in both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from .denoiser import Denoiser
from .predictions import conversion


class Level(NamedTuple):
    """The scales of a noise level: ``x = alpha x0 + sigma eps``."""

    alpha: float
    sigma: float


@dataclass(frozen=True)
class Evaluation:
    """What the network says at one state; without a graph.

    Attributes:
        z: the state as the network sees it, (B, …).
        output: the guided output in the network's own prediction, of z's shape.
        prediction: what that is (:mod:`backdrift.predictions`).
        level: the scales in z's coordinates.
        t: the time in the denoiser's schedule, for messages.
        more: the conditional output minus the unconditional one, in the network's own prediction; None without
            classifier-free guidance.
        guidance_scale: by which ``more`` entered ``output``.
    """

    z: Tensor
    output: Tensor
    prediction: str
    level: Level
    t: float
    more: Tensor | None = None
    guidance_scale: float = 1.0

    def read(self, target: str) -> Tensor:
        """The guided prediction of ``"epsilon"``, ``"sample"`` (x0), ``"v_prediction"`` or ``"flow_prediction"``.

        Raises:
            InputError: the output does not determine it at this level.
        """
        on_z, on_output = conversion(self.prediction, target, *self.level, self.t)
        return on_z * self.z + on_output * self.output

    @property
    def eps(self) -> Tensor:
        """The guided noise prediction."""
        return self.read("epsilon")

    @property
    def x0(self) -> Tensor:
        """The guided one-step estimate of the clean sample."""
        return self.read("sample")

    def difference(self, target: str) -> Tensor | None:
        """What guidance is made of, conditional minus unconditional, as ``target``; None without guidance."""
        if self.more is None:
            return None
        return conversion(self.prediction, target, *self.level, self.t)[1] * self.more

    def with_x0(self, x0: Tensor) -> Evaluation:
        """The evaluation that says ``x0`` at the same state.

        Raises:
            InputError: no output says so at this level (an epsilon or v where sigma = 0).
        """
        on_z, on_x0 = conversion("sample", self.prediction, *self.level, self.t)
        return replace(self, output=on_z * self.z + on_x0 * x0)

    def with_eps(self, eps: Tensor) -> Evaluation:
        """The evaluation that says ``eps`` at the same state.

        Raises:
            InputError: no output says so at this level (alpha = 0).
        """
        on_z, on_eps = conversion("epsilon", self.prediction, *self.level, self.t)
        return replace(self, output=on_z * self.z + on_eps * eps)


class Continuation(NamedTuple):
    """How :func:`backdrift.sample` goes on from a host's state: ``sample(model, scale * x, cond, grid=…)``.

    Attributes:
        model: reads the host's network (an estimate answers its first evaluation by what the host knows).
        cond: the conditioning.
        scale: ``z = scale * x``.
        times: the schedule's times of the host's nodes, this one first, falling, as far as the host goes; the last may
            be the clean end.
    """

    model: Denoiser
    cond: Any
    scale: float
    times: tuple[float, ...]


class Host(ABC):
    """One step of a sampler, from ``x`` at ``start`` to ``end``.

    Attributes:
        index: the step's number, from 0.
        total: steps of the whole run.
        x: the state at the beginning, (B, …), without a graph.
        start, end: the noise levels, in x's own coordinates.
        prompts: one per sample, where they are known.
        calls: network calls made for this step so far, by the sampler itself or by the methods below.
        levels: start and end of every step of the run, where they are known, in x's own coordinates.
        ranged: :meth:`decode` gives pictures on the scale of [0, 1] for sure, whatever they show.
    """

    index: int
    total: int
    x: Tensor
    start: Level
    end: Level
    prompts: list[str] | None = None
    calls: int = 0
    levels: Sequence[tuple[Level, Level]] | None = None
    ranged: bool = False

    @abstractmethod
    def evaluate(self, x: Tensor) -> Evaluation:
        """What the network says at a state of the step's beginning; known already for ``self.x``."""

    @abstractmethod
    def step(self, x: Tensor, evaluation: Evaluation) -> Tensor:
        """The state after the step, from the state ``x``, if the network had said ``evaluation`` there.

        May be called any number of times: what a multistep sampler remembers is as it was before the step, then as
        after the last call.
        """

    def renew(self) -> None:  # noqa: B027 - most hosts have nothing to renew
        """From here on, noise that the sampler's own step adds is drawn anew.

        Each :meth:`step` until the next renewal adds the same. Nothing happens where the noise is a path that does not
        depend on the steps.
        """

    @abstractmethod
    def continuation(self, evaluation: Evaluation) -> Continuation:
        """How to solve the probability-flow ODE from the evaluation's state to the end."""

    @abstractmethod
    def decode(self, x0: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1], not clamped, of clean samples; differentiable."""
