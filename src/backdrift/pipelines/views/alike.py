"""Whether two steps of a pipeline are alike: the arguments of their network calls, but for state and time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..recorded import Recorded, Where

__all__ = ["beside", "close", "difference", "others"]


def others(call: Recorded, z: Tensor) -> dict[str, Any]:
    """A call's arguments by name, without state and time; what lies beside the state, instead of it."""
    given = dict(zip(call.names, call.args, strict=False)) | dict(call.kwargs)
    where = call.where(z)
    given[call.names[0]] = beside(call, where)
    given.pop(call._time_name, None)
    return given


def beside(call: Recorded, where: Where) -> Tensor | None:
    """What lies behind the state in a call's input; None where nothing does."""
    if where.dim is None:
        return None
    return call.input.narrow(where.dim, where.length, call.input.shape[where.dim] - where.length)


def difference(left: Any, right: Any, path: str = "") -> str | None:
    """The name of the first argument in which two calls differ; None where they are alike."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return None if left.shape == right.shape and torch.equal(left, right) else path
    if isinstance(left, Mapping) and isinstance(right, Mapping) and left.keys() == right.keys():
        found = (difference(left[k], right[k], f"{path}.{k}".lstrip(".")) for k in left)
        return next((name for name in found if name is not None), None)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple) and len(left) == len(right):
        found = (difference(a, b, path) for a, b in zip(left, right, strict=True))
        return next((name for name in found if name is not None), None)
    if isinstance(left, Tensor | Mapping | list | tuple) or isinstance(
        right, Tensor | Mapping | list | tuple
    ):
        return path
    try:
        return None if left is right or bool(left == right) else path
    except (TypeError, ValueError, RuntimeError):
        return path


def close(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape:
        return False
    unit = torch.finfo(min(left.dtype, right.dtype, key=lambda dtype: dtype.itemsize)).eps
    return float((left - right.to(left)).abs().max()) <= 64 * unit * (float(right.abs().max()) + 1e-12)
