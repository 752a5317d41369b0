"""Gradients of the tensors that many calls share (weights, conditioning), added up in place: one buffer each.

A vector–Jacobian product hands each shared tensor's gradient to a hook as soon as it is complete; the hook adds it to
the buffer and lets go of it. So beside the buffers no more than one such gradient exists at a time: nothing of the
weights' size lies in an ODE's state, and a half-precision network's gradients are summed in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .findings import Findings


class Sums:
    """Running sums of the gradients of ``shared[i]`` for each i in ``wanted``; dense, also where those are sparse.

    Attributes:
        buffers: in the order of ``wanted``; None until a first gradient arrives.
    """

    def __init__(self, shared: Sequence[Tensor], wanted: Sequence[int], findings: Findings | None) -> None:
        self.wanted = list(wanted)
        self.buffers: list[Tensor | None] = [None] * len(self.wanted)
        self._dtypes = [_sum_dtype(shared[i].dtype) for i in self.wanted]
        self._findings = findings
        self._place = {index: place for place, index in enumerate(self.wanted)}

    def add(self, place: int, grad: Tensor) -> None:
        """Add to the sum at a place of ``wanted``."""
        if self._findings is not None:
            self._findings.see(self._findings.shared_quantity, grad)
        buffer = self.buffers[place]
        if buffer is None:
            # A copy of its own: the engine may give one tensor to two leaves.
            self.buffers[place] = grad.to(self._dtypes[place], copy=True)
        else:
            buffer.add_(grad)

    def alike(self) -> Sums:
        """Sums of the same tensors, nothing in them yet."""
        made = copy.copy(self)
        made.clear()
        return made

    def clear(self) -> None:
        """Forget all that was added."""
        self.buffers = [None] * len(self.wanted)

    def gather(self, other: Sums, factor: float) -> None:
        """Add ``factor`` times the sums of the same tensors."""
        for place, found in enumerate(other.buffers):
            own = self.buffers[place]
            if own is not None and found is not None:
                own.add_(found, alpha=factor)
            elif found is not None:
                self.buffers[place] = found * factor

    @contextmanager
    def collecting(self, leaves: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Inside the block the gradients of the wanted ones among ``leaves`` go to the sums, and nowhere else.

        A user's hooks on a weight belong to the finished gradient, so they are off for the while.

        Args:
            leaves: all shared tensors, or their stand-ins, in order.

        Yields:
            The wanted leaves: inputs to differentiate by. What comes back for them is zeros without memory.
        """
        chosen = [leaves[i] for i in self.wanted]
        hooks = [leaf._backward_hooks for leaf in chosen]
        try:
            for place, leaf in enumerate(chosen):
                leaf._backward_hooks = None
                leaf.register_hook(self._taking(place))
            yield chosen
        finally:
            for leaf, before in zip(chosen, hooks, strict=True):
                leaf._backward_hooks = before

    def _taking(self, place: int):  # type: ignore[no-untyped-def]
        def take(grad: Tensor) -> Tensor:
            with torch.no_grad():
                self.add(place, grad.to_dense() if grad.is_sparse else grad)
            if grad.is_sparse:  # an embedding's; a hook may not change the layout
                return torch.zeros_like(grad)
            return grad.new_zeros(()).expand(grad.shape)

        return take


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype
