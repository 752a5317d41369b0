"""Offloaded pipelines: weights wait on the CPU, and are on the device while they are called.

diffusers does it with hooks, which move whole networks, blocks or layers of the user's (:mod:`.homes`). A run leaves
those alone: its shadow networks lie where the user's weights lie at home, and have copies on the device
(:mod:`~backdrift.residence`), in backward passes too.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError
from ..planning.choices import Choices
from ..residence import Residence, Turns, layers
from .homes import execution_device_of, parts_of, way_of
from .rehearsal import role_of
from .shadow import networks

__all__ = ["Offloading", "execution_device"]


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
        self._shadows: list[nn.Module] = []
        self._originals = networks(pipe)

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
        self._shadows.append(module)
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
        if self.turns is not None:
            self.turns.leave()
            for shadow in self._shadows:  # nobody calls it again, and a residence must not be part of a cycle
                for method in ("forward", "encode", "decode"):
                    shadow.__dict__.pop(method, None)
            for hook in getattr(self._pipe, "_all_hooks", []):  # the safety checker is the user's own
                hook.offload()


@cache
def _on(cls: Any, device: torch.device, *names: str) -> Any:
    """A subclass by the same name that says where it is."""
    told = {name: property(lambda self: device) for name in names or ("device",)}
    names_of = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), told | names_of)
