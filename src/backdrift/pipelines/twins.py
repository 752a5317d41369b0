"""Twins: a class of diffusers once more, whose code runs with gradients and draws its noise through the run.

Some code cannot be run as it is: blocks of modular pipelines and a few methods are under ``no_grad``, and noise that
a pipeline draws itself cannot be handed in. A twin is a subclass that holds the same functions on globals of their
own, in which ``no_grad`` does nothing and ``randn_tensor`` is :mod:`.draws`'s. Nothing of diffusers is changed.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch

from . import draws

# What a function must mention to be worth a twin.
_MENTIONS = {"no_grad", "randn_tensor", "randn", "randn_like", "full", "tensor", "deepcopy"}


class _Gradients(nullcontext[None]):
    """``no_grad`` without effect: as a context, with or without a call, and as a decorator."""

    def __call__(self, function: Any = None) -> Any:
        return self if function is None else function


class _Torch(ModuleType):
    """``torch`` as the twins see it."""

    no_grad = inference_mode = _Gradients()
    randn = staticmethod(draws.replacing(torch.randn))
    randn_like = staticmethod(draws.replacing(torch.randn_like))
    full = staticmethod(draws.full)
    tensor = staticmethod(draws.tensor)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


_TORCH = _Torch("torch")


@cache
def twin(cls: Any) -> Any:
    """A subclass of ``cls`` by the same name, with its functions on the run's own ``torch`` and ``randn_tensor``."""
    body: dict[str, Any] = {}
    for name in dir(cls):
        held = inspect.getattr_static(cls, name)
        kind = type(held) if isinstance(held, staticmethod | classmethod) else None
        function = held.__func__ if kind is not None else held
        if inspect.isfunction(function) and _worth_a_twin(function):
            ours = on_own_globals(without_no_grad(function))
            body[name] = ours if kind is None else kind(ours)
    body |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls)(cls.__name__, (cls,), {**body, "_backdrift_base": cls})


def without_no_grad(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under a ``torch.no_grad`` decorator; others are returned as they are."""
    while is_no_grad(function):
        function = function.__wrapped__  # type: ignore[attr-defined]
    return function


def is_no_grad(function: Any) -> bool:
    """Whether a function is PyTorch's wrapper of another (``no_grad``, ``inference_mode``, ``enable_grad``)."""
    # The code object tells whose wrapper it is; its other attributes are copied from what it wraps.
    code = getattr(function, "__code__", None)
    file = code.co_filename.replace("\\", "/") if isinstance(code, CodeType) else ""
    return hasattr(function, "__wrapped__") and file.endswith("torch/utils/_contextlib.py")


def on_own_globals(function: Any) -> Any:
    """The same function on a copy of its globals, in which the run's names stand for diffusers'."""
    own = dict(function.__globals__)
    if own.get("torch") is torch:
        own["torch"] = _TORCH
    if callable(own.get("randn_tensor")):
        own["randn_tensor"] = draws.replacing(own["randn_tensor"])
    if own.get("deepcopy") is not None:
        own["deepcopy"] = _copied
    ours = FunctionType(
        function.__code__, own, function.__name__, function.__defaults__, function.__closure__
    )
    for attribute in ("__kwdefaults__", "__qualname__", "__module__", "__doc__", "__annotations__"):
        setattr(ours, attribute, getattr(function, attribute))
    ours.__dict__.update({k: v for k, v in function.__dict__.items() if k != "__wrapped__"})
    return ours


def names(code: CodeType) -> Iterator[str]:
    """The names that a code object mentions, inner functions included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names(constant)


def _copied(value: Any, *memo: Any) -> Any:
    """``deepcopy``, but for the state of a modular pipeline: its tensors stay those that were handed in."""
    if type(value).__name__ != "PipelineState":
        return copy.deepcopy(value, *memo)
    state = copy.copy(value)
    state.values, state.kwargs_mapping = dict(value.values), copy.deepcopy(value.kwargs_mapping)
    return state


def _worth_a_twin(function: Any) -> bool:
    return is_no_grad(function) or not _MENTIONS.isdisjoint(names(function.__code__))
