"""One call of a network in a pipeline's loop, taken down so that it can be made again at another state or time.

The state is found among the call's arguments as the network's first one: the rows ``z`` that the scheduler scaled, once
or twice (guidance), perhaps with more beside them in one dimension (an inpainting mask, a reference picture's tokens).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .. import nests
from ..errors import UnsupportedError
from .shadow import unwrapped
from .stepping import _argument, _parameters, _with_argument

__all__ = ["Recorded", "Times", "Where", "is_control", "outputs_of"]

_TIMES = ("timestep", "timesteps")
# Arguments that a control network made of the state, and of the picture alone.
_OF_STATE, _OF_PICTURE = ("residual", "controlnet_", "control_block", "block_controlnet"), ("intrablock",)
Times = Tensor | None


@dataclass(frozen=True)
class Where:
    """How the state lies in a network's input.

    Attributes:
        copies: how many times its B rows are repeated, one batch after the other.
        dim: the dimension along which more lies behind it; None if nothing does.
        length: its own length in that dimension.
    """

    copies: int
    dim: int | None
    length: int


@dataclass(frozen=True)
class Recorded:
    """One call of a component of a pipeline.

    Attributes:
        name: the component's.
        module: the user's network, as the pipeline holds it.
        args, kwargs: what it was called with; dictionaries and lists are copies, tensors are not.
        output: what it returned.
        refusal: what is said where the call is not of a known kind: of what the user asked for.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    refusal: str = "so its steps cannot be guided"

    @cached_property
    def names(self) -> list[str]:
        """The parameters of the network's ``forward``."""
        return _parameters(type(unwrapped(self.module)).forward)

    @property
    def input(self) -> Tensor:
        """What the network was given first: the state in it, once or twice, perhaps with more beside it."""
        given: Tensor = _argument(self.names, self.names[0], self.args, self.kwargs)
        return given

    def where(self, z: Tensor) -> Where:
        """How ``z`` lies in the call's input.

        Raises:
            UnsupportedError: it does not.
        """
        given = _argument(self.names, self.names[0], self.args, self.kwargs)
        if not isinstance(given, Tensor) or given.ndim != z.ndim or len(given) % len(z):
            shown = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise UnsupportedError(
                f"{self.name} was called with {shown} where the scheduler steps {tuple(z.shape)}: how the pipeline "
                f"makes the one of the other is not known, {self.refusal}"
            )
        longer = [d for d in range(1, z.ndim) if given.shape[d] != z.shape[d]]
        if len(longer) > 1 or any(given.shape[d] < z.shape[d] for d in longer):
            raise UnsupportedError(
                f"{self.name} was called with {tuple(given.shape)} where the scheduler steps {tuple(z.shape)}: they "
                f"differ in more than one dimension, {self.refusal}"
            )
        dim = longer[0] if longer else None
        where = Where(len(given) // len(z), dim, z.shape[dim] if dim is not None else 0)
        own = given if dim is None else given.narrow(dim, 0, where.length)
        apart = max(float((part.to(z) - z).abs().max()) for part in own.detach().chunk(where.copies))
        unit = torch.finfo(min(z.dtype, given.dtype, key=lambda d: d.itemsize)).eps
        if not apart <= 8 * unit * float(z.abs().max()):
            raise UnsupportedError(
                f"{self.name}'s input is not scheduler.scale_model_input(latents) (they differ by {apart:.2g}): the "
                f"pipeline changes the latents on the way in a manner that is not known, {self.refusal}"
            )
        return where

    @cached_property
    def time(self) -> Any:
        """The time that the network was given.

        Raises:
            UnsupportedError: there is none, or one for each token.
        """
        time = _argument(self.names, self._time_name, self.args, self.kwargs)
        if isinstance(time, Tensor) and (time.ndim > 1 or len(set(time.reshape(-1).tolist())) > 1):
            raise UnsupportedError(
                f"{self.name} is given a time for each part of the latents, {self.refusal}"
            )
        if not isinstance(time, Tensor | int | float):
            raise UnsupportedError(
                f"{self.name} was given {type(time).__name__} as its time, which is not known, {self.refusal}"
            )
        return time

    @property
    def _time_name(self) -> str:
        return next((name for name in _TIMES if name in self.names), _TIMES[0])

    def again(
        self,
        network: nn.Module,
        z: Tensor,
        where: Where,
        times: Times = None,
        exchanged: Mapping[int, Any] | None = None,
    ) -> Any:
        """What the network returns for ``z`` in place of the state.

        Args:
            network: what to call.
            z: (B, …).
            where: its place.
            times: (B,); as in the recorded call if None.
            exchanged: by ``id``, tensors that take the place of the recorded ones.
        """
        own = exchanged or {}
        # Copies every time: some networks take elements out of the lists that they are given.
        args, kwargs = nests.transform(
            lambda t: own[id(t)] if id(t) in own else t.detach(), (tuple(self.args), dict(self.kwargs))
        )
        given = _argument(self.names, self.names[0], self.args, self.kwargs)
        rows = (
            z.to(given.dtype).repeat(where.copies, *[1] * (z.ndim - 1))
            if where.copies > 1
            else z.to(given.dtype)
        )
        if where.dim is not None:
            rest = given.narrow(where.dim, where.length, given.shape[where.dim] - where.length)
            rows = torch.cat([rows, rest], where.dim)
        args, kwargs = _with_argument(self.names, self.names[0], rows, args, kwargs)
        if times is not None:
            before = self.time
            one = not isinstance(before, Tensor) or before.ndim == 0
            now = times[0] if one else times[:1].expand(before.shape[0])
            args, kwargs = _with_argument(self.names, self._time_name, now, args, kwargs)
        return network(*args, **kwargs)

    def check_arguments(self, known: Mapping[int, Any]) -> None:
        """See that what depends on the state among the arguments can be made again.

        Args:
            known: by ``id``, the tensors that recorded control networks returned.

        Raises:
            UnsupportedError: naming the argument.
        """
        given = dict(zip(self.names, self.args, strict=False)) | dict(self.kwargs)
        for name, value in given.items():
            if not any(part in name for part in _OF_STATE) or any(part in name for part in _OF_PICTURE):
                continue
            if any(id(tensor) not in known for tensor in nests.tensors(value)):
                raise UnsupportedError(
                    f"{self.name} is given {name}, which depends on the latents and was not returned as it is by a "
                    f"control network of the pipeline (guess_mode changes it), {self.refusal}"
                )


def is_control(call: Recorded) -> bool:
    """Whether the call is a control network's: it returns lists of tensors for another network."""
    return not isinstance(call.output, Tensor) and not isinstance(call.output[0], Tensor)


def outputs_of(output: Any) -> list[Tensor]:
    """The tensors of a control network's output, in order."""
    values: Sequence[Any] = output.to_tuple() if hasattr(output, "to_tuple") else output
    return nests.tensors(list(values))
