"""Code that a user has put into a network: attention processors, and functions in place of a layer's methods.

What cuts the graph, or keeps state that a run cannot follow, is found before a pipeline samples. Functions that only
call layers are followed: a run's shadow network gets them once more, on its own layers. What ``torch.compile`` has
put in place of a method (``vae.decode = torch.compile(vae.decode)``) or around a layer is run uncompiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError
from .quantised import check_quantised
from .refusals import reached
from .shadow import networks
from .twins import is_no_grad, names

_PLAIN = (bool, int, float, str, type, torch.dtype, torch.device, torch.Size)
_CUTS = ("detach", "no_grad", "inference_mode")
# Of positions and tables only, or steps that are taken once, before anything is sampled.
_HARMLESS = {"fuse_projections", "pos_embed", "get_processor", "set_processor"}


def check_networks(pipe: Any) -> None:
    """Refuse a pipeline with an attention processor or layers that cut the graph, or a ``forward`` that keeps state.

    Raises:
        UnsupportedError: naming the layer, the class of what is in the way, and what to do.
    """
    for key, module in networks(pipe).items():
        _check_processors(key, module)
        inside = {id(child) for child in module.modules()}
        for name, _, method, function in patched(module):
            stranger = next(_strangers(function, inside, set()), None)
            if stranger is not None:
                where = ".".join(part for part in (key, name) if part)
                raise UnsupportedError(
                    f"{where} has a {method} of its own that keeps a {type(stranger).__name__}, as DeepCache's do; "
                    f"what it leaves there for the next call would be lost: take it off (del pipe.{where}.{method}, or "
                    "the helper's disable()), or use diffusers' FirstBlockCacheConfig"
                )
    check_quantised(pipe)


def patched(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Any]]:
    """Name, layer, method and function where a function stands in place of a layer's method, hooks' left out.

    Of a compiled function, the one that was compiled.
    """
    for name, child in module.named_modules():
        for method, value in child.__dict__.items():
            if not isinstance(value, FunctionType) or not callable(getattr(type(child), method, None)):
                continue
            if "_hf_hook" in child.__dict__ if method == "forward" else hasattr(nn.Module, method):
                continue  # a hook's; or what moves and saves modules, which accelerate puts warnings around
            yield name, child, method, uncompiled(value)


def uncompiled(function: Any) -> Any:
    """What ``torch.compile`` was given to make ``function``; anything else as it is."""
    while isinstance(function, FunctionType) and hasattr(function, "_torchdynamo_orig_callable"):
        function = function._torchdynamo_orig_callable
    return function


def own_forwards(original: nn.Module, ours: nn.Module) -> None:
    """Point the functions in place of a shadow's methods at the shadow's layers."""
    functions = list(patched(original))
    if functions:
        memo = {id(theirs): mine for theirs, mine in zip(original.modules(), ours.modules(), strict=True)}
        for _, child, method, function in functions:
            setattr(memo[id(child)], method, _rebound(function, memo))


def _strangers(value: Any, inside: set[int], seen: set[int]) -> Iterator[Any]:
    """What a function closes over that is neither a plain value nor one of the network's layers."""
    value = uncompiled(value)
    if value is None or isinstance(value, _PLAIN) or id(value) in inside or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, MethodType):
        yield from _strangers(value.__self__, inside, seen)
    elif isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            yield from _strangers(cell.cell_contents, inside, seen)
    elif isinstance(value, tuple):
        for item in value:
            yield from _strangers(item, inside, seen)
    else:
        yield value


def _rebound(value: Any, memo: dict[int, Any]) -> Any:
    value = uncompiled(value)
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _rebound(value.__self__, memo))
    if isinstance(value, tuple):
        return tuple(_rebound(item, memo) for item in value)
    if not isinstance(value, FunctionType) or not value.__closure__:
        return value
    cells = tuple(CellType(_rebound(cell.cell_contents, memo)) for cell in value.__closure__)
    ours = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
    ours.__kwdefaults__ = value.__kwdefaults__
    return ours


def _check_processors(key: str, module: nn.Module) -> None:
    for name, child in module.named_modules():
        processor: Any = child.__dict__.get("processor", child._modules.get("processor"))
        if processor is None:
            continue
        cls: Any = type(processor)
        for where, cut in _cuts(cls):
            raise UnsupportedError(
                f"{key}.{name} has the attention processor {cls.__name__}, whose {where} uses {cut}: its gradient "
                f"would leave that part out. pipe.{key}.set_default_attn_processor(), or another processor"
            )


@cache
def _cuts(cls: Any) -> tuple[tuple[str, str], ...]:
    start = "forward" if cls.__call__ is nn.Module.__call__ else "__call__"
    return tuple(_found(cls, start))


def _found(cls: Any, start: str) -> Iterator[tuple[str, str]]:
    first = getattr(cls, start, None)
    if not isinstance(first, FunctionType):
        return
    if is_no_grad(first):
        yield start, "no_grad"
    for where, code in reached(cls, start):
        inherited = getattr(nn.Module, where, None)  # what moves or casts a module is torch's own
        if where not in _HARMLESS and (inherited is None or getattr(cls, where, None) is not inherited):
            used = set(names(code))
            yield from ((where, cut) for cut in _CUTS if cut in used)
