"""Weights that wait elsewhere, and are on the device only while their phase of a run calls them.

A network whose weights wait on the CPU is given copies on the device for the length of each call. The copies of one
phase (encoding, sampling, decoding) stay there from call to call, and go when another phase begins, forward or
backward. What autograd saves of them is kept as a *place* (which weight, which view of it) and not as a tensor, so a
graph does not hold them: a backward pass loads them again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["Place", "Residence", "Turns", "home_of", "place_of"]

# The storages that are copies now, and what they are copies of.
_COPIES: dict[int, tuple[weakref.ref[Residence], Tensor]] = {}


class Turns:
    """The device of one run, and who is there.

    Args:
        device: where calls run.

    Attributes:
        peak: most bytes of copies at any time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.members: list[weakref.ref[Residence]] = []
        self.peak = 0

    def comes(self, member: Residence) -> None:
        """Send home those of other phases."""
        for other in self._living():
            if other.phase != member.phase:
                other.leave()

    def leave(self) -> None:
        """Send all home."""
        for member in self._living():
            member.leave()

    @property
    def nbytes(self) -> int:
        """Bytes of the copies now."""
        return sum(member.nbytes for member in self._living())

    def note(self) -> None:
        self.peak = max(self.peak, self.nbytes)

    def _living(self) -> list[Residence]:
        return [member for ref in self.members if (member := ref()) is not None]


class Residence:
    """The weights and buffers of one network of the run's own (a shadow), whose data lie at home.

    Args:
        module: the shadow. Its frozen weights' and buffers' tensors are its own, their storages the user's. Trained
            weights are the user's Parameters: calls see differentiable copies, and gradients arrive at home.
        phase: of the run; members of one phase are on the device together.
        turns: of the run.

    Attributes:
        nbytes: of its copies on the device.
    """

    def __init__(self, module: nn.Module, phase: str, turns: Turns) -> None:
        self.phase, self.turns = phase, turns
        self._frozen: list[Tensor] = []
        self._trained: list[tuple[nn.Module, str, nn.Parameter]] = []
        seen: set[int] = set()
        for child in module.modules():
            for name, parameter in child._parameters.items():
                if parameter is not None and parameter.requires_grad:
                    self._trained.append((child, name, parameter))
                elif parameter is not None and id(parameter) not in seen:
                    seen.add(id(parameter))
                    self._frozen.append(parameter)
            for name, buffer in child._buffers.items():
                if buffer is not None:  # the user's own tensor object so far
                    child._buffers[name] = own = buffer.detach()
                    self._frozen.append(own)
        self._copies: dict[Any, Tensor] = {}
        self.nbytes = 0
        self._depth = 0
        turns.members.append(weakref.ref(self))

    def around(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """``fn`` with its arguments and the weights on the device while it runs."""
        device = self.turns.device

        @wraps(fn)
        def there(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.to(device), (args, kwargs))
            with self.entered():
                return fn(*args, **kwargs)

        return there

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Inside the block the network's weights are on the device."""
        if self._depth:
            yield
            return
        self.turns.comes(self)
        homes = [tensor.data for tensor in self._frozen]
        self._keep_only({_key(home) for home in homes})
        self._depth += 1
        try:
            for tensor, home in zip(self._frozen, homes, strict=True):
                tensor.data = self._here(home)
            for child, name, parameter in self._trained:
                child._parameters[name] = parameter.to(self.turns.device, copy=True)  # type: ignore[assignment]
            yield
        finally:
            self._depth -= 1
            for tensor, home in zip(self._frozen, homes, strict=True):
                tensor.data = home
            for child, name, parameter in self._trained:
                child._parameters[name] = parameter

    def copy_of(self, home: Tensor) -> Tensor:
        """The copy on the device of what lies at ``home``, loaded if it is not there."""
        self.turns.comes(self)
        return self._here(home)

    def _here(self, home: Tensor) -> Tensor:
        if home.device == self.turns.device and home.device.type != "cpu":
            return home  # left there by a call of the user's own; on a CPU all goes as on a card
        key = _key(home)
        copy = self._copies.get(key)
        if copy is None:
            copy = self._copies[key] = home.to(self.turns.device, copy=True)
            _COPIES[copy.untyped_storage()._cdata] = weakref.ref(self), home
            self.nbytes += copy.nbytes
            self.turns.note()
        return copy

    def leave(self) -> None:
        """Give the copies up."""
        self._keep_only(set())

    def _keep_only(self, keys: set[Any]) -> None:
        for key in [key for key in self._copies if key not in keys]:
            copy = self._copies.pop(key)
            self.nbytes -= copy.nbytes
            _COPIES.pop(copy.untyped_storage()._cdata, None)

    def __del__(self) -> None:
        self.leave()


@dataclass(frozen=True, slots=True)
class Place:
    """A view of a weight on the device, without the tensor."""

    residence: Residence
    home: Tensor
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        """The view, loaded if the weight is not there."""
        return self.residence.copy_of(self.home).as_strided(self.size, self.stride, self.offset)


def place_of(tensor: Tensor) -> Place | None:
    """Where a tensor lies among the copies on a device; None for one that is no part of a copy."""
    found = _COPIES.get(tensor.untyped_storage()._cdata) if _COPIES else None
    if found is None or tensor.dtype != found[1].dtype:
        return None
    residence = found[0]()
    if residence is None:
        return None
    return Place(residence, found[1], tensor.size(), tensor.stride(), int(tensor.storage_offset()))


def home_of(tensor: Tensor) -> Tensor:
    """What a copy on a device is a copy of; any other tensor is itself."""
    found = _COPIES.get(tensor.untyped_storage()._cdata) if _COPIES else None
    return tensor if found is None else found[1]


def _key(home: Tensor) -> Any:
    return home.data_ptr(), home.dtype, home.shape, home.stride()
