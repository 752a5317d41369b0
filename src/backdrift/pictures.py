"""Pictures (3, H, W) in [0, 1]: to files and from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_levels(images: Tensor) -> Tensor:
    """Pictures in [0, 1] of any shape, clamped and rounded, as uint8 on the CPU."""
    return (images.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8)


def to_pil(image: Tensor) -> Any:
    """A picture (3, H, W) in [0, 1], clamped and rounded, as a PIL image."""
    from PIL import Image

    return Image.fromarray(to_levels(image).permute(1, 2, 0).contiguous().numpy())


def side_by_side(images: Tensor, gap: int = 2) -> Tensor:
    """Pictures (N, 3, H, W) as one row (3, H, N*W + (N-1)*gap), white in between."""
    white = images.new_ones(3, images.shape[2], gap)
    parts = [part for image in images for part in (white, image)]
    return torch.cat(parts[1:], dim=2)


def in_rows(images: Tensor, across: int = 12, gap: int = 2) -> Tensor:
    """Pictures (N, 3, H, W) as one picture (3, …), at most ``across`` to a row, white in between and at the end."""
    if len(images) <= across:
        return side_by_side(images, gap)
    rows = -(-len(images) // across)
    missing = images.new_ones(rows * across - len(images), *images.shape[1:])
    parts = torch.cat([images, missing]).split(across)
    found = [side_by_side(part, gap) for part in parts]
    white = images.new_ones(3, gap, found[0].shape[2])
    return torch.cat([part for row in found for part in (white, row)][1:], dim=1)
