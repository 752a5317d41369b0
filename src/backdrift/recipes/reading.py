"""How a picture reads both ways up: the share of slightly moved and softened views that are read right."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses import Ambigram

SHIFTS = tuple((dy, dx) for dy in (-2, 0, 2) for dx in (-2, 0, 2))
NEEDED = 0.8
"""The share of the views that must be read right in both directions."""


def views(images: Tensor) -> Tensor:
    """The views that are judged, (n, 10, 3, H, W): nine shifts by 0 or ±2 pixels, and a blur."""
    shifted = [shift(images, dy, dx) for dy, dx in SHIFTS]
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return torch.stack([*shifted, soft], 1)


@torch.no_grad()
def read(images: Tensor, reader: Ambigram) -> Tensor:
    """The share of the views of each picture that ``reader`` reads right (upright, turned, both): (n, 3)."""
    seen = views(images.clamp(0, 1))
    right = reader.reads(seen.flatten(0, 1)).view(len(images), -1, 2).float()
    return torch.cat([right, right.prod(2, keepdim=True)], 2).mean(1)


def reads_both_ways(images: Tensor, reader: Ambigram) -> Tensor:
    """Whether each picture is read right both ways up in at least :data:`NEEDED` of its views: (n,) booleans."""
    return read(images, reader)[:, 2] >= NEEDED


def move(images: Tensor, across: float, down: float, turn: float, scale: float) -> Tensor:
    """Pictures moved, turned clockwise by ``turn`` radians and enlarged by ``1 + scale``; the border is repeated.

    ``across`` and ``down`` are in units of half the picture's side, so that a square's rim moves by as much in each.
    """
    cos, sin, size = math.cos(turn), math.sin(turn), 1 / (1 + scale)
    theta = images.new_tensor([[size * cos, size * sin, -across], [-size * sin, size * cos, -down]])
    grid = F.affine_grid(theta.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def shift(images: Tensor, dy: int, dx: int) -> Tensor:
    """Pictures moved by whole pixels; what comes in is the border repeated."""
    n = max(abs(dy), abs(dx))
    if not n:
        return images
    wide = F.pad(images, (n, n, n, n), mode="replicate")
    h, w = images.shape[-2:]
    return wide[..., n - dy : n - dy + h, n - dx : n - dx + w]
