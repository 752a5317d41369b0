"""One captured step of a diffusers pipeline, held open for guidance: a pipeline's :class:`~backdrift.host.Host`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser
from ..errors import InputError, UnsupportedError
from ..host import Continuation, Evaluation, Host
from .levels import Levels
from .recorded import Recorded, is_control
from .replayed import StepNetwork

__all__ = ["CapturedHost", "Given"]


@dataclass(frozen=True)
class Given:
    """What a step of a pipeline was made of.

    Attributes:
        pipe: the pipeline.
        calls: its network calls.
        levels: of the whole run.
        position: the step's place in them.
        sample: the scheduler's state before the step.
        output: what the scheduler was given as the network's output.
        time: what it was given as the time.
        step: the scheduler's own step as ``step(sample, output)``, from what it remembered before.
        renew: lets the next steps draw other noise.
        frozen: gives a frozen copy of a component.
        decode: pictures of clean latents.
        asleep: a block inside of which nothing is taken down.
    """

    pipe: Any
    calls: Sequence[Recorded]
    levels: Levels
    position: int
    sample: Tensor
    output: Tensor
    step: Callable[[Tensor, Tensor], Tensor]
    renew: Callable[[], None]
    frozen: Callable[[Recorded], nn.Module]
    decode: Callable[[Tensor], Tensor]
    asleep: Callable[[], AbstractContextManager[Any]]


class CapturedHost(Host):
    """A step of a pipeline's own loop.

    The state and the evaluations are float32 (or float64) whatever the networks' dtype; the scheduler gets its own
    dtypes back, so a step that nothing has changed is the pipeline's own to the last bit. A scheduler that draws noise
    draws the same noise whenever the step is taken again, until :meth:`renew`.

    A scheduler that clips or thresholds x0 does so in its own step; the continuation does not. What its settings say
    of the prediction, the levels, and the rule by which the network's two halves are combined, is taken from the step
    itself and checked there.
    """

    ranged = True

    def __init__(self, given: Given, index: int, total: int, prompts: list[str] | None = None) -> None:
        self._given = given
        self.index, self.total, self.prompts = index, total, prompts
        self.x = _raised(given.sample.detach())
        self.start, self.end = given.levels.starts[given.position], given.levels.ends[given.position]
        first = given.position - index
        self.levels = tuple(zip(given.levels.starts, given.levels.ends, strict=True))[first : first + total]
        self._each = sum(not is_control(call) for call in given.calls)
        self.calls = self._each

    def evaluate(self, x: Tensor) -> Evaluation:
        """What the network says at ``x``.

        Args:
            x: (B, …), of the step's own shape. Where it equals ``self.x`` nothing is called.

        Raises:
            InputError: another shape.
            UnsupportedError: the pipeline's step is not one that is known (:mod:`.recorded`, :mod:`.combination`).
        """
        self._check_shape(x)
        given, network = self._given, self._network
        x = _raised(x.detach())
        z = self._scale * x
        with torch.no_grad(), given.asleep():
            if torch.equal(x, self.x):
                parts, output = network.found, given.output.detach()
            else:
                self.calls += self._each
                parts = network.parts(z.to(network.dtype))
                output = network.combination(parts).to(given.output.dtype)
            more = network.combination.more(parts)
        return Evaluation(
            z,
            _raised(output),
            given.levels.prediction,
            given.levels.seen(given.position),
            given.levels.times[given.position],
            None if more is None else _raised(more),
            network.combination.scale,
        )

    def step(self, x: Tensor, evaluation: Evaluation) -> Tensor:
        """The scheduler's own step from ``x``, in float32 or more.

        Raises:
            InputError: another shape than the step's own.
        """
        self._check_shape(x)
        given = self._given
        with torch.no_grad(), given.asleep():
            return _raised(given.step(x.to(given.sample), evaluation.output.to(given.output)))

    def renew(self) -> None:
        """From here on, noise that the scheduler adds is drawn anew."""
        self._given.renew()

    def continuation(self, evaluation: Evaluation) -> Continuation:
        """The probability-flow ODE of the step's own networks, from the evaluation's state to the end of the run.

        The networks are frozen copies with what they were given in this step (a control network's scale, too); their
        time is the noise level's own, unrounded.
        """
        given = self._given
        levels, position = given.levels, given.position
        model = Denoiser(
            self._network,
            levels.schedule,
            levels.prediction,
            time_scale=self._time_scale,
            dtype=self._network.dtype,
        )
        return Continuation(model, None, self._scale, levels.times_from(position))

    def decode(self, x0: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1], not clamped, of clean latents; differentiable.

        Raises:
            UnsupportedError: how this pipeline decodes is not known; pass ``decode=``.
        """
        with self._given.asleep():
            return self._given.decode(x0)

    @property
    def recorded(self) -> Sequence[Recorded]:
        """The network calls that the pipeline made in the step, those of control networks among them."""
        return self._given.calls

    @property
    def _scale(self) -> float:
        return self._given.levels.scales[self._given.position]

    @cached_property
    def _network(self) -> StepNetwork:
        given = self._given
        with torch.no_grad(), given.asleep():
            return StepNetwork(
                given.pipe, given.calls, self._scale * self.x, given.output.detach(), given.frozen
            )

    @cached_property
    def _time_scale(self) -> float:
        """What the schedule's time is multiplied with for the network: 1, or the number of trained steps for flows.

        Raises:
            UnsupportedError: the network's time in the step is neither (but for rounding).
        """
        given = self._given
        call = next(c for c in given.calls if not is_control(c))
        told, t = (
            float(call.time if not isinstance(call.time, Tensor) else call.time.reshape(-1)[0]),
            _t(given),
        )
        trained = float(given.pipe.scheduler.config.get("num_train_timesteps", 1000))
        for scale in (1.0, trained, 1000.0):
            # Whole timesteps are rounded, and half precision has 3 digits.
            slack = (1.0 if scale * given.levels.schedule.t_max > 2 else 0.0) + 4e-3 * abs(scale * t)
            if abs(told - scale * t) <= slack + 1e-6:
                return scale
        raise UnsupportedError(
            f"{call.name} was given the time {told:g} at noise level t = {t:g}, which is neither t nor {trained:g} t: "
            "such steps cannot be continued"
        )

    def _check_shape(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or x.shape != self.x.shape:
            shown = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise InputError(f"the state of this step has shape {tuple(self.x.shape)}; got {shown}")


def _t(given: Given) -> float:
    return given.levels.times[given.position]


def _raised(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
