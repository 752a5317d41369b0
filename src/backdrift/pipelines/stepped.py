"""One step of a diffusers scheduler, taken again as often as wanted from what the scheduler remembered before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..accelerators import random_states, set_random_states
from ..errors import InputError, UnsupportedError
from .stepping import _argument, _parameters, _state_of

__all__ = ["KEY", "Stepping"]

KEY = "_backdrift_capture"  # under which a scheduler knows who listens to it


class Stepping:
    """One step of a scheduler, which can be taken again from what it remembered before.

    Raises:
        UnsupportedError: an argument whose effect is not known.
    """

    def __init__(self, scheduler: Any, fn: Callable[..., Any], args: Any, kwargs: Any) -> None:
        names = _parameters(fn)
        for name in ("s_churn", "per_token_timesteps"):
            if (value := _argument(names, name, args, kwargs)) is not None and not (
                isinstance(value, int | float) and value == 0
            ):
                raise UnsupportedError(f"steps of {type(scheduler).__name__} with {name} cannot be guided")
        self.sample, self.output, self.timestep = (
            _argument(names, name, args, kwargs) for name in ("sample", "model_output", "timestep")
        )
        self.out: Any = None
        self._scheduler, self._fn = scheduler, fn
        bound = dict(zip(names, args, strict=False)) | dict(kwargs)
        self._kwargs = {k: v for k, v in bound.items() if k not in ("sample", "model_output")}
        self._state = {key: value for key, value in _copied(vars(scheduler)).items() if key != KEY}
        self._random = _Random(scheduler, self._kwargs, self.sample.device)

    def again(self, sample: Tensor, output: Tensor) -> Tensor:
        """The state after the step from ``sample``, if the network had said ``output``."""
        own = vars(self._scheduler)
        link = {KEY: own[KEY]} if KEY in own else {}
        own.clear()
        own.update(_copied(self._state) | link)
        with self._random.restored():
            self.out = self._fn(sample=sample, model_output=output, **self._kwargs)
        state = _state_of(self.out)
        if state is None:
            raise UnsupportedError(f"{type(self._scheduler).__name__}.step returned no tensor")
        return state

    def renew(self) -> None:
        """Draw other noise in the steps from here on: what the generators give next."""
        self._random = _Random(self._scheduler, self._kwargs, self.sample.device)

    def with_state(self, state: Tensor) -> Any:
        """The scheduler's own output with another state in it, in the dtype of its own.

        Raises:
            InputError: another shape.
        """
        if self.out is None:
            self.again(self.sample, self.output)
        before = _state_of(self.out)
        assert before is not None
        if not isinstance(state, Tensor) or state.shape != before.shape:
            shown = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
            raise InputError(f"the state after this step has shape {tuple(before.shape)}; got {shown}")
        state = state.detach().to(before)
        if isinstance(self.out, tuple):
            return (state, *self.out[1:])
        return type(self.out)(**{**self.out, "prev_sample": state})


class _Random:
    """The state of the generators that a step draws from."""

    def __init__(self, scheduler: Any, kwargs: dict[str, Any], device: torch.device) -> None:
        generator = kwargs.get("generator")
        given = generator if isinstance(generator, list | tuple) else [generator]
        self._given = [g for g in given if isinstance(g, torch.Generator)]
        # The global ones belong to all threads: they are left alone where nothing is drawn.
        self._global = not self._given and _draws(scheduler, kwargs)
        self._device = device
        self._states = self._read()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside the block they are as they were before the step."""
        now = self._read()
        self._write(self._states)
        try:
            yield
        finally:
            # A step that drew nothing leaves what others (a loss, say) have drawn from them meanwhile.
            if all(map(torch.equal, self._read(), self._states)):
                self._write(now)

    def _read(self) -> list[Tensor]:
        states = [generator.get_state() for generator in self._given]
        return states + random_states([self._device]) if self._global else states

    def _write(self, states: list[Tensor]) -> None:
        for generator, state in zip(self._given, states, strict=False):
            generator.set_state(state)
        if self._global:
            set_random_states([self._device], states)


def _draws(scheduler: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a scheduler's step may add noise."""
    config = scheduler.config
    return bool(
        type(scheduler).__name__ in ("DDPMScheduler", "EulerAncestralDiscreteScheduler")
        or kwargs.get("eta")
        or str(config.get("algorithm_type")).startswith("sde")
        or config.get("stochastic_sampling")
    )


def _copied(state: Any) -> dict[str, Any]:
    return {key: list(value) if type(value) is list else value for key, value in state.items()}
