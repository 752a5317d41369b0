"""What is heard in one call of a pipeline: its networks' calls, its scheduler's steps, and whether they are alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from ... import nests
from ...errors import UnsupportedError
from ..recorded import Recorded, is_control
from ..stepped import KEY as CAPTURED
from ..stepping import _argument, _is_denoiser, _parameters, _state_of
from .alike import close, difference, others
from .process import Process, process_of

__all__ = ["KEY", "NO_VIEW", "Listener", "Over", "Step"]

KEY = "_backdrift_view"  # under which a scheduler knows who listens to it
NO_VIEW = "so it has no view"


class Over(Exception):
    """The loop is over: the pipeline is about to decode."""


class Listener:
    """Hears the network calls and the scheduler's steps of one call of a pipeline.

    Args:
        name: of the pipeline's class.
        outputs: what the first step's network calls return, known from before; None to call the networks.

    Attributes:
        scheduler: the one that is listened to.
        first: the first step.
        times: of each step, the scheduler's own time.
        told: of each step, what the network was told.
    """

    def __init__(self, name: str, outputs: Sequence[Any] | None) -> None:
        self.name, self._outputs = name, outputs
        self.scheduler: Any = None
        self.first: Step | None = None
        self.times: list[Any] = []
        self.told: list[float] = []
        self._calls: list[Recorded] = []  # of the step under way
        self._last: Tensor | None = None  # the state that the last step led to
        self._undo: list[Callable[[], None]] = []
        self._process: Process | None = None

    # -- the networks ---------------------------------------------------------------------------------------------

    def dressed(self, name: str, module: nn.Module) -> nn.Module:
        """A network of the copy whose calls are heard; a decoder that ends the call."""
        if _is_denoiser(module):
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key in [k for k, hook in hooks.items() if hasattr(hook, CAPTURED)]:
                    del hooks[key]
            self._exchange(module, "forward", self._heard(name, module))
        elif hasattr(module, "decode"):
            self._exchange(module, "decode", _ends)
        return module

    def _exchange(self, module: nn.Module, key: str, value: Any) -> None:
        before = module.__dict__.get(key)
        module.__dict__[key] = value

        def undo() -> None:
            module.__dict__.pop(key, None)
            if before is not None:
                module.__dict__[key] = before

        self._undo.append(undo)

    def undress(self) -> None:
        """Leave the copy's networks as they were."""
        for undo in self._undo:
            undo()
        self._undo = []

    def _heard(self, name: str, module: nn.Module) -> Callable[..., Any]:
        forward = module.forward

        @wraps(forward)
        def called(*args: Any, **kwargs: Any) -> Any:
            # Lists and dictionaries are copied: some networks take elements out of them.
            own_args, own_kwargs = nests.transform(lambda tensor: tensor, (args, kwargs))
            known = self._known(name)
            if known is None:
                with torch.no_grad():
                    known = forward(*args, **kwargs)
            else:
                known = _again(known)
            self._calls.append(Recorded(name, module, own_args, own_kwargs, known, NO_VIEW))
            return known

        return called

    def _known(self, name: str) -> Any:
        at = len(self._calls)
        if self.first is None:
            return None if self._outputs is None else self._outputs[at]
        before = [call.name for call in self.first.calls]
        if at >= len(before) or before[at] != name:
            raise self._unlike(f"calls {name} as its {at + 1}. network, and in the first step {before}")
        return self.first.calls[at].output

    # -- the scheduler --------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: Any) -> Listener:
        return self

    def step(self, scheduler: Any, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """One call of the scheduler's ``step``."""
        if scheduler is not self.scheduler:
            raise UnsupportedError(f"{self.name} steps with a copy of its scheduler too, so it has no view")
        names = _parameters(fn)
        sample, output, timestep = (
            _argument(names, name, args, kwargs) for name in ("sample", "model_output", "timestep")
        )
        calls, self._calls = self._calls, []
        if all(is_control(call) for call in calls):  # none, too
            raise UnsupportedError(
                f"{self.name} stepped without calling a network that takes a timestep, so it has no view"
            )
        if self._process is None:
            self._process = process_of(scheduler)
        state, z = self._process.state(scheduler, sample, timestep)
        step = Step(calls, state, z.detach(), output.detach(), sample.detach())
        if self.first is None:
            self.first = step
        else:
            self._check_alike(step)
        self.times.append(timestep)
        self.told.append(step.told)
        args, kwargs = nests.transform(lambda tensor: tensor.detach(), (args, kwargs))
        with torch.no_grad():
            out = fn(*args, **kwargs)
        self._last = _state_of(out)
        return out

    def _check_alike(self, step: Step) -> None:
        """See that a later step does what the first one did.

        Raises:
            UnsupportedError: it does not; naming what is different.
        """
        first = self.first
        assert first is not None
        assert self._last is not None
        if not close(step.sample, self._last.to(step.sample)):
            raise self._unlike(
                "begins elsewhere than the step before it ended (the pipeline puts something back into the latents, "
                "such as the known part of a picture)"
            )
        if len(step.calls) != len(first.calls):
            raise self._unlike(
                f"calls {len(step.calls)} networks, and {len(first.calls)} are called in the first step"
            )
        for call, before in zip(step.calls, first.calls, strict=True):
            changed = difference(others(call, step.z), others(before, first.z))
            if changed is not None:
                raise self._unlike(f"gives {call.name} another {changed} than in the first step")
        if not close(step.output, first.output):
            raise self._unlike(
                "makes the scheduler's input of the networks' outputs by another rule than in the first step (a "
                "guidance scale that changes on the way)"
            )

    def _unlike(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"step {len(self.times) + 1} of {self.name} {what}: its steps are not one function of state and time, so "
            "it has no view as a Denoiser. Give the call arguments that hold in all its steps, or use bd.differentiable"
        )


@dataclass(frozen=True)
class Step:
    """What one step is made of.

    Attributes:
        calls: its network calls.
        state: the view's state at its beginning, (B, …), with its graph.
        z: the networks' input there; without a graph, as the rest.
        output: what the scheduler was given as the network's output.
        sample: the scheduler's state.
    """

    calls: Sequence[Recorded]
    state: Tensor
    z: Tensor
    output: Tensor
    sample: Tensor

    @property
    def told(self) -> float:
        """The time that the network was given."""
        time = next(call for call in self.calls if not is_control(call)).time
        return float(time.reshape(-1)[0]) if isinstance(time, Tensor) else float(time)


def _ends(*args: Any, **kwargs: Any) -> Any:
    raise Over


def _again(output: Any) -> Any:
    """A copy of a network's output: pipelines change some in place."""
    if hasattr(output, "to_tuple"):
        return type(output)(**{k: nests.transform(Tensor.clone, v) for k, v in output.items()})
    return nests.transform(Tensor.clone, output)
