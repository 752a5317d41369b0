"""What a pipeline has made of the user's tensors, for any number of backward passes.

The conditioning and the start of a view have a graph where they were computed from tensors that require grad (a picture
that was encoded, a prompt under a trained text encoder). That graph is the view's own, made once; PyTorch would free it
in the first backward pass. Here it is kept, and gone through again by each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import StateChangedError
from ...versions import version_of

__all__ = ["kept"]


def kept(values: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The same values, on a graph that a backward pass does not free.

    Args:
        values: tensors with a graph.
        inputs: those of the user's that they were computed from, with or without a graph of their own.

    Returns:
        Tensors that are equal to the values. They are the values themselves where these depend on something else that
        requires grad too, which only their own graph knows.

    A backward pass raises :class:`~backdrift.errors.StateChangedError` where such an input has been changed in place.
    """
    own = _ends(values, inputs)
    return list(_Kept.apply(_Graph(values, own), *own)) if own else list(values)


class _Graph:
    """A graph and its ends."""

    def __init__(self, values: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        self.values, self.inputs = list(values), list(inputs)
        self._versions = [version_of(tensor) for tensor in self.inputs]

    def gradients(self, found: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Of the inputs, for gradients ``found`` of the values.

        Raises:
            StateChangedError: an input has been changed in place.
        """
        for tensor, version in zip(self.inputs, self._versions, strict=True):
            if version_of(tensor) != version:
                raise StateChangedError(
                    f"a tensor of shape {tuple(tensor.shape)} that was handed to as_denoiser has been changed in place "
                    "since, and what the view has computed from it is of what it was: make the view again after each "
                    "change"
                )
        ends = [(value, grad) for value, grad in zip(self.values, found, strict=True) if grad is not None]
        if not ends:
            return [None] * len(self.inputs)
        return torch.autograd.grad(
            [value for value, _ in ends],
            self.inputs,
            [grad for _, grad in ends],
            retain_graph=True,
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: _Graph, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.graph = graph  # not saved for the backward pass, which would free it
        ctx.set_materialize_grads(False)
        return tuple(value.detach() for value in graph.values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return None, *ctx.graph.gradients(grads)


def _ends(values: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Those of the inputs at which the paths from the values back end; none if one ends elsewhere."""
    leaves = {id(tensor): tensor for tensor in inputs if tensor.grad_fn is None}
    others = {(tensor.grad_fn, tensor.output_nr): tensor for tensor in inputs if tensor.grad_fn is not None}
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    ahead: list[Any] = [(value.grad_fn, value.output_nr) for value in values]
    while ahead:
        edge = ahead.pop()
        node = edge[0]
        if node is None or edge in seen:
            continue
        seen.add(edge)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in leaves:
            return []
        end = others.get(edge) if leaf is None else leaf
        if end is None:
            ahead += node.next_functions
        else:
            found[id(end)] = end
    return list(found.values())
