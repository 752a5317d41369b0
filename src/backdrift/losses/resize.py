"""Differentiable, antialiased resizing, and the preparation of pictures for a vision network.

Resizing is linear and separable, so it is written as two small matrix products. That makes its gradient
exact, the same on every device and from run to run (the CUDA kernel of ``F.interpolate``'s backward pass
adds up in no fixed order), and differentiable as often as one likes.

The kernel is Pillow's and ``F.interpolate(antialias=True)``'s: a triangle ("bilinear") or Keys' cubic with
a = -1/2 ("bicubic"), stretched by the scale when shrinking, pixel centres at i + 1/2, renormalised at the
borders.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from ..errors import InputError

Kernel = Literal["bilinear", "bicubic"]


def resize(images: Tensor, size: tuple[int, int], kernel: Kernel = "bicubic") -> Tensor:
    """Resize ``(..., H, W)`` pictures to ``size = (height, width)``, antialiased, in their own dtype.

    Raises:
        InputError: When the size is not positive or the kernel unknown.
    """
    height, width = size
    if height < 1 or width < 1:
        raise InputError(f"Pictures cannot be resized to {height}x{width}; both sides must be at least 1.")
    if kernel not in ("bilinear", "bicubic"):
        raise InputError(f"kernel must be 'bilinear' or 'bicubic', got {kernel!r}.")
    if images.shape[-2:] == (height, width):
        return images
    rows = _weights(images.shape[-2], height, kernel).to(images)
    columns = _weights(images.shape[-1], width, kernel).to(images)
    return rows @ images @ columns.mT


@lru_cache(maxsize=64)
def _weights(old: int, new: int, kernel: Kernel) -> Tensor:
    """The ``(new, old)`` matrix of one axis, in float64."""
    scale = old / new
    stretch = max(scale, 1.0)
    centres = (torch.arange(new, dtype=torch.float64) + 0.5) * scale
    pixels = torch.arange(old, dtype=torch.float64) + 0.5
    distance = (pixels[None, :] - centres[:, None]).abs() / stretch
    if kernel == "bilinear":
        weight = (1 - distance).clamp_min(0)
    else:
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weight = torch.where(distance < 1, near, torch.where(distance < 2, far, torch.zeros(())))
    return weight / weight.sum(1, keepdim=True)


def prepare(images: Tensor, size: int, mean: Tensor, std: Tensor, kernel: Kernel = "bicubic") -> Tensor:
    """Pictures as a vision network wants them: shorter side to ``size``, centre square, ``(x - mean) / std``.

    Args:
        images: ``(N, 3, H, W)`` in [0, 1].
        size: Side of the square in pixels.
        mean, std: ``(3,)``, of pictures in [0, 1].
    """
    height, width = images.shape[-2:]
    scale = size / min(height, width)
    square = resize(images, (max(size, round(height * scale)), max(size, round(width * scale))), kernel)
    top, left = (square.shape[-2] - size) // 2, (square.shape[-1] - size) // 2
    square = square[..., top : top + size, left : left + size]
    return (square - mean.to(square)[:, None, None]) / std.to(square)[:, None, None]
