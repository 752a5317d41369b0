"""What one call of a network needs, measured on the meta device: no weights, no arithmetic, the real module's code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .count import Count, FusedAttention

__all__ = ["Profile", "profile"]


@dataclass(frozen=True)
class Profile:
    """Bytes and arithmetic of one call. Weights, arguments and the gradients of weights are left out.

    Attributes:
        saved: what stays for the backward pass.
        forward: the most while it runs, ``saved`` included.
        backward: the most while it is differentiated, ``saved`` included.
        forward_flops, backward_flops: floating-point operations; with blocks that are redone, those too.
    """

    saved: int = 0
    forward: int = 0
    backward: int = 0
    forward_flops: int = 0
    backward_flops: int = 0

    def part(self, parts: int) -> Profile:
        """One of ``parts`` equal slices of the batch: all of it is in proportion to the rows."""
        return Profile(*(-(-getattr(self, name) // parts) for name in self.__dataclass_fields__))


def profile(
    call: Callable[[], Any],
    leaves: Sequence[torch.Tensor],
    on_output: Callable[[Any], None] = lambda out: None,
) -> Profile:
    """Run ``call`` and its backward pass on the meta device.

    Args:
        call: without arguments; its tensors are on the meta device.
        leaves: what gets gradients: inputs and weights. Each gradient is let go as soon as it is complete.
        on_output: sees what the call returned.
    """
    count = Count()
    handles = [
        leaf.register_post_accumulate_grad_hook(_forget)
        for leaf in leaves
        if leaf.requires_grad and leaf.is_leaf
    ]
    try:
        with count, FusedAttention():
            out = call()
            forward, forward_flops = count.peak, count.flops
            count.paused = True
            on_output(out)
            root = _root(out)
            count.paused = False
            del out
            if root is None:
                return Profile(0, forward, 0, forward_flops, 0)
            saved = count.live
            count.reset_peak()
            _backward(root)
            count.settle()
            return Profile(saved, forward, count.peak, forward_flops, count.flops - forward_flops)
    finally:
        for handle in handles:
            handle.remove()


def _backward(root: torch.Tensor) -> None:
    # What root.backward() does, but for switching function modes off: blocks are redone in here.
    engine = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (root,), (root.detach(),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _forget(leaf: torch.Tensor) -> None:
    leaf.grad = None


def _root(out: Any) -> torch.Tensor | None:
    """One number behind all outputs that have a graph, which holds none of them."""
    tensors = [
        t
        for t in pytree.tree_leaves(out)
        if isinstance(t, torch.Tensor) and t.requires_grad and t.grad_fn is not None
    ]
    return _Root.apply(*tensors) if tensors else None


class _Root(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: torch.Tensor) -> torch.Tensor:
        # Made where nothing is counted: the caller's own graph counts the gradient that comes in.
        ctx.grads = [torch.empty_like(t) for t in tensors]
        return torch.empty((), device="meta")

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        grads, ctx.grads = ctx.grads, None
        return tuple(grads)
