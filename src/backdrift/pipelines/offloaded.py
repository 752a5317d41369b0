"""``enable_model_cpu_offload()``: networks wait on the CPU, each is on the device while it is called.

diffusers does it with accelerate's hooks, which move the user's modules. A run leaves those alone: its shadow networks
lie on the CPU with the user's, and have copies on the device while their phase lasts (:mod:`~backdrift.residence`), in
backward passes too.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError
from ..residence import Residence, Turns
from .refusals import waits
from .rehearsal import role_of
from .shadow import networks


def execution_device(pipe: Any) -> torch.device | None:
    """Where the calls of an offloaded pipeline run; None for one that is not offloaded."""
    for module in networks(pipe).values():
        hook = module.__dict__.get("_hf_hook")
        if hook is not None and waits(hook):
            # As tensors there name it: a copy to "cpu:0" or "cuda" of what lies there already would add to the graph.
            return torch.empty(0, device=hook.execution_device).device
    return None


class Offloading:
    """The residences of one call of a pipeline. When the block around it ends, all are sent home.

    Args:
        pipe: the user's pipeline.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        device = execution_device(pipe)
        self.turns = None if device is None else Turns(device)
        self._shadows: list[nn.Module] = []
        self._waiting = {key for key, module in networks(pipe).items() if "_hf_hook" in module.__dict__}

    def residence(self, name: str, module: nn.Module) -> Residence | None:
        """Of a shadow network; None for one that stays on the device."""
        if self.turns is None or name not in self._waiting:
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
        return Residence(module, name if role == "other" else role, self.turns)

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
