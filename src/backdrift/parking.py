"""Arguments of network calls that wait in host memory until the backward pass comes to their call.

A call that will be run again needs its arguments: latents, a control network's outputs. They are what a run holds
for every step whatever its plan. Parked, they are copied to the host, let go on the device, and copied back for the
length of the second run. The bits are the same, and so is the gradient: the graph between the calls is untouched.
On a CPU, where nothing is won, all goes as on a card.
"""

from __future__ import annotations

import weakref
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .accelerators import module_of

__all__ = ["Parked", "View", "parkable"]

# Smaller ones (times, sizes) are not worth a copy that the device has to wait for.
_LEAST = 1024


def parkable(value: Any) -> bool:
    """Whether an argument can be parked, and is worth it: a user's own leaf stays on the device anyway."""
    return (
        type(value) is Tensor
        and value.layout == torch.strided
        and value.nbytes >= _LEAST
        and not (value.is_leaf and value.requires_grad)
        # A copy would have other strides than an expanded or sliced argument, and kernels ask for strides.
        and torch.empty_like(value, device="meta").stride() == value.stride()
    )


class Parked:
    """One argument that waits on the host.

    Args:
        tensor: as the call was given it; what it may have of a graph is not kept.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._device, self._requires_grad = tensor.device, tensor.requires_grad
        self._dtype = tensor.dtype
        self._offset, self._length = int(tensor.storage_offset()), tensor.numel()
        self._kept = to_host(tensor.detach())
        self._back: weakref.ref[Tensor] | None = None

    def tensor(self) -> Tensor:
        """The argument on its device, without a graph; one copy for all who ask while it is there."""
        found = self._back() if self._back is not None else None
        if found is None:
            found = to_device(self._kept, self._device)
            self._back = weakref.ref(found)
        return found

    def argument(self) -> Tensor:
        """The argument as the call was given it: no leaf, but requiring grad if it did."""
        if not self._requires_grad:
            return self.tensor()
        anchor = torch.empty(0, requires_grad=True)
        with torch.enable_grad():
            return _Argument.apply(anchor, self)

    def view(self, tensor: Tensor) -> View | None:
        """Where a view of the parked argument lies in it; None for what reaches beyond it."""
        offset = int(tensor.storage_offset()) - self._offset
        sizes, strides = tensor.size(), tensor.stride()
        last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        if tensor.dtype != self._dtype or offset < 0 or offset + last >= self._length:
            return None
        return View(self, sizes, strides, offset)


@dataclass(frozen=True, slots=True)
class View:
    """What autograd saved of a parked argument, without the tensor."""

    parked: Parked
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        """The view, brought back if the argument is not there."""
        return self.parked.tensor().as_strided(self.size, self.stride, self.offset)


def to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, pinned where that makes the way shorter. It has arrived when this returns."""
    place: dict[str, Any] = {
        "size": tensor.size(),
        "stride": tensor.stride(),
        "dtype": tensor.dtype,
        "device": "cpu",
    }
    kept: Tensor | None = None
    if module_of(tensor.device) is not None and tensor.device.type != "mps":
        with suppress(RuntimeError):  # there is less memory that can be pinned than memory
            kept = torch.empty_strided(**place, pin_memory=True)
    return (torch.empty_strided(**place) if kept is None else kept).copy_(tensor)


def to_device(kept: Tensor, device: torch.device) -> Tensor:
    """A copy on the device."""
    made = torch.empty_strided(kept.size(), kept.stride(), dtype=kept.dtype, device=device)
    return made.copy_(kept)


class _Argument(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, parked: Parked) -> Tensor:
        # A new view object: marking the shared copy itself would give it a graph for all who hold it.
        return parked.tensor().detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # a redone call's own graph is never differentiated
        raise NotImplementedError
