"""A loss on a few pictures at a time: the same values and gradient, in the memory of those few.

A loss's value for a picture depends on that picture alone (:mod:`backdrift.losses.base`), so a batch can be scored in
parts: each part's values and their gradient by its pictures are computed together, and only these are kept, as many
numbers as the pictures have. The graph of one part is alive at a time. The sum over the batch has

    d sum_j L_j / d x_i = d L_i / d x_i,

so nothing is approximated; kernels may round differently for another number of pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..accelerators import random_numbers_kept, random_states
from ..errors import InputError, MissingGradientError
from .base import Loss, check_images

__all__ = ["InParts", "scored_in_parts"]

#: The values (n,) of the pictures (n, …) whose rows are the slice.
Score = Callable[[Tensor, slice], Tensor]


class InParts(Loss):
    """Any loss, evaluated on a few pictures at a time.

    Handed to :func:`~backdrift.differentiable` as ``loss=`` it tells the planner that its user scores with it, so that
    a budget may be met by scoring in parts: ``size`` is then set from the plan of each call. The pictures' gradient is
    computed along with the values; there is no second derivative, and no gradient by the loss's own weights.

    Args:
        loss: as for :func:`backdrift.losses.resolve`: a spec string, a callable, or a weighted sum.
        size: how many pictures at a time; None: all at once.
        heldout: another loss that its user scores the same pictures with, without a gradient: a budget leaves room for
            it. It is not called here.

    Attributes:
        size: the same; may be changed between calls.

    Raises:
        InputError: ``loss`` or ``size`` cannot be used; or, from a call in parts, the loss mixes pictures or draws
            random numbers, so that parts would give other values.
        MissingGradientError: from a call in parts, weights of the loss require grad.

    Example:
        >>> loss = bd.losses.InParts("clip:a blue two")
        >>> with bd.differentiable(pipe, memory="8GiB", loss=loss) as run:
        ...     images = pipe(["a red two"] * 4, num_inference_steps=31, latents=noise).images
        >>> loss(images).sum().backward()  # on as many pictures at a time as run.plan says
    """

    def __init__(self, loss: Any, size: int | None = None, heldout: Any = None) -> None:
        super().__init__()
        from .spec import resolve

        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise InputError(f"size={size!r} must be a whole number of pictures, at least 1, or None for all")
        self.loss = resolve(loss)
        self.heldout = None if heldout is None else resolve(heldout)
        self.size = size
        self.spec = self.loss.spec
        self._checked = False

    def forward(self, images: Tensor, prompts: Any = None) -> Tensor:
        check_images(images)
        each = [prompts] * len(images) if isinstance(prompts, str) else prompts
        if each is not None and len(each) == 1:
            each = list(each) * len(images)

        def score(part: Tensor, rows: slice) -> Tensor:
            return self.loss(part, None if each is None else each[rows])

        if self.size is None or self.size >= len(images) or (each is not None and len(each) != len(images)):
            return self.loss(images, prompts)
        check = not self._checked
        self._checked = True
        return scored_in_parts(score, images, self.size, check=check, strict=True)


def scored_in_parts(
    score: Score,
    images: Tensor,
    size: int,
    *,
    check: bool = True,
    strict: bool = False,
    name: str = "loss",
) -> Tensor:
    """The values (N,) of pictures (N, …), ``size`` of them at a time; differentiable once, by the pictures.

    Args:
        score: called as ``score(images[rows], rows)`` for one slice after the other.
        images: of any dtype; the gradient has the same.
        size: 1 or more.
        check: see first, on two pictures and without a graph, that parts have the values of the whole.
        strict: whether other tensors that require grad (the loss's own weights) are an error.
        name: of the loss, for messages.

    Raises:
        InputError: parts have other values than the whole.
        MissingGradientError: with ``strict``, another tensor that requires grad is used.
    """
    if check and len(images) > 1:
        _check_apart(score, images, name)
    graded = torch.is_grad_enabled() and images.requires_grad
    pieces: list[Tensor] = []
    pull = torch.zeros_like(images) if graded else None
    depends = False
    for start in range(0, len(images), size):
        rows = slice(start, min(start + size, len(images)))
        part = images[rows].detach().requires_grad_(graded)
        with torch.set_grad_enabled(graded):
            values = score(part, rows)
        if pull is not None and values.requires_grad:
            if strict and start == 0:
                _check_leaves(values, part)
            (found,) = torch.autograd.grad(values.sum(), part, allow_unused=True)
            if found is not None:
                depends = True
                pull[rows] = found
        pieces.append(values.detach())
        del values
    whole = torch.cat(pieces)
    return _Pulled.apply(images, whole, pull) if depends else whole


class _Pulled(torch.autograd.Function):
    """Values whose gradient by the pictures is known: row i of ``pull`` is that of value i."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, values: Tensor, pull: Tensor) -> Tensor:
        ctx.save_for_backward(pull)
        return values.view_as(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (pull,) = ctx.saved_tensors
        return pull * grad.to(pull.dtype).reshape(-1, *[1] * (pull.dim() - 1)), None, None


def _check_apart(score: Score, images: Tensor, name: str) -> None:
    """Two pictures together and one by one: the same values, and no random numbers drawn."""
    two = images[:2].detach()
    with torch.no_grad(), random_numbers_kept():
        before = random_states([two.device])
        together = score(two, slice(0, 2))
        drawn = any(not torch.equal(a, b) for a, b in zip(before, random_states([two.device]), strict=True))
        apart = torch.cat([score(two[i : i + 1], slice(i, i + 1)) for i in (0, 1)])
    close = torch.allclose(
        apart, together, rtol=1e-2, atol=1e-3 * float(together.abs().max()), equal_nan=True
    )
    if drawn or not close:
        why = (
            "draws random numbers, other ones for parts of a batch"
            if drawn
            else f"mixes pictures (two together: {together.tolist()}, one by one: {apart.tolist()})"
        )
        raise InputError(
            f"The {name} cannot be evaluated on a few pictures at a time, which the memory plan asks for: it {why}. "
            "Give it a larger budget (memory=), a smaller batch, or a loss of each picture alone"
        )


def _check_leaves(values: Tensor, part: Tensor) -> None:
    """Nothing but the pictures is waiting for a gradient."""
    seen: set[Any] = set()
    stack = [values.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and leaf is not part:
            raise MissingGradientError(
                f"a tensor of the loss of shape {tuple(leaf.shape)} requires grad, and would get none where pictures "
                "are scored a few at a time: loss.requires_grad_(False), or score them all at once"
            )
        stack += [following for following, _ in node.next_functions]
