"""Is a picture still clean? Three measures of one digit on a flat background, held against unoptimised pictures.

Whoever steers a sampler hard enough can make a classifier say anything, with smears and specks. A picture counts
as clean if in no measure it is worse than the worst of a set of pictures that nothing has steered.
"""

from __future__ import annotations

import torch
from scipy import ndimage
from torch import Tensor

NAMES = ("colours off the line from background to digit", "unevenness of the frame", "loose ink")
FRAME = 4


def measures(pictures: Tensor) -> Tensor:
    """Of pictures (n, 3, H, W) in [0, 1], clamped: (n, 3), 0 is cleanest, in the order of :data:`NAMES`.

    The root mean square distance of the pixels' colours from the line through the colours of background and
    digit; that of the frame's pixels (4 wide) from their median; and the share of the inked pixels (nearer to
    the digit's colour than to the background's) that do not hang together with the largest piece.
    """
    x = pictures.clamp(0, 1).double()
    frame = torch.cat(
        [x[..., :FRAME, :].flatten(2), x[..., -FRAME:, :].flatten(2),
         x[..., FRAME:-FRAME, :FRAME].flatten(2), x[..., FRAME:-FRAME, -FRAME:].flatten(2)], 2
    )  # fmt: skip
    ground = frame.median(2).values[..., None]
    uneven = (frame - ground).square().sum(1).mean(1).sqrt()
    away = x.flatten(2) - ground
    far = away.square().sum(1).sqrt()
    inked = far >= far.quantile(0.95, dim=1, keepdim=True)  # sure to be the digit's: it covers more than that
    paint = (away * inked[:, None]).sum(2) / inked.sum(1, keepdim=True)
    along = (away * paint[..., None]).sum(1) / paint.square().sum(1, keepdim=True).clamp_min(1e-12)
    off = (away - along[:, None] * paint[..., None]).square().sum(1).mean(1).sqrt()
    return torch.stack([off, uneven, _scattered(along.view(len(x), *x.shape[2:]) > 0.5)], 1)


def limits(plain: Tensor) -> Tensor:
    """The worst of each measure among pictures that nothing has steered: (3,)."""
    return measures(plain).amax(0)


def is_clean(pictures: Tensor, limit: Tensor) -> Tensor:
    """(n,) booleans: in no measure worse than ``limit``."""
    return (measures(pictures) <= limit).all(1)


def _scattered(ink: Tensor) -> Tensor:
    shares = []
    for mask in ink.numpy():
        pieces, count = ndimage.label(mask)
        sizes = ndimage.sum_labels(mask, pieces, range(1, count + 1)) if count else [1.0]
        shares.append(1 - max(sizes) / max(sum(sizes), 1.0))
    return torch.tensor(shares, dtype=torch.float64)
