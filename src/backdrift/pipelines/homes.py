"""Where the weights of an offloaded network lie, and for whose calls they would be moved.

diffusers offers three ways. ``enable_model_cpu_offload()`` moves whole networks, which lie on the CPU as they are.
``enable_sequential_cpu_offload()`` keeps the weights in a table beside the network, whose own tensors are on the meta
device, and puts them in for the length of each layer's call. Group offloading exchanges the data of a layer's or a
block's weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..residence import Part, Slot, layers, slots_of

__all__ = ["MOVING", "Way", "execution_device_of", "homes_of", "named_weights", "parts_of", "way_of"]

Way = Literal["model", "sequential", "group"]
#: diffusers' hooks that move weights.
MOVING = {"group_offloading", "lazy_prefetch_group_offloading", "layer_execution_tracker"}


def accelerate_hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks on one module, those in a sequence one by one."""
    found = [module.__dict__["_hf_hook"]] if "_hf_hook" in module.__dict__ else []
    for hook in found:  # grows
        found += getattr(hook, "hooks", ())
    return [hook for hook in found if not hasattr(hook, "hooks")]


def group_hook(module: nn.Module) -> Any:
    """diffusers' hook on one module that moves a group of weights; None without one."""
    registry = module.__dict__.get("_diffusers_hook")
    return None if registry is None else registry.hooks.get("group_offloading")


def way_of(module: nn.Module) -> Way | None:
    """How a network is offloaded; None if it is not."""
    if any(_is(hook, "CpuOffload") for hook in accelerate_hooks(module)):
        return "model"
    for child in module.modules():
        if group_hook(child) is not None:
            return "group"
        if any(is_sequential(hook) for hook in accelerate_hooks(child)):
            return "sequential"
    return None


def is_model_wide(hook: Any) -> bool:
    """Whether one of accelerate's hooks is that of ``enable_model_cpu_offload()``: the whole network waits."""
    return _is(hook, "CpuOffload")


def is_sequential(hook: Any) -> bool:
    """Whether one of accelerate's hooks puts weights in for the length of a call."""
    return _is(hook, "AlignDevicesHook") and bool(hook.offload)


def is_idle(hook: Any) -> bool:
    """Whether one of accelerate's hooks moves no weights: it brings results back to where arguments came from."""
    return _is(hook, "AlignDevicesHook") and not hook.offload and hook.execution_device is None


def _is(hook: Any, name: str) -> bool:
    return type(hook).__module__.startswith("accelerate.") and type(hook).__name__ == name


def execution_device_of(module: nn.Module) -> torch.device | None:
    """Where the calls of an offloaded network run; None for one that is not offloaded."""
    for child in module.modules():
        hook = group_hook(child)
        if hook is not None:
            return _as_tensors_name_it(hook.config.onload_device)
        for hook in accelerate_hooks(child):
            if is_sequential(hook) or _is(hook, "CpuOffload"):
                return _as_tensors_name_it(hook.execution_device)
    return None


def _as_tensors_name_it(device: Any) -> torch.device:
    # A copy to "cpu:0" or "cuda" of what lies there already would add to the graph.
    return torch.empty(0, device=device).device


def table_of(hook: Any) -> tuple[Mapping[str, Any] | None, str]:
    """The table in memory that a hook of sequential offloading takes weights from, and what its module's names begin
    with there; None if the weights are elsewhere (on a disk)."""
    table, prefix = hook.weights_map, ""
    while hasattr(table, "dataset") and hasattr(table, "prefix"):
        table, prefix = table.dataset, table.prefix + prefix
    if hasattr(table, "index") and hasattr(table, "state_dict"):  # accelerate's table with a folder beside it
        table = None if table.index else table.state_dict
    return (table, prefix) if isinstance(table, Mapping) else (None, prefix)


def homes_of(module: nn.Module) -> dict[int, Tensor]:
    """What the tensors of a network on the meta device stand for, by their ``id``: one tensor for all names of a weight
    that has several."""
    found: dict[int, Tensor] = {}
    shared: dict[Any, Tensor] = {}
    for child in module.modules():
        for hook in filter(is_sequential, accelerate_hooks(child)):
            table, prefix = table_of(hook)
            for name, tensor in _tensors(child, hook.place_submodules):
                home = None if table is None or not tensor.is_meta else table.get(f"{prefix}{name}")
                if home is not None:
                    place = (home.data_ptr(), home.dtype, home.shape, home.stride())
                    found[id(tensor)] = shared.setdefault(place, home)
    return found


def _tensors(module: nn.Module, inside: bool) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=inside)
    yield from module.named_buffers(recurse=inside)


def named_weights(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Names and parameters of a network, and whether they require grad.

    In place of a parameter on the meta device stands what it stands for: a plain tensor.
    """
    homes = homes_of(module)
    for name, parameter in module.named_parameters():
        home = homes.get(id(parameter), parameter)
        yield name, home, parameter.requires_grad or home.requires_grad


def _held(slot: Slot) -> Tensor:
    table: dict[str, Any] = slot.holder._buffers if slot.is_buffer else slot.holder._parameters
    held: Tensor = table[slot.name]
    return held


def parts_of(original: nn.Module, ours: nn.Module, way: Way) -> list[Part]:
    """What is on the device for the calls of which module of a shadow, as the user's network has it.

    Of a group of several blocks each is there for its own calls.
    """
    if way != "group":
        return layers(ours)
    mine = dict(zip(original.modules(), ours.modules(), strict=True))
    slots: dict[int, list[Slot]] = {}  # a weight may have several
    for theirs, slot in zip(slots_of(original), slots_of(ours), strict=True):
        slots.setdefault(id(_held(theirs)), []).append(slot)
    found = []
    for child, around in mine.items():
        hook = group_hook(child)
        if hook is None:
            continue
        group = hook.group
        inside = [child] if child in group.modules else list(group.modules)
        own = slots_of(*(mine[module] for module in inside))
        own += [slot for tensor in (*group.parameters, *group.buffers) for slot in slots.get(id(tensor), ())]
        if own:
            found.append(Part(around, own))
    return found
