"""What one call of a network needs, measured on the meta device: no weights, no arithmetic, the real module's code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..residence import Turns
from .count import Count, FusedAttention

__all__ = ["Guests", "Profile", "Streamed", "profile"]


@dataclass(frozen=True)
class Streamed:
    """What one call needs more where its weights come and go layer by layer.

    Attributes:
        forward, backward: bytes on top of the call's own peaks.
        largest: the most bytes of weights at any time.
        forward_moved, backward_moved: bytes of weights that are brought; with blocks that are redone, those too.
    """

    forward: int = 0
    backward: int = 0
    largest: int = 0
    forward_moved: int = 0
    backward_moved: int = 0


@dataclass(frozen=True)
class Profile:
    """Bytes and arithmetic of one call. Weights, arguments and the gradients of weights are left out.

    Attributes:
        saved: what stays for the backward pass.
        forward: the most while it runs, ``saved`` included.
        backward: the most while it is differentiated, ``saved`` included.
        forward_flops, backward_flops: floating-point operations; with blocks that are redone, those too.
        streamed: what is needed more where weights come and go.
    """

    saved: int = 0
    forward: int = 0
    backward: int = 0
    forward_flops: int = 0
    backward_flops: int = 0
    streamed: Streamed = Streamed()

    def part(self, parts: int) -> Profile:
        """One of ``parts`` equal slices of the batch: all of it is in proportion to the rows, but for weights."""
        if parts == 1:
            return self

        def share(n: int) -> int:
            return -(-n // parts)

        largest = self.streamed.largest  # the peak may be where the largest layer is
        return Profile(
            share(self.saved),
            share(self.forward),
            share(self.backward),
            share(self.forward_flops),
            share(self.backward_flops),
            replace(self.streamed, forward=largest, backward=largest),
        )


class Guests(Turns):
    """A device on which copies of weights are counted, as they come and go in a call that is measured."""

    def __init__(self) -> None:
        super().__init__(torch.device("meta"))
        self.count: Count | None = None

    def _loaded(self, home: torch.Tensor) -> torch.Tensor:
        count = self.count
        if count is None:
            return super()._loaded(home)
        before, count.paused = count.paused, True
        try:
            copy = super()._loaded(home)
        finally:
            count.paused = before
        count.admit(copy.untyped_storage())
        return copy


def profile(
    call: Callable[[], Any],
    leaves: Sequence[torch.Tensor],
    on_output: Callable[[Any], None] = lambda out: None,
    guests: Guests | None = None,
) -> Profile:
    """Run ``call`` and its backward pass on the meta device.

    Args:
        call: without arguments; its tensors are on the meta device.
        leaves: what gets gradients: inputs and weights. Each gradient is let go as soon as it is complete.
        on_output: sees what the call returned.
        guests: where the copies of the weights come and go, if they do.
    """
    count = Count()
    handles = [
        leaf.register_post_accumulate_grad_hook(_forget)
        for leaf in leaves
        if leaf.requires_grad and leaf.is_leaf
    ]
    try:
        if guests is not None:
            guests.count = count
        with count, FusedAttention():
            with nullcontext() if guests is None else guests.saving():
                out = call()
            forward, forward_flops = count.peak, count.flops
            streamed = Streamed(count.together - count.peak, 0, count.largest, count.moved, 0)
            count.paused = True
            on_output(out)
            root = _root(out)
            count.paused = False
            del out
            if root is None:
                return Profile(0, forward, 0, forward_flops, 0, streamed)
            saved = count.live
            count.reset_peak()
            _backward(root)
            count.settle()
            streamed = Streamed(
                streamed.forward,
                count.together - count.peak,
                max(streamed.largest, count.largest),
                streamed.forward_moved,
                count.moved - streamed.forward_moved,
            )
            return Profile(saved, forward, count.peak, forward_flops, count.flops - forward_flops, streamed)
    finally:
        if guests is not None:
            guests.count = None
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
