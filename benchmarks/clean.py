"""Is a picture still clean? Five measures of one digit on a flat background, held against unsteered pictures.

Whoever steers a sampler hard enough can make a classifier say anything, with tints, smears and specks. A picture
counts as clean if in no measure it is worse than the worst of a set of pictures that nothing has steered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy import ndimage
from torch import Tensor

NAMES = (
    "background: distance from the usual colour",
    "digit: distance from the usual colour",
    "colours off the line between the two (RMS)",
    "smears: pixels between the two, over inked ones",
    "loose ink: inked pixels outside the largest piece, over inked ones",
)
FRAME = 4


@dataclass(frozen=True)
class Colours:
    """Pictures (n, 3, H, W) taken apart.

    Attributes:
        ground, paint: (n, 3), the median of the frame of 4 pixels, and the mean of the twentieth of the pixels
            that are farthest from it.
        along: (n, H, W), 0 at the ground's colour, 1 at the paint's.
        off: (n,), the root mean square distance of the pixels from the line through both colours.
    """

    ground: Tensor
    paint: Tensor
    along: Tensor
    off: Tensor

    @classmethod
    def of(cls, pictures: Tensor) -> Colours:
        x = pictures.clamp(0, 1).double()
        frame = torch.cat(
            [x[..., :FRAME, :].flatten(2), x[..., -FRAME:, :].flatten(2),
             x[..., FRAME:-FRAME, :FRAME].flatten(2), x[..., FRAME:-FRAME, -FRAME:].flatten(2)], 2
        )  # fmt: skip
        ground = frame.median(2).values
        away = x.flatten(2) - ground[..., None]
        far = away.square().sum(1).sqrt()
        inked = far >= far.quantile(0.95, dim=1, keepdim=True)  # a digit covers more than that
        paint = (away * inked[:, None]).sum(2) / inked.sum(1, keepdim=True)
        along = (away * paint[..., None]).sum(1) / paint.square().sum(1, keepdim=True).clamp_min(1e-12)
        off = (away - along[:, None] * paint[..., None]).square().sum(1).mean(1).sqrt()
        return cls(ground, ground + paint, along.view(len(x), *x.shape[2:]), off)


@dataclass(frozen=True)
class Usual:
    """What unsteered pictures look like: the mean of their two colours, and the worst of each measure."""

    ground: Tensor
    paint: Tensor
    limits: Tensor

    @classmethod
    def of(cls, plain: Tensor) -> Usual:
        found = Colours.of(plain)
        ground, paint = found.ground.mean(0), found.paint.mean(0)
        return cls(ground, paint, measures(plain, ground, paint).amax(0))

    def clean(self, pictures: Tensor) -> Tensor:
        """(n,) booleans: in no measure worse than the worst of the unsteered ones."""
        return (measures(pictures, self.ground, self.paint) <= self.limits).all(1)


def measures(pictures: Tensor, ground: Tensor, paint: Tensor) -> Tensor:
    """Of pictures (n, 3, H, W) in [0, 1], clamped: (n, 5), 0 is cleanest, in the order of :data:`NAMES`.

    Args:
        ground, paint: (3,), the usual colours.

    A pixel is inked where it is nearer to the paint's colour than to the ground's, and between the two where it is
    from 0.15 to 0.5 of the way.
    """
    found = Colours.of(pictures)
    ink = found.along > 0.5
    between = ((found.along > 0.15) & ~ink).flatten(1).sum(1) / ink.flatten(1).sum(1).clamp_min(1)
    return torch.stack(
        [
            (found.ground - ground).norm(dim=1),
            (found.paint - paint).norm(dim=1),
            found.off,
            between,
            torch.tensor([_loose(mask) for mask in ink.numpy()], dtype=torch.float64),
        ],
        1,
    )


def _loose(mask: object) -> float:
    pieces, count = ndimage.label(mask)
    sizes = ndimage.sum_labels(mask, pieces, range(1, count + 1)) if count else [1.0]
    return float(1 - max(sizes) / sum(sizes))
