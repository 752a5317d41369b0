"""The arguments of recorded network calls, taken apart: what belongs to each sample, and what all samples share.

What belongs to a sample goes into the view's ``cond`` and ``uncond``, under its argument's name
(``"encoder_hidden_states"``, ``"added_cond_kwargs.text_embeds"``), and so do tensors with a graph. The rest (rotary
tables, scales, flags) stays in a plan of the call, with places marked in it for what is put in again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError, UnsupportedError
from ..recorded import Recorded, Where
from .alike import beside

__all__ = ["BESIDE", "CallPlan", "Made", "Slot", "taken_apart"]

BESIDE = "beside"  # what lies beside the state in the network's input: a mask, a reference picture


@dataclass(frozen=True)
class Slot:
    """The place of a tensor of ``cond``.

    Attributes:
        key: its name there, a control network's behind that network's own.
        each: how many rows of the argument belong to one sample; 0 for a tensor that all share.
    """

    key: str
    each: int


@dataclass(frozen=True)
class Made:
    """The place of a control network's output: the ``index``-th tensor of what the ``call``-th one returned."""

    call: int
    index: int


@dataclass(frozen=True)
class CallPlan:
    """One network call for one half of guidance, or for both in one batch.

    Attributes:
        name: the component's.
        first, time: the names under which the network takes state and time.
        arguments: the others by name, with :class:`Slot` and :class:`Made` in them.
        where: how the state lies in the first.
        beside: the place of what lies beside it, if anything does.
        times: how the network takes its time: ``"one"`` number, or a ``"row"`` with one for each sample.
        dtype: of the recorded input.
    """

    name: str
    first: str
    time: str
    arguments: Mapping[str, Any]
    where: Where
    beside: Slot | None
    times: str
    dtype: torch.dtype

    def places(self) -> list[Slot | Made]:
        """All that is put in."""
        found: list[Slot | Made] = [] if self.beside is None else [self.beside]

        def note(place: Any) -> Any:
            if isinstance(place, Slot | Made):
                found.append(place)
            return place

        _filled(self.arguments, note)
        return found

    def filled(
        self, x: Tensor, times: Tensor, cond: Mapping[str, Any], made: Mapping[int, Sequence[Tensor]]
    ) -> dict[str, Any]:
        """The network's keyword arguments.

        Args:
            x: (B, …).
            times: (B,).
            cond: with the tensors of all slots.
            made: the control networks' outputs.

        Raises:
            InputError: a tensor of ``cond`` is missing, or is for another number of samples.
        """

        def put(place: Any) -> Any:
            if isinstance(place, Slot):
                return _rows(cond, place, len(x))
            if isinstance(place, Made):
                return made[place.call][place.index]
            # Shared tables of the network's own dtype follow it, where its weights are converted.
            follows = isinstance(place, Tensor) and place.dtype == self.dtype and x.dtype != self.dtype
            return place.to(x.dtype) if follows else place

        found: dict[str, Any] = _filled(self.arguments, put)
        rows = x
        if self.beside is not None:
            assert self.where.dim is not None
            rest = _rows(cond, self.beside, len(x)).to(x.dtype)
            rows = torch.cat([x, rest], self.where.dim)
        told = times[0] if self.times == "one" else times
        return {**found, self.first: rows, self.time: told}


def taken_apart(
    call: Recorded, where: Where, samples: int, made: Mapping[int, Made], prefix: str = ""
) -> tuple[CallPlan, list[dict[str, Tensor]]]:
    """A recorded call as a plan, and the tensors of its slots.

    Args:
        call: the call.
        where: of the state in it.
        samples: B.
        made: by ``id``, the places of control networks' outputs.
        prefix: of the slots' keys.

    Returns:
        The plan, and one mapping from keys to tensors for each copy of the state in the call.
    """
    halves: list[dict[str, Tensor]] = [{} for _ in range(where.copies)]
    rows = where.copies * samples

    def slot(key: str, tensor: Tensor) -> Any:
        if id(tensor) in made:
            return made[id(tensor)]
        each = _each(key, tensor, rows)
        if not each and not tensor.requires_grad:
            return tensor
        parts = tensor.chunk(where.copies) if each else (tensor,) * where.copies
        if each > 1:
            parts = tuple(part.unflatten(0, (samples, each)) for part in parts)
        for half, part in zip(halves, parts, strict=True):
            half[prefix + key] = part
        return Slot(prefix + key, each)

    given = dict(zip(call.names, call.args, strict=False)) | dict(call.kwargs)
    first, time = call.names[0], call._time_name
    arguments = {k: _marked(v, k, slot) for k, v in given.items() if k not in (first, time)}
    rest = beside(call, where)
    own = slot(BESIDE, rest) if rest is not None else None
    told = call.time
    times = "row" if isinstance(told, Tensor) and told.ndim else "one"
    if isinstance(told, Tensor) and told.ndim and len(told) not in (1, rows):
        raise UnsupportedError(
            f"{call.name} is given {len(told)} times for {rows} rows of latents, whose meaning is not known: no view"
        )
    plan = CallPlan(call.name, first, time, arguments, where, own, times, call.input.dtype)
    return plan, halves


def _each(key: str, tensor: Tensor, rows: int) -> int:
    """How many of a tensor's rows belong to each of ``rows`` rows of the state; 0 if all share it."""
    if tensor.ndim == 0:
        return 0
    if len(tensor) == rows:
        return 1
    # Prompts once for each frame, where a network of pictures makes videos.
    if key.startswith("encoder_hidden_states") and len(tensor) % rows == 0:
        return len(tensor) // rows
    return 0


def _marked(value: Any, path: str, slot: Callable[[str, Tensor], Any]) -> Any:
    """A nest with each tensor exchanged, by its path."""
    if isinstance(value, Tensor):
        return slot(path, value)
    if isinstance(value, Mapping):
        return {k: _marked(v, f"{path}.{k}", slot) for k, v in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_marked(v, f"{path}.{i}", slot) for i, v in enumerate(value))
    return value


def _filled(value: Any, put: Callable[[Any], Any]) -> Any:
    """A nest with each leaf exchanged; containers are new ones."""
    if isinstance(value, Mapping):
        return {k: _filled(v, put) for k, v in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_filled(v, put) for v in value)
    return put(value)


def _rows(cond: Mapping[str, Any], slot: Slot, batch: int) -> Tensor:
    """A slot's tensor for ``batch`` rows."""
    found = cond.get(slot.key)
    if not isinstance(found, Tensor):
        raise InputError(
            f"cond has no {slot.key!r}; it has {', '.join(map(repr, cond))}. A view's conditioning is that of "
            "the view (view.cond), or has the same names"
        )
    if slot.each == 0:
        return found
    if len(found) == 1 and batch > 1:
        found = found.expand(batch, *found.shape[1:])
    if len(found) != batch:
        raise InputError(
            f"{slot.key} is for {len(found)} samples and the state has {batch}: give the view prompts for as "
            "many, or for one"
        )
    return found.flatten(0, 1) if slot.each > 1 else found
