"""Weights as a call saw them: noticed when they change before its backward pass, put back where that is safe.

Plain autograd raises when a weight was edited in place between forward and backward; a recomputed call would
use the new weight without a word. So every parameter's version, flag and address is recorded and compared.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from .carried import Carried, Carrier
from .errors import StateChangedError
from .residence import Turns
from .versions import version_of, versions_of

_ADVICE = "run the sampling call again, or call backward() before the change"


def adapter_layers(modules: Sequence[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """The adapter layers (peft's) inside ``modules``, with their names."""
    # Most networks have none; the walk that also makes names takes ten times as long.
    if not any(_adapts(child) for child in _tree(modules)):
        return []
    return [
        (".".join(part for part in (prefix, name) if part), layer)
        for prefix, module in modules
        for name, layer in module.named_modules()
        if _adapts(layer)
    ]


def _adapts(layer: nn.Module) -> bool:
    return "merged_adapters" in layer.__dict__ or _class_adapts(type(layer))  # type: ignore[arg-type]  # a class is hashable


@cache
def _class_adapts(kind: type) -> bool:
    return hasattr(kind, "merged_adapters")


def _tree(modules: Sequence[tuple[str, nn.Module]]) -> list[nn.Module]:
    """All modules inside ``modules``, each once, parents first."""
    found: dict[nn.Module, None] = {}
    stack = [module for _, module in reversed(modules)]
    while stack:
        module = stack.pop()
        if module not in found:
            found[module] = None
            stack += [child for child in reversed(module._modules.values()) if child is not None]
    return list(found)


class Adapters:
    """Which adapters (peft's) of ``modules`` are active, merged or disabled, and their scales, at one moment."""

    def __init__(self, modules: Sequence[tuple[str, nn.Module]]) -> None:
        self.modules = list(modules)
        self.layers = adapter_layers(self.modules)
        self.state = _adapter_state(self.layers)
        self._checked = -1  # the backward pass (autograd's graph task) that was found in order last

    def check(self) -> None:
        """Raise if an adapter was added, removed, switched, scaled or merged since. Once per backward pass.

        Raises:
            StateChangedError: naming the first layer that changed.
        """
        task = torch._C._current_graph_task_id()
        if task == self._checked != -1:
            return
        now = _adapter_state(adapter_layers(self.modules))
        if now != self.state:
            pairs = zip(self.state, now, strict=False)
            first = next((then[0] for then, later in pairs if then != later), "layers added or removed")
            raise StateChangedError(
                f"adapters changed between the forward and the backward pass (first: {first}): {_ADVICE}"
            )
        self._checked = task


def _adapter_state(layers: Sequence[tuple[str, Any]]) -> list[tuple[Any, ...]]:
    return [
        (
            name,
            tuple(layer.active_adapters),
            tuple(layer.merged_adapters),
            bool(layer.disable_adapters),
            # Rounded: diffusers multiplies and divides scales around each call, which costs the last digit.
            tuple(sorted((k, float(f"{v:.9g}")) for k, v in getattr(layer, "scaling", {}).items())),
        )
        for name, layer in layers
    ]


def _switches(layer: nn.Module) -> dict[str, Any]:
    # What turns an adapter on and sets its strength, as the layer itself holds it.
    kept = ("scaling", "_active_adapter", "_disable_adapters")
    return {key: copy.copy(layer.__dict__[key]) for key in kept if key in layer.__dict__}


def _set_switches(layers: Sequence[tuple[str, nn.Module]], values: Sequence[dict[str, Any]]) -> None:
    for (_, layer), switches in zip(layers, values, strict=True):
        layer.__dict__.update({key: copy.copy(value) for key, value in switches.items()})


class Weights:
    """The parameters, buffers, modes and adapters of ``modules`` at one moment.

    Args:
        modules: name and module; the name leads every message.
        owned: True for modules that belong to the run alone (shadows). Conversions of their weights (a
            decoder upcast for its call) are then undone for the redo; on a user's module they raise.
        turns: of weights that may be on a device as copies just now: they are looked at where they lie at home.
    """

    def __init__(
        self,
        modules: Sequence[tuple[str, nn.Module]],
        *,
        owned: bool = False,
        turns: Turns | None = None,
    ) -> None:
        self.modules = list(modules)
        self.owned, self._turns = owned, turns
        self.holders = _tree(self.modules)
        self._places: list[tuple[nn.Module, str]] = []  # of the parameters: in which module, by which name
        self.tensors: list[torch.Tensor] = []
        buffers: list[torch.Tensor] = []
        for child in self.holders:
            for leaf, present in child._parameters.items():
                parameter = present if turns is None else turns.weight_at(child, leaf)
                if parameter is not None:
                    self._places.append((child, leaf))
                    self.tensors.append(parameter)
            buffers += [b for b in child._buffers.values() if b is not None]
        self.checked = len(
            self.tensors
        )  # buffers follow: put back, but not compared (BatchNorm edits its own: see :meth:`carried`)
        self.tensors += buffers
        self.versions = versions_of(self.tensors[: self.checked])
        self.flags = [t.requires_grad for t in self.tensors]
        self.data = [self._at_home(t.data) for t in self.tensors]
        self.addresses = [t.data_ptr() for t in self.data]
        self.devices = frozenset(t.device for t in self.data)
        self.dtypes = frozenset(t.dtype for t in self.data)
        self.training = [m.training for m in self.holders]
        self.adapters = Adapters(self.modules)
        self.carrier = Carrier(self.holders)
        self.layers = self.adapters.layers
        self.switches = [_switches(layer) for _, layer in self.layers]
        self.storages = frozenset(t.untyped_storage()._cdata for t in self.data)

    def _at_home(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self._turns is None else self._turns.home_of(tensor)

    def unchanged(self) -> bool:
        """Whether a new snapshot would be equal to this one (weights, flags, modes, addresses, adapters)."""
        return (
            self.versions == versions_of(self.tensors[: self.checked])
            and self.addresses == self._addresses()
            and self.flags == [t.requires_grad for t in self.tensors]
            and self.training == [m.training for m in self.holders]
            and self.switches == [_switches(layer) for _, layer in self.layers]
        )

    def _addresses(self) -> list[int]:
        if self._turns is None:
            return [t.data_ptr() for t in self.tensors]
        return [self._at_home(t).data_ptr() for t in self.tensors]

    def carried(self) -> Carried | None:
        """What layers in train mode carry in their buffers now; to be asked right before a call."""
        return self.carrier.now()

    def check(self) -> None:
        """Raise if a backward pass now would not see the weights that the call saw.

        Raises:
            StateChangedError: naming the first parameter that was edited, replaced, frozen or unfrozen, or
                the first layer whose adapters were switched, scaled or merged.
        """
        parameters = self.tensors[: self.checked]
        if not (
            self.versions == versions_of(parameters)
            and self.flags[: self.checked] == [t.requires_grad for t in parameters]
            and (self.owned or self.addresses[: self.checked] == [t.data_ptr() for t in parameters])
        ):
            raise self._first_change()
        if not self.owned:
            self.adapters.check()

    def name(self, index: int) -> str:
        """The name of the parameter ``tensors[index]``."""
        holder, leaf = self._places[index]
        for prefix, module in self.modules:
            for name, child in module.named_modules():
                if child is holder:
                    return ".".join(part for part in (prefix, name, leaf) if part)
        return f"{type(holder).__name__}.{leaf}"  # its module has left the network

    def _first_change(self) -> StateChangedError:
        for i, tensor in enumerate(self.tensors[: self.checked]):
            if version_of(tensor) != self.versions[i]:
                return StateChangedError(
                    f"{self.name(i)} was modified in place between the forward and the backward pass "
                    f"(version {self.versions[i]}, now {version_of(tensor)}), so its gradient is lost: {_ADVICE}"
                )
            if tensor.requires_grad != self.flags[i]:
                return StateChangedError(
                    f"{self.name(i)} had requires_grad={self.flags[i]} in the forward pass and has "
                    f"{tensor.requires_grad} now (disabling adapters also does this): {_ADVICE}"
                )
            if not self.owned and tensor.data_ptr() != self.addresses[i]:
                return StateChangedError(
                    f"{self.name(i)} was replaced or converted (.to, .half, .data =) between the forward and the "
                    f"backward pass: {_ADVICE}"
                )
        return StateChangedError(f"weights were changed by another thread meanwhile: {_ADVICE}")

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside the block modes, adapter switches and owned modules' weights are the snapshot's."""
        modes = self._set_modes(self.training)
        switches = [_switches(layer) for _, layer in self.layers]
        moved: list[tuple[torch.Tensor, torch.Tensor]] = []
        try:
            _set_switches(self.layers, self.switches)
            if self.owned:
                for tensor, data, address in zip(self.tensors, self.data, self.addresses, strict=True):
                    if tensor.data_ptr() != address:
                        moved.append((tensor, tensor.data))
                        tensor.data = data
            yield
        finally:
            for tensor, data in moved:
                tensor.data = data
            _set_switches(self.layers, switches)
            self._set_modes(modes)

    def _set_modes(self, modes: Sequence[bool]) -> list[bool]:
        """Train or eval for each module; what they were before."""
        before = [module.training for module in self.holders]
        for module, old, new in zip(self.holders, before, modes, strict=True):
            if old != new:  # a module's __setattr__ is slow
                module.training = new
        return before
