"""Double precision all the way: casts of float64 tensors to float32 are left out.

Several of diffusers' schedulers cast the latents to float32 for the arithmetic of a step, whatever they are given
(DPM-Solver++, the flow-matching Euler method). That rounding is a staircase of relative height 6e-8, which
autograd does not see and a finite difference does: divided by a small step and a small slope it is an error of
1e-4 and more in the difference, not in the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CASTS = {Tensor.to, Tensor.float, Tensor.type, Tensor.type_as}


class Unrounded(TorchFunctionMode):
    """Inside the block a float64 tensor that would be cast to float32 stays what it is (but changes its device)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _CASTS and args[0].dtype == torch.float64 and out.dtype == torch.float32:
            return args[0].to(out.device)
        return out
