"""What answers in a rehearsal in place of a network: zeros of the right shapes, in the graph where the network is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .. import blocks
from ..planning.meta import like, map_tensors
from ..residence import Residence
from .calls import PipelineCall

_FEW = 64


def answer(shape: Any, tensors: Sequence[torch.Tensor], reached: Callable[[], None]) -> Any:
    """Zeros shaped like ``shape`` (an output on the meta device), which depend on ``tensors``.

    Args:
        tensors: the call's arguments: held until the backward pass has come by, as those of a real call are.
        reached: called when it does.
    """
    leaves, spec = pytree.tree_flatten(shape)
    graded: list[torch.Tensor] = []

    def collect(x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad:
            graded.append(x)
        return x

    for leaf in leaves:
        map_tensors(leaf, collect)
    sizes = [(x.shape, x.dtype) for x in graded]
    # Where only weights are trained no argument requires grad, and yet the output does.
    anchor = torch.empty(0, requires_grad=True)
    live = iter(_StandIn.apply(reached, list(tensors), sizes, anchor, *tensors) if graded else ())

    def real(x: torch.Tensor) -> torch.Tensor:
        return next(live) if x.requires_grad else torch.zeros(x.shape, dtype=x.dtype)

    return pytree.tree_unflatten([map_tensors(leaf, real) for leaf in leaves], spec)


class _StandIn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        reached: Callable[[], None],
        held: Any,
        sizes: Any,
        anchor: torch.Tensor,
        *tensors: torch.Tensor,
    ) -> Any:
        ctx.reached, ctx.held = reached, held
        ctx.like = [(t.shape, t.dtype) if t.requires_grad else None for t in tensors]
        return tuple(torch.zeros(shape, dtype=dtype) for shape, dtype in sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.reached()
        ctx.held = None
        zeros = [None if size is None else torch.zeros(size[0], dtype=size[1]) for size in ctx.like]
        return None, None, None, None, *zeros


def template(out: Any) -> Any:
    """An output's shapes and flags, without its graph."""
    return pytree.tree_map(lambda x: map_tensors(x, _bare), out)


def _bare(x: torch.Tensor) -> torch.Tensor:
    return like(x.detach()).requires_grad_(x.requires_grad)


def meta_leaves(leaves: Sequence[Any]) -> list[Any]:
    """Arguments on the meta device, cut from the graph they come from."""
    return [_bare(x) if isinstance(x, torch.Tensor) else x for x in leaves]


def alike(leaf: Any) -> Any:
    """What arguments of equal calls have in common."""
    return (leaf.shape, leaf.dtype, leaf.requires_grad) if isinstance(leaf, torch.Tensor) else None


def rows(leaves: Sequence[Any], shape: Any) -> int:
    """The leading dimension that the first argument with more than one dimension and all outputs share; else 1."""
    first = next((x for x in leaves if isinstance(x, torch.Tensor) and x.dim() > 1), None)
    outputs = [x for x in pytree.tree_leaves(shape) if isinstance(x, torch.Tensor)]
    if first is None or not outputs or any(x.dim() == 0 or len(x) != len(first) for x in outputs):
        return 1
    return len(first)


def stand_in_call(call: PipelineCall) -> None:
    """Put a user's arguments on the CPU: large tensors as zeros, generators as new ones, callbacks left out."""
    for name, value in list(call.bound.arguments.items()):
        if name.startswith("callback"):
            del call.bound.arguments[name]
        elif name not in ("self", "state") and value is not call.bound.args[0]:
            call.bound.arguments[name] = pytree.tree_map(_stand_in_argument, value)
        elif name == "state" and hasattr(value, "values"):  # of a modular pipeline
            state = call.bound.arguments[name] = copy.copy(value)
            state.values = pytree.tree_map(_stand_in_argument, dict(value.values))


def zeros_like(tensor: torch.Tensor) -> torch.Tensor:
    """Zeros on the CPU, with the same flag."""
    return torch.zeros(tensor.shape, dtype=tensor.dtype).requires_grad_(tensor.requires_grad)


def _stand_in_argument(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return torch.Generator()
    if not isinstance(value, torch.Tensor):
        return value
    if value.is_floating_point() and value.numel() > _FEW:
        return zeros_like(value)
    # Numbers that a loop may look at: a scale, a row of times.
    return value.detach().to("cpu", copy=True).requires_grad_(value.requires_grad)


@contextmanager
def tiling(module: nn.Module, tiled: bool, residence: Residence | None = None) -> Iterator[None]:
    """A decoder in tiles, each redone alone."""
    if not tiled:
        yield
        return
    inner: Any = module.decoder
    before, module.use_tiling = module.use_tiling, True  # type: ignore[assignment]
    blocks.wrap("decoder", inner, residence=residence)
    try:
        yield
    finally:
        module.use_tiling = before
        blocks.unwrap(inner)
