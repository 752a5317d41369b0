"""Whether gradients can reach what was handed in: no gradient is lost in silence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.autograd.graph import Node

from ..errors import MissingGradientError


def wanted(arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors among a call's arguments that require grad, lists and dictionaries searched."""
    found: dict[str, torch.Tensor] = {}

    def search(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            if value.requires_grad:
                found[name] = value
        elif isinstance(value, Mapping):
            for key, item in value.items():
                search(f"{name}[{key!r}]", item)
        elif isinstance(value, list | tuple):
            for i, item in enumerate(value):
                search(f"{name}[{i}]", item)

    for name, value in arguments.items():
        search(name, value)
    return found


def check_reached(result: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> None:
    """Walk the graph behind ``result`` until every input has been met.

    Raises:
        MissingGradientError: naming the inputs that it does not lead to.
    """
    missing: dict[Any, str] = {}
    for name, tensor in inputs.items():
        missing[torch.autograd.graph.get_gradient_edge(tensor).node] = name
    stack: list[Node] = [result.grad_fn] if result.grad_fn is not None else []
    seen: set[Node] = set(stack)
    while stack and missing:
        node = stack.pop()
        missing.pop(node, None)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    if missing:
        names = ", ".join(sorted(missing.values()))
        raise MissingGradientError(
            f"no gradient of the pictures would reach {names}: this call does not use it (negative embeddings "
            "without guidance, for example), or cuts it off. Pass it detached if that is meant"
        )
