"""Guidance as a pipeline's ``callback_on_step_end``: the user's own call, guided between its steps.

The pipeline calls back after a step; what led to it, the networks' calls and the scheduler's memory before it, was
heard by a :class:`~backdrift.pipelines.capture.Capture` that the first call back puts on and the last one takes away.
So the first step of a run is over before guidance can hear; :func:`listening` puts the capture on before the call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, UnsupportedError
from ..pipelines.capture import Capture
from ..pipelines.refusals import plain_class
from .base import Guidance

STATE = "latents"


class Listener:
    """One guidance's ear on one pipeline.

    Args:
        guidance: whose steps they are.
        pipe: the pipeline that calls back.
        done: steps that are over already.
    """

    def __init__(self, guidance: Guidance, pipe: Any, done: int) -> None:
        self.guidance, self.pipe = guidance, pipe
        self.begun, self._unheard = False, done
        self._told: Any = None
        before = Capture.on(pipe)
        if before is not None and isinstance(before.owner, Listener):
            before.owner.give_way(at_once=done == 0)
        self.capture = Capture(pipe, decode=guidance.scoring.decode, done=done)
        self.capture.owner = self

    def give_way(self, *, at_once: bool) -> None:
        """Stop, if the run was broken off and another guidance's has begun.

        Args:
            at_once: no run of the pipeline is under way.

        Raises:
            InputError: it was not: two guidances listen to one run.
        """
        # A run that goes on has called back after the last step that was heard.
        if not self.begun or not (at_once or self.capture.last is not self._told):
            raise InputError(
                f"another guidance listens to this {type(self.pipe).__name__}: one call is guided by one guidance, of "
                "one loss or several, [(weight, loss), …]"
            )
        self.stop()

    def begin(self, latents: Tensor) -> None:
        """The first call back of a run.

        Args:
            latents: the pipeline's.

        Raises:
            InputError: the guidance does not fit the run.
            UnsupportedError: the pipeline does not say how many steps it takes.
        """
        total, guidance = getattr(self.pipe, "num_timesteps", None), self.guidance
        if not isinstance(total, int):
            raise UnsupportedError(
                f"{type(self.pipe).__name__} does not say how many steps it takes (num_timesteps): use bd.guide"
            )
        guidance.begin(total, len(latents))
        if any(guidance.acts(index) for index in range(self._unheard)):
            raise InputError(
                "the first step is over before a callback can hear it: guide from a later one on (start > 0), put the "
                "call into `with guidance.listening(pipe):`, or use bd.guide"
            )
        self.begun = True

    def step(self, latents: Tensor) -> Tensor:
        """The state after the pipeline's last step, guided.

        Raises:
            UnsupportedError: the pipeline has changed the state since its scheduler's step.
        """
        guidance, host = self.guidance, self.capture.last
        self._told = host
        if host is None:
            if self._unheard == 0:
                raise UnsupportedError(
                    f"{type(self.pipe).__name__} called back without a step of its scheduler that could be heard: use "
                    "bd.guide"
                )
            return latents
        if host.index == self._unheard:
            guidance.rehearse(latents / math.hypot(*host.end), host.decode, None)
            guidance.trace.plain_calls += self._unheard * host.calls
        if not guidance.acts(host.index):
            guidance.trace.plain_calls += host.calls
            return latents
        own = host.step(host.x, host.evaluate(host.x))
        if own.shape != latents.shape or not torch.equal(own.to(latents), latents):
            raise UnsupportedError(
                f"{type(self.pipe).__name__} changes its latents between the scheduler's step and the callback (as "
                "inpainting does): use bd.guide, which acts before that"
            )
        return guidance.advance(host).to(latents)

    def stop(self) -> None:
        """Leave the pipeline as it was."""
        self.capture.detach()


def called_back(guidance: Guidance, pipe: Any, step: int, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a pipeline gets back from its ``callback_on_step_end``.

    Raises:
        InputError: the pipeline hands no latents over, or the guidance does not fit the run.
    """
    latents = kwargs.get(STATE)
    if not isinstance(latents, Tensor):
        raise InputError(
            "guidance needs the latents in its callback: leave callback_on_step_end_tensor_inputs at its default, or "
            f"put 'latents' into it; got {sorted(kwargs)}"
        )
    if plain_class(type(pipe)) is not type(pipe):
        raise UnsupportedError(
            "guidance inside bd.differentiable: the gradient would pass over its pulls. Guide the pipeline's own call, "
            "or let the loss that you differentiate have the guidance's loss in it"
        )
    if torch.is_inference_mode_enabled():
        raise InputError("guidance inside torch.inference_mode(): leave that, it forbids gradients")
    listener = guidance.listener
    if listener is None or listener.pipe is not pipe or (step == 0 and listener.begun):
        if listener is not None:  # of a run that was broken off
            listener.stop()
        listener = guidance.listener = Listener(guidance, pipe, done=step + 1)
    try:
        if not listener.begun:
            listener.begin(latents)
        kwargs[STATE] = listener.step(latents)
    except BaseException:
        guidance.listener = None
        listener.stop()
        raise
    if step + 1 >= guidance.trace.total:
        guidance.listener = None
        listener.stop()
    return kwargs


@contextmanager
def listening(guidance: Guidance, pipe: Any) -> Iterator[Guidance]:
    """Inside the block one call of ``pipe`` is heard from its first step on."""
    listener = guidance.listener = Listener(guidance, pipe, done=0)
    try:
        yield guidance
    finally:
        listener.stop()
        if guidance.listener is listener:
            guidance.listener = None
