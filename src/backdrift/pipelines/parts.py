"""A call in parts: its rows one slice after the other, the results put together again.

What a network computes for one row does not depend on the others, so the result is the same but for rounding: kernels
may sum in another order for another number of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .. import blocks
from ..planning.choices import Choices
from ..residence import Residence


def divide(module: nn.Module, role: str, choices: Choices, residence: Residence | None = None) -> None:
    """Make the parts of a network of the run's own redo themselves, and its decoder work in tiles, as chosen."""
    blocks.install(module, choices.decoder if role == "decoder" else choices.network, residence)
    inner = getattr(module, "decoder", None)
    if (
        role == "decoder"
        and choices.decode == "tiles"
        and hasattr(module, "use_tiling")
        and inner is not None
    ):
        module.use_tiling = True  # type: ignore[assignment]
        blocks.wrap("decoder", inner, residence=residence)


def parts_of(role: str, choices: Choices, args: Any, kwargs: Any) -> int:
    """In how many parts a call is made."""
    if role == "network" and choices.guidance == "apart":
        return 2
    if role == "decoder" and choices.decode == "sample":
        return rows_of(pytree.tree_leaves((args, kwargs)))
    return 1


def rows_of(leaves: list[Any]) -> int:
    """The leading dimension of a call's first argument that has more than one; 1 without such."""
    return next((len(x) for x in leaves if isinstance(x, torch.Tensor) and x.dim() > 1), 1)


def in_parts(call: Callable[..., Any], last: Callable[..., Any], parts: int, args: Any, kwargs: Any) -> Any:
    """``call(*args, **kwargs)`` on ``parts`` equal slices of the rows; ``last`` makes the last one.

    Arguments with as many rows are sliced, others are handed on whole. Where the rows cannot be divided so, or the
    results do not have one row each, one call is made of all.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    rows = rows_of(leaves)
    if parts < 2 or rows % parts:
        return last(*args, **kwargs)
    size, outputs = rows // parts, []
    shape: Any = None
    for i in range(parts):
        sliced = [_slice(x, rows, i * size, size) for x in leaves]
        some_args, some_kwargs = pytree.tree_unflatten(sliced, spec)
        found, shape = pytree.tree_flatten((last if i == parts - 1 else call)(*some_args, **some_kwargs))
        if any(isinstance(x, torch.Tensor) and (x.dim() == 0 or len(x) != size) for x in found):
            return last(*args, **kwargs)
        outputs.append(found)
    whole = [
        torch.cat(same) if isinstance(same[0], torch.Tensor) else same[0]
        for same in zip(*outputs, strict=True)
    ]
    return pytree.tree_unflatten(whole, shape)


def _slice(value: Any, rows: int, start: int, size: int) -> Any:
    if isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == rows:
        return value.narrow(0, start, size)
    return value
