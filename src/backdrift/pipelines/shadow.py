"""Shadow networks: the user's modules once more, on the same weights, with flags, modes and adapters of their own.

A run must not touch the user's ``requires_grad`` flags, and its redone calls must see the flags, modes and
adapters of the first ones, whatever the user does to the modules meanwhile. So it calls copies: structure and
settings are copied, the storage of every weight and buffer is shared. Trained weights are the user's own
Parameter objects, so their gradients arrive where the optimizer looks.
"""

from __future__ import annotations

import copy
import difflib
import fnmatch
import functools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import InputError, UnsupportedError
from ..weights import adapter_layers
from .homes import MOVING, homes_of, named_weights

_PLAIN = {bool, int, float, str, torch.dtype, torch.device, torch.Size, type}
_EMPTY = {dict, OrderedDict, set, list, tuple}
Train = str | Sequence[str] | None


def networks(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's networks by attribute name, but for the safety checker; without wrappers around them."""
    return {
        key: unwrapped(value)
        for key, value in vars(pipe).items()
        if isinstance(value, nn.Module) and key != "safety_checker"
    }


def unwrapped(module: nn.Module) -> nn.Module:
    """The network inside ``torch.compile``'s and ``DistributedDataParallel``'s wrappers."""
    inner: Any = module
    while True:
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif isinstance(inner, nn.parallel.DistributedDataParallel):
            inner = inner.module
        else:
            return inner


def trained_parameters(pipe: Any, train: Train) -> dict[str, torch.Tensor]:
    """The parameters that ``train`` names, by dotted name (``"unet.conv_in.weight"``).

    After ``pipe.enable_sequential_cpu_offload()`` these are the tensors in accelerate's table, which get
    ``requires_grad`` and their gradients: the network's own Parameters are on the meta device.

    Args:
        pipe: a diffusers pipeline.
        train: None for none; or one or more of: a component's name; ``"lora"``, every LoRA weight of the
            active adapters in every component, text encoders included; a pattern (`fnmatch`) of dotted names.

    Raises:
        InputError: an entry names nothing, or only weights with ``requires_grad=False``.
        UnsupportedError: ``"lora"`` with adapters that are fused into the weights.
    """
    parts = networks(pipe)
    named: dict[str, torch.Tensor] = {}
    graded: set[str] = set()
    for key, module in parts.items():
        for name, weight, requires_grad in named_weights(module):
            named[f"{key}.{name}"] = weight
            graded |= {f"{key}.{name}"} if requires_grad else set()
    chosen: dict[str, torch.Tensor] = {}
    entries = [] if train is None else [train] if isinstance(train, str) else list(train)
    for entry in entries:
        if entry in parts:
            found = {name: p for name, p in named.items() if name.startswith(f"{entry}.")}
        elif entry == "lora":
            found = {name: named[name] for name in lora_names(parts)}
        else:
            found = {name: p for name, p in named.items() if fnmatch.fnmatchcase(name, entry)}
        if not found:
            raise InputError(_names_nothing(entry, list(parts), list(named)))
        training = {name: p for name, p in found.items() if name in graded}
        if not training:
            raise InputError(
                f"train={entry!r} names {len(found)} weights (first: {next(iter(found))}), all with "
                "requires_grad=False; call requires_grad_(True) on what you want to train"
            )
        chosen |= training
    for weight in chosen.values():
        if not weight.requires_grad:
            weight.requires_grad_()
    return chosen


def _names_nothing(entry: str, parts: list[str], names: list[str]) -> str:
    if entry == "lora":
        return "train='lora', but the pipeline has no active LoRA adapter; add one, or name a component"
    close = difflib.get_close_matches(entry, parts, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return (
        f"train={entry!r} names no weight{hint}; allowed: a component ({', '.join(parts)}), 'lora', or a "
        f"pattern of names such as {names[0]!r}"
    )


def lora_names(parts: dict[str, nn.Module]) -> Iterator[str]:
    """The dotted names of the active adapters' weights, over all components.

    Raises:
        UnsupportedError: an adapter is fused into the weights.
    """
    layer: Any
    for name, layer in adapter_layers(list(parts.items())):
        if layer.merged_adapters:
            raise UnsupportedError(
                f"train='lora', but the adapter {layer.merged_adapters[0]!r} is fused into {name}, where it "
                "cannot be trained; call pipe.unfuse_lora()"
            )
        for kind in layer.adapter_layer_names:
            for adapter, part in getattr(layer, kind).items():
                if adapter in layer.active_adapters and not layer.disable_adapters:
                    if isinstance(part, nn.Parameter):
                        yield f"{name}.{kind}.{adapter}"
                    else:
                        yield from (f"{name}.{kind}.{adapter}.{leaf}" for leaf, _ in part.named_parameters())


def shadow(module: nn.Module, trained: set[int]) -> nn.Module:
    """A copy of a network on the same weights.

    Args:
        module: the user's network; it is not changed.
        trained: ``id`` of the Parameters that the copy shares as objects; it holds the others frozen.
    """
    # What deepcopy would do, but some thirty times as fast: most of a module is tables and numbers.
    memo: dict[int, Any] = {}
    originals, homes = list(module.modules()), homes_of(module)
    for child in originals:
        memo[id(child)] = child.__class__.__new__(child.__class__)
        for parameter in child._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                memo[id(parameter)] = _weight(homes.get(id(parameter), parameter), trained)
        for buffer in child._buffers.values():
            memo[id(buffer)] = homes.get(id(buffer), buffer)
        for key in ("config", "_internal_dict"):  # read only, and slow to copy
            if key in child.__dict__:
                memo[id(child.__dict__[key])] = child.__dict__[key]
    others: list[tuple[dict[str, Any], str, Any]] = []  # what has to be copied in depth
    for child in originals:
        own = memo[id(child)].__dict__
        skipped = _of_hooks(child)
        for key, value in child.__dict__.items():
            kind = type(value)
            if key in skipped:
                continue
            if value is None or kind in _PLAIN:
                own[key] = value
            elif kind in _EMPTY and not value:
                own[key] = kind()
            elif key in ("_parameters", "_buffers", "_modules"):
                own[key] = {name: None if item is None else memo[id(item)] for name, item in value.items()}
            elif not _copied(own, key, value):
                others.append((own, key, value))
                _share_tensors(value, memo)
        if type(child) is nn.Linear and child.weight.requires_grad and "forward" not in own:
            own["forward"] = functools.partial(_linear, memo[id(child)])
    for own, key, value in others:
        own[key] = copy.deepcopy(value, memo)
    return memo[id(module)]


def _of_hooks(child: nn.Module) -> set[str]:
    """The attributes that hooks have left on a module which move weights: those of the user's, not of a copy."""
    found = {"_hf_hook", "_old_forward", "forward"} if "_hf_hook" in child.__dict__ else set()
    hooks = getattr(child.__dict__.get("_diffusers_hook"), "hooks", {})
    return found | {"_diffusers_hook", "forward"} if hooks and MOVING.issuperset(hooks) else found


def _linear(layer: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    """What ``F.linear`` computes for a weight that requires grad, also when the shadow's does not.

    On an input that is not contiguous (the decoder's attention) matmul folds the batch into the rows only for
    such a weight; otherwise its gradient differs in the last digit from that of the user's own network.
    """
    x, weight, bias = input, layer.weight, layer.bias  # called ``input`` because some networks say so
    if x.dim() < 3 or x.is_contiguous() or weight.requires_grad:
        return nn.functional.linear(x, weight, bias)
    out = torch.mm(x.reshape(-1, x.shape[-1]), weight.t()).view(*x.shape[:-1], weight.shape[0])
    return out if bias is None else out + bias.to(out.dtype)


def _copied(own: dict[str, Any], key: str, value: Any) -> bool:
    """Copy an attribute into ``own`` if that takes no more than its top level."""
    if key.endswith("_hooks") or "_hooks_" in key:
        own[key] = value.copy()
    elif key in ("config", "_internal_dict", "_diffusers_hook") or (
        type(value) is tuple and all(item is None or type(item) in _PLAIN for item in value)
    ):
        own[key] = value
    elif key == "_compiled_call_impl":  # compiled for the user's module
        own[key] = None
    else:
        return False
    return True


def copied_scheduler(scheduler: Any) -> Any:
    """A scheduler of the run's own, with the user's settings. Tensors are shared: schedulers replace them."""
    memo: dict[int, Any] = {}
    _share_tensors(scheduler.__dict__, memo)
    return copy.deepcopy(scheduler, memo)


def _weight(parameter: torch.Tensor, trained: set[int]) -> torch.Tensor:
    frozen_already = not parameter.requires_grad and type(parameter) not in (nn.Parameter, torch.Tensor)
    # Quantised weights are Parameter subclasses with state beside the data; frozen as they are, they can be
    # shared as objects.
    if id(parameter) in trained or frozen_already:
        return parameter
    return nn.Parameter(parameter, requires_grad=False)


def _share_tensors(value: Any, memo: dict[int, Any], depth: int = 3) -> None:
    # Buffers, caches and histories: the same objects in the copy (and tensors with a graph cannot be copied).
    if isinstance(value, torch.Tensor):
        memo.setdefault(id(value), value)
    elif depth and isinstance(value, dict):
        for item in value.values():
            _share_tensors(item, memo, depth - 1)
    elif depth and isinstance(value, list | tuple):
        for item in value:
            _share_tensors(item, memo, depth - 1)
