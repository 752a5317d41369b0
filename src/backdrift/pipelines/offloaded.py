"""Offloaded pipelines: weights wait on the CPU, and are on the device while they are called.

diffusers does it with hooks, which move whole networks, blocks or layers of the user's (:mod:`.homes`). A run leaves
those alone: its shadow networks lie where the user's weights lie at home, and have copies on the device
(:mod:`~backdrift.residence`), in backward passes too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError
from ..planning.choices import Choices
from ..residence import Residence, Turns, layers
from ..weights import Weights
from .homes import execution_device_of, parts_of, way_of
from .rehearsal import role_of
from .shadow import networks

__all__ = ["Offloading", "execution_device", "methods_of"]


def execution_device(pipe: Any) -> torch.device | None:
    """Where the calls of an offloaded pipeline run; None for one that is not offloaded."""
    found = (execution_device_of(module) for module in networks(pipe).values())
    return next((device for device in found if device is not None), None)


class Offloading:
    """The residences of one call of a pipeline. When the block around it ends, all are sent home.

    Args:
        pipe: the user's pipeline.
        weights: what comes and goes together: with ``"offload"`` the networks of a phase, with ``"stream"`` one layer;
            otherwise what the user has set up.
    """

    def __init__(self, pipe: Any, weights: str = Choices().weights) -> None:
        self._pipe, self._weights = pipe, weights
        device = execution_device(pipe)
        self.turns = None if device is None else Turns(device)
        self._shadows: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._originals = networks(pipe)

    def moves(self, name: str) -> bool:
        """Whether a network's weights come and go."""
        return self.turns is not None and way_of(self._originals[name]) is not None

    def residence(self, name: str, module: nn.Module) -> Residence | None:
        """Of a shadow network; None for one that stays on the device."""
        way = way_of(self._originals[name])
        if self.turns is None or way is None:
            return None
        for weight in module.parameters():
            if type(weight.data) is not torch.Tensor:
                raise UnsupportedError(
                    f"{name} is quantised ({type(weight.data).__name__}) and offloaded: keep it on the device, "
                    f"pipe._exclude_from_cpu_offload = ['{name}'] before pipe.enable_model_cpu_offload()"
                )
        # What asks a network where its calls run, finds it here, as in accelerate's hook.
        module.__dict__["_hf_hook"] = SimpleNamespace(execution_device=self.turns.device)
        self._shadows.add(module)
        role = role_of(name, module)
        parts = None
        if self._weights == "stream":
            parts = layers(module)
        elif way != "model" and self._weights != "offload":
            parts = parts_of(self._originals[name], module, way)
        if parts is not None:  # what asks it in a call, while only some layer's weights are there
            kind: Any = type(module)
            module.__class__ = _on(kind, self.turns.device)
        return Residence(module, name if role == "other" else role, self.turns, parts)

    def dressed(self, name: str, module: nn.Module) -> nn.Module:
        """A shadow network each of whose calls brings its weights and leaves none in its graph; as it is where it stays
        on the device."""
        residence = self.residence(name, module)
        if residence is not None:
            for method in methods_of(name, module):
                setattr(module, method, _saving(name, module, residence, getattr(module, method)))
        return module

    def place(self, clone: Any) -> None:
        """Tell a copy of the pipeline where its networks' calls run."""
        if self.turns is not None:
            kind: Any = type(clone)
            clone.__class__ = _on(kind, self.turns.device, "_execution_device")

    def saving(self) -> AbstractContextManager[None]:
        """A block inside of which autograd saves places of weights that come and go."""
        return nullcontext() if self.turns is None else self.turns.saving()

    def __enter__(self) -> Offloading:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def close(self) -> None:
        """:meth:`leave`, after a call in place of the user's own."""
        self.leave()
        self.free()

    def free(self) -> None:
        """Send home what a method of the user's own pipeline has called: its text encoders, its safety checker."""
        if self.turns is not None:
            for hook in getattr(self._pipe, "_all_hooks", []):
                hook.offload()

    def leave(self) -> None:
        """Send all home, and let go of the shadow networks: nobody calls them again."""
        if self.turns is not None:
            self.turns.leave()
            for shadow in self._shadows:  # a residence must not be part of a cycle
                _undress(shadow)
            self._shadows.clear()

    def forget(self, shadow: nn.Module) -> None:
        """Let go of one of the shadow networks."""
        if shadow in self._shadows:
            self._shadows.discard(shadow)
            _undress(shadow)


def methods_of(name: str, module: nn.Module) -> list[str]:
    """The methods by which pipelines call a network."""
    coders = ("encode", "decode") if role_of(name, module) == "decoder" else ()
    return ["forward", *(method for method in coders if hasattr(module, method))]


def _saving(name: str, module: nn.Module, residence: Residence, fn: Callable[..., Any]) -> Callable[..., Any]:
    """A network's method with its weights on the device, whose graph holds none of them."""
    turns, there = residence.turns, residence.around(fn)

    @wraps(fn)
    def called(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return there(*args, **kwargs)
        with turns.saving(_Unedited(name, module)):
            return there(*args, **kwargs)

    return called


class _Unedited:
    """Whether a network's weights are what they were, as plain autograd asks for each that it has saved; once in a
    backward pass."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self._weights, self._asked = Weights([(name, module)], owned=True), -1

    def __call__(self) -> None:
        task = torch._C._current_graph_task_id()
        if task == -1 or task != self._asked:
            self._weights.check()
            self._asked = task


def _undress(shadow: nn.Module) -> None:
    for method in ("forward", "encode", "decode"):
        shadow.__dict__.pop(method, None)


@cache
def _on(cls: Any, device: torch.device, *names: str) -> Any:
    """A subclass by the same name that says where it is."""
    told = {name: property(lambda self: device) for name in names or ("device",)}
    names_of = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), told | names_of)
