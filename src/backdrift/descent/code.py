"""What a function computes, as a fingerprint: a run is not continued, nor returned, for a loss that was edited since.

A name is not enough: every lambda is called ``<lambda>``, a function keeps its name when its body changes, and one with
the same body closes over another target. So its code counts, with its defaults, what it closes over, and the functions
and plain values of its own module that it names. Positions, file names and comments do not.
"""

from __future__ import annotations

import functools
import hashlib
import json
import types
from typing import Any

import torch
from torch import Tensor, nn

from .subject import describe_tensors, describe_value

__all__ = ["code_settings", "describe_code", "describe_function"]

_PLAIN = (str, bytes, bool, int, float, complex, type(None))
_DEPTH = 6


def describe_code(module: nn.Module) -> str | None:
    """A fingerprint of the user's own code in a loss; None for one that is made of this package's losses only.

    Args:
        module: the loss; its weights and buffers are not looked at (:func:`~.subject.describe_tensors` tells those).
    """
    found = []
    for part in module.modules():
        function = getattr(part, "function", None)
        if callable(function):
            found.append(describe_function(function))
        elif _is_users(type(part)):
            found.append(_of_module(part, set(), _DEPTH))
    if not found:
        return None
    return _digest(found)


def describe_function(function: Any) -> str:
    """A fingerprint of a callable: function, method, partial, module, or object that can be called."""
    return _digest(_described(function, set(), _DEPTH))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _is_users(kind: type) -> bool:
    return kind.__module__.partition(".")[0] not in ("backdrift", "torch", "transformers", "torchvision")


def _described(value: Any, seen: set[int], depth: int) -> Any:
    """A JSON value that differs where what ``value`` computes differs, as far as that can be seen."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if depth == 0 or id(value) in seen:
        return type(value).__qualname__
    seen = seen | {id(value)}

    def inner(item: Any) -> Any:
        return _described(item, seen, depth - 1)

    if isinstance(value, types.FunctionType):
        return _of_function(value, inner)
    if isinstance(value, types.MethodType):
        return [inner(value.__func__), inner(value.__self__)]
    if isinstance(value, functools.partial):
        return [
            inner(value.func),
            [inner(a) for a in value.args],
            {k: inner(v) for k, v in value.keywords.items()},
        ]
    if isinstance(value, nn.Module):
        return _of_module(value, seen, depth)
    if isinstance(value, list | tuple):
        return [inner(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(inner(item)) for item in value)
    if isinstance(value, dict):
        return {repr(key): inner(item) for key, item in value.items()}
    if isinstance(value, types.ModuleType | types.BuiltinFunctionType | type):
        return getattr(value, "__qualname__", value.__name__)
    if isinstance(value, Tensor) or not hasattr(value, "__dict__") or not _is_users(type(value)):
        return describe_value(value)
    return [_of_class(type(value), inner), {key: inner(item) for key, item in sorted(vars(value).items())}]


def _of_function(function: types.FunctionType, inner: Any) -> Any:
    closed = []
    for cell in function.__closure__ or ():
        try:
            closed.append(inner(cell.cell_contents))
        except ValueError:  # not filled yet
            closed.append("")
    home = function.__globals__
    named = {name: home[name] for name in sorted(_names(function.__code__)) if name in home}
    # Of its module: other functions there, and settings. Other packages are told by their versions.
    outside = {
        name: inner(value)
        for name, value in named.items()
        if isinstance(value, (*_PLAIN, Tensor, tuple))
        or (isinstance(value, types.FunctionType) and value.__globals__ is home)
    }
    defaults = [inner(item) for item in (function.__defaults__ or ())]
    keywords = {key: inner(item) for key, item in (function.__kwdefaults__ or {}).items()}
    return [_of_code(function.__code__), closed, outside, defaults, keywords]


def _names(code: types.CodeType) -> set[str]:
    inner = [_names(item) for item in code.co_consts if isinstance(item, types.CodeType)]
    return set(code.co_names).union(*inner)


def _of_code(code: types.CodeType) -> Any:
    constants = [
        _of_code(item)
        if isinstance(item, types.CodeType)
        else sorted(map(repr, item))
        if isinstance(item, frozenset)  # its order changes from process to process
        else repr(item)
        for item in code.co_consts
    ]
    return [
        code.co_code.hex(),
        list(code.co_names),
        list(code.co_varnames),
        list(code.co_freevars),
        constants,
    ]


def _of_class(kind: type, inner: Any) -> Any:
    """A class of the user's by its methods, those it inherits from the user's own classes included."""
    return [
        {
            name: inner(item)
            for name, item in sorted(vars(cls).items())
            if isinstance(item, types.FunctionType)
        }
        for cls in kind.__mro__
        if cls is not object and _is_users(cls)
    ] or [f"{kind.__module__}.{kind.__qualname__}"]


def _of_module(module: nn.Module, seen: set[int], depth: int) -> Any:
    """A network or loss by its classes and its settings: plain values that it holds."""

    def inner(item: Any) -> Any:
        return _described(item, seen, depth - 1)

    def settings(part: nn.Module) -> dict[str, Any]:
        return {
            key: inner(value)
            for key, value in sorted(vars(part).items())
            if not key.startswith("_")
            and key != "training"
            and isinstance(value, (*_PLAIN, Tensor, tuple, torch.Size))
        }

    parts = [[_of_class(type(part), inner), settings(part)] for part in module.modules()]
    return [parts, describe_tensors(module)]


def code_settings(loss: nn.Module, judge: nn.Module | None = None) -> dict[str, str]:
    """What a run's settings say of the user's own code; nothing where there is none.

    Args:
        loss: what is minimised.
        judge: what decides which pictures are best, if that is another loss.
    """
    parts = {"loss_code": loss, "heldout_code": judge}
    found = {name: describe_code(part) for name, part in parts.items() if part is not None}
    return {name: value for name, value in found.items() if value is not None}
