"""How often a tensor was edited in place, as autograd counts it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["version_of", "versions_of"]


def version_of(tensor: Tensor) -> int:
    """The tensor's version; 0 where none is counted (inference tensors, and inside ``torch.func`` transforms)."""
    uncounted = tensor.is_inference() or torch._C._are_functorch_transforms_active()
    return 0 if uncounted else tensor._version


def versions_of(tensors: Sequence[Tensor]) -> list[int]:
    """:func:`version_of` each; asked of all weights of a network in every call of it."""
    if not torch._C._are_functorch_transforms_active():
        try:
            return [tensor._version for tensor in tensors]
        except RuntimeError:  # an inference tensor is among them
            pass
    return [version_of(tensor) for tensor in tensors]
