"""How often a tensor was edited in place, as autograd counts it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["version_of"]


def version_of(tensor: Tensor) -> int:
    """The tensor's version; 0 where none is counted (inference tensors, and inside ``torch.func`` transforms)."""
    uncounted = tensor.is_inference() or torch._C._are_functorch_transforms_active()
    return 0 if uncounted else tensor._version
