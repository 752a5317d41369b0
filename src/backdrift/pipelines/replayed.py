"""The networks of one captured step as one function of the state: control networks, prediction, guidance.

It calls frozen copies on the same weights, so nothing of the user's modules is touched, and what is listened to there
does not hear it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from .combination import Combination, learned
from .recorded import Recorded, Times, Where, is_control, outputs_of

__all__ = ["StepNetwork"]


class StepNetwork(nn.Module):
    """The guided output of a step's networks, at any state and time, with what they were given in that step.

    In the calling order of a :class:`~backdrift.Denoiser`: ``network(z, times, cond)``; ``cond`` is not used.

    Args:
        pipe: the pipeline; its attributes are asked for the guidance scale.
        calls: of the step, in order.
        z: the network's input in the step, (B, …).
        output: what the scheduler was given, in the network's own dtype.
        frozen: gives the frozen copy of a component.

    Attributes:
        dtype: of the networks' input.

    Raises:
        UnsupportedError: the step's arithmetic is not known; says what is in the way.
    """

    def __init__(
        self,
        pipe: Any,
        calls: Sequence[Recorded],
        z: Tensor,
        output: Tensor,
        frozen: Callable[[Recorded], nn.Module],
    ) -> None:
        super().__init__()
        self._controls = [call for call in calls if is_control(call)]
        self._calls = [call for call in calls if not is_control(call)]
        if not self._calls:
            raise UnsupportedError(
                f"{type(pipe).__name__} stepped without calling a network that takes a timestep, so the step cannot be "
                "guided"
            )
        _check_kind(pipe, output, z)
        self._made = {id(t): t for call in self._controls for t in outputs_of(call.output)}
        for call in self._calls:
            call.check_arguments(self._made)
        self._places: dict[int, Where] = {id(call): call.where(z) for call in calls}
        self.like = z
        self._networks = nn.ModuleDict({call.name: frozen(call) for call in calls})
        self.training = False
        self.dtype = _input_dtype(self._calls[0])
        self.found = [part for call in self._calls for part in self._parts_of(call, call.output)]
        self.combination: Combination = learned(pipe, self.found, output)

    def forward(self, z: Tensor, times: Times, cond: Any = None) -> Tensor:
        """The guided output (B, …) at ``z`` and, where they are given, ``times`` (B,)."""
        return self.combination(self.parts(z, times))

    def parts(self, z: Tensor, times: Times = None) -> list[Tensor]:
        """The outputs that guidance combines, each of z's shape."""
        exchanged: dict[int, Any] = {}
        for call in self._controls:
            made = self._again(call, z, times, None)
            exchanged |= {
                id(old): new for old, new in zip(outputs_of(call.output), outputs_of(made), strict=True)
            }
        return [
            part
            for call in self._calls
            for part in self._parts_of(call, self._again(call, z, times, exchanged))
        ]

    def _again(self, call: Recorded, z: Tensor, times: Times, exchanged: dict[int, Any] | None) -> Any:
        return call.again(self._networks[call.name], z, self._places[id(call)], times, exchanged)

    def _parts_of(self, call: Recorded, output: Any) -> list[Tensor]:
        """One part for each copy of the state in the call: what lies beside z's own shape is left out."""
        found: Tensor = output if isinstance(output, Tensor) else output[0]
        if found.ndim != self.like.ndim or any(
            a < b for a, b in zip(found.shape, self.like.shape, strict=True)
        ):
            raise UnsupportedError(
                f"{call.name} returned {tuple(found.shape)} for latents of {tuple(self.like.shape)}, which "
                "cannot be guided"
            )
        for d in range(
            1, found.ndim
        ):  # a learned variance behind the prediction, a reference picture's tokens
            if found.shape[d] > self.like.shape[d]:
                found = found.narrow(d, 0, self.like.shape[d])
        return list(found.chunk(self._places[id(call)].copies))


def _check_kind(pipe: Any, output: Tensor, z: Tensor) -> None:
    name = type(pipe).__name__
    if output.shape != z.shape:
        raise UnsupportedError(
            f"{name} gives its scheduler {tuple(output.shape)} for latents of {tuple(z.shape)} (a learned variance): "
            "such steps cannot be guided; use DDIMScheduler.from_config(pipe.scheduler.config)"
        )
    others = [key for key in ("transformer_2", "unet_2") if getattr(pipe, key, None) is not None]
    if others:
        raise UnsupportedError(
            f"{name} has another network ({others[0]}) for other noise levels, so one step's network does not lead to "
            "the clean end: such steps cannot be guided"
        )


def _input_dtype(call: Recorded) -> torch.dtype:
    given = call.args[0] if call.args else call.kwargs[call.names[0]]
    return given.dtype
