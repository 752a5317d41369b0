"""What a call's graph reaches: its leaves, what lies outside, and how to name it to the user."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node


def sequence_number() -> int:
    """A number below those of all nodes that this thread makes from now on, above those it made before."""
    with torch.enable_grad():
        node = torch.zeros((), requires_grad=True).view(()).grad_fn
    return node._sequence_nr()  # type: ignore[union-attr]


with torch.enable_grad():
    # The class of the nodes that end in a leaf. A node of a user's own function may have a "variable" too.
    _LEAF = type(torch.zeros((), requires_grad=True).view(()).grad_fn.next_functions[0][0])  # type: ignore[union-attr]


def reach(out: Tensor, floor: int | None) -> tuple[list[Tensor], list[Node]]:
    """Walk the graph behind ``out``.

    Args:
        floor: nodes with a smaller sequence number were made before the call and are not followed; None
            follows everything (numbers of different threads cannot be compared).

    Returns:
        The leaves that gradients would flow to, and the nodes made before the call.
    """
    leaves: list[Tensor] = []
    outside: list[Node] = []
    if out.grad_fn is None:
        return leaves, outside
    seen = {out.grad_fn}
    stack = [out.grad_fn]
    while stack:
        node = stack.pop()
        if type(node) is _LEAF:
            leaves.append(node.variable)  # type: ignore[attr-defined]
            continue
        if floor is not None and node._sequence_nr() < floor:
            outside.append(node)
            continue
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return leaves, outside


def modules_of(network: Any) -> list[tuple[str, nn.Module]]:
    """The modules that a network consists of: itself, or those a plain callable holds."""
    if isinstance(network, nn.Module):
        return [("", network)]
    found = {id(value): (name, value) for name, value in _held(network) if isinstance(value, nn.Module)}
    # A module that lies inside another one of the list is covered by it.
    inner = {id(child) for _, module in found.values() for child in module.modules() if child is not module}
    return [pair for key, pair in found.items() if key not in inner]


def name_of(network: Any, wanted: Tensor | Node) -> str:
    """The name under which the network holds a tensor, or the tensor made by a node; "" if it is not found."""
    for name, value in _held(network):
        candidates: Any = [(name, value)]
        if isinstance(value, nn.Module):
            candidates = ((f"{name}.{n}" if name else n, v) for n, v in _attributes(value))
        for label, tensor in candidates:
            if isinstance(tensor, Tensor) and (tensor is wanted or tensor.grad_fn is wanted):
                return label
    return ""


def describe(holders: Sequence[Any], wanted: Tensor | Node) -> str:
    """A tensor in words, for a message; its name is looked for in the callables ``holders``."""
    name = next(filter(None, (name_of(holder, wanted) for holder in holders)), "")
    if isinstance(wanted, Tensor):
        kind = f"a tensor of shape {tuple(wanted.shape)} that requires grad"
    else:
        metadata = getattr(wanted, "_input_metadata", None)
        shape = f" of shape {tuple(metadata[0].shape)}" if metadata else ""
        kind = f"a tensor{shape} computed outside the network (by {wanted.name()})"
    return f"{name!r}, {kind}," if name else f"{kind} (not found under any name)"


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for prefix, child in module.named_modules():
        for name, value in {**child._parameters, **child._buffers, **vars(child)}.items():
            yield from _unpack(f"{prefix}.{name}" if prefix else name, value)
        # Hooks and replaced forwards are where closed-over tensors hide in a module.
        for hooks in (child._forward_hooks, child._forward_pre_hooks):
            for hook in hooks.values():
                yield from _held(hook, prefix)
        forward = vars(child).get("forward", type(child).forward)
        if isinstance(forward, types.FunctionType | functools.partial):
            yield from _held(forward, prefix)


def _unpack(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    yield name, value
    if isinstance(value, dict):
        yield from ((f"{name}[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, list | tuple):
        yield from ((f"{name}[{i}]", item) for i, item in enumerate(value))


def _held(thing: Any, prefix: str = "", depth: int = 4) -> Iterator[tuple[str, Any]]:
    """Names and values that a callable refers to: its closure, defaults, globals, attributes, parts."""
    if isinstance(thing, nn.Module | Tensor):
        yield prefix, thing
        return
    if depth == 0:
        return
    for name, value in _references(thing):
        label = f"{prefix}.{name}" if prefix else name
        for inner, item in _unpack(label, value):
            if isinstance(item, nn.Module | Tensor):
                yield inner, item
            elif callable(item) and not isinstance(item, type | types.ModuleType) and not _is_torch(item):
                yield from _held(item, inner, depth - 1)


def _is_torch(thing: Any) -> bool:
    return str(getattr(thing, "__module__", "")).partition(".")[0] == "torch"


def _references(thing: Any) -> list[tuple[str, Any]]:
    if isinstance(thing, types.MethodType):
        return [*_references(thing.__func__), ("self", thing.__self__), *_state(thing.__self__)]
    if isinstance(thing, functools.partial):
        arguments = [(f"args[{i}]", value) for i, value in enumerate(thing.args)]
        return [("func", thing.func), *arguments, *thing.keywords.items()]
    if isinstance(thing, types.FunctionType):
        found = []
        for name, cell in zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True):
            try:
                found.append((name, cell.cell_contents))
            except ValueError:  # a cell that is not filled yet
                continue
        found += [
            (name, thing.__globals__[name]) for name in thing.__code__.co_names if name in thing.__globals__
        ]
        defaults = [*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
        return found + [(f"default {i}", value) for i, value in enumerate(defaults)]
    own = vars(type(thing)).get("__call__")
    inside = _references(own) if isinstance(own, types.FunctionType) else []
    return [*_state(thing), *inside]


def _state(thing: Any) -> list[tuple[str, Any]]:
    return list(vars(thing).items()) if hasattr(thing, "__dict__") and not isinstance(thing, type) else []
