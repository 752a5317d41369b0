"""Nests: dictionaries, lists and tuples of tensors and anything else, taken apart and put together again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def tensors(nest: Any) -> list[Tensor]:
    """The tensors of a nest, in order; one that occurs twice is listed twice."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    transform(note, nest)
    return found


def transform(function: Callable[[Tensor], Any], nest: Any) -> Any:
    """The same nest with ``function`` applied to every tensor; all that is not a tensor stays as it is."""
    if isinstance(nest, Tensor):
        return function(nest)
    if isinstance(nest, Mapping):
        changed = {key: transform(function, value) for key, value in nest.items()}
        return changed if type(nest) is dict else _like(nest, changed)
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):
        return type(nest)(*(transform(function, value) for value in nest))
    if isinstance(nest, list | tuple):
        return type(nest)(transform(function, value) for value in nest)
    return nest


def _like(nest: Mapping[Any, Any], changed: dict[Any, Any]) -> Any:
    try:
        return type(nest)(changed)  # type: ignore[call-arg]
    except TypeError:
        return changed


def merge(function: Callable[[Tensor, Tensor], Tensor | None], left: Any, right: Any) -> tuple[bool, Any]:
    """Two nests of one shape, tensor by tensor.

    Returns:
        (True, nest), or (False, None) where the shapes differ, anything besides tensors differs, or
        ``function`` returned None.
    """
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        joined = function(left, right)
        return joined is not None, joined
    if isinstance(left, Tensor) or isinstance(right, Tensor) or type(left) is not type(right):
        return False, None
    if isinstance(left, Mapping):
        if left.keys() != right.keys():
            return False, None
        pairs = {key: merge(function, left[key], right[key]) for key in left}
        return all(ok for ok, _ in pairs.values()), {key: value for key, (_, value) in pairs.items()}
    if isinstance(left, list | tuple):
        if len(left) != len(right):
            return False, None
        each = [merge(function, a, b) for a, b in zip(left, right, strict=True)]
        values = [value for _, value in each]
        made = type(left)(*values) if hasattr(left, "_fields") else type(left)(values)
        return all(ok for ok, _ in each), made
    try:
        return bool(left is right or left == right), left
    except (TypeError, ValueError, RuntimeError):
        return False, None


def concatenate(left: Any, right: Any, batch: int) -> tuple[bool, Any]:
    """Two nests of batch-first tensors as one of ``2 * batch`` rows; single rows are repeated ``batch`` times.

    Returns:
        (True, nest), or (False, None) where the two cannot share a batch.
    """

    def join(a: Tensor, b: Tensor) -> Tensor | None:
        if a.ndim == 0 or a.ndim != b.ndim or a.shape[1:] != b.shape[1:]:
            return None
        if a.dtype != b.dtype or a.device != b.device or not {len(a), len(b)} <= {1, batch}:
            return None
        rows = [x.expand(batch, *x.shape[1:]) if len(x) == 1 else x for x in (a, b)]
        return torch.cat(rows)

    return merge(join, left, right)
