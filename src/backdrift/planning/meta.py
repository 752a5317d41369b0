"""Modules and arguments on the meta device: shapes, dtypes and flags, no data."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["like", "map_tensors", "set_dtypes", "storage_bytes", "to_meta", "weight_bytes", "weights_of"]


def like(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape, strides, dtype and flag on the meta device."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return made.requires_grad_(tensor.requires_grad)


def to_meta(module: nn.Module) -> nn.Module:
    """Put a module that nobody else uses on the meta device; weights that are shared stay shared.

    Unlike ``module.to("meta")`` it leaves the old Parameter objects alone (they may be somebody's) and takes along
    tensors that are neither parameters nor buffers.
    """
    memo: dict[int, torch.Tensor] = {}

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in memo:
            made = like(tensor.detach()).requires_grad_(tensor.requires_grad)
            memo[id(tensor)] = (
                nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
            )
        return memo[id(tensor)]

    for child in module.modules():
        tables: list[dict[str, Any]] = [child._parameters, child._buffers]
        for table in tables:
            table.update({name: moved(t) for name, t in table.items() if t is not None})
        for name, value in list(child.__dict__.items()):
            if isinstance(value, torch.Tensor):
                child.__dict__[name] = moved(value)
    return module


def set_dtypes(tensors: Sequence[torch.Tensor], wanted: Sequence[torch.dtype]) -> None:
    """Give weights on the meta device the dtypes they had."""
    for tensor, dtype in zip(tensors, wanted, strict=True):
        if tensor.dtype != dtype:
            tensor.data = tensor.data.to(dtype)


def weight_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers, each storage once."""
    return storage_bytes(weights_of(module))


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors, each storage once; of quantised weights, what they are made of, scales and tables too."""
    found: dict[Any, int] = {}
    for tensor in tensors:
        for part in _parts(tensor):
            storage = part.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return sum(found.values())


def weights_of(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors that a weight consists of: a subclass's own, and those it has as attributes."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        for name in flatten()[0]:
            yield from _parts(getattr(tensor, name))
        return
    if type(tensor) in (torch.Tensor, nn.Parameter):
        yield tensor
        return
    try:
        tensor.untyped_storage().nbytes()
        yield tensor
    except (NotImplementedError, RuntimeError):  # a wrapper, with nothing of its own
        pass
    yield from _attributes(tensor)


def _attributes(value: Any, depth: int = 3) -> Iterator[torch.Tensor]:
    for held in getattr(value, "__dict__", {}).values():
        if isinstance(held, torch.Tensor):
            yield held
        elif depth and not isinstance(held, nn.Module | type):
            yield from _attributes(held, depth - 1)


def map_tensors(value: Any, change: Any) -> Any:
    """``value`` with ``change`` applied to the tensors it holds as attributes (a distribution of latents)."""
    if isinstance(value, torch.Tensor):
        return change(value)
    held = getattr(value, "__dict__", None)
    if not held or not any(isinstance(v, torch.Tensor) for v in held.values()):
        return value
    made = copy.copy(value)
    made.__dict__.update({k: change(v) if isinstance(v, torch.Tensor) else v for k, v in held.items()})
    return made
