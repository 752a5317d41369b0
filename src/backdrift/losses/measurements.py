"""Plain figures of a picture: what an effect changed, in numbers one can report.

Each takes ``(N, 3, H, W)`` pictures and returns ``(N,)`` values. All are differentiable and clamp nothing;
for a figure that is to describe the picture as it is saved, pass ``images.clamp(0, 1)``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import InputError

#: Rec. 601 luma, the weights of Pillow's ``convert("L")``.
LUMA = (0.299, 0.587, 0.114)


def luma(images: Tensor) -> Tensor:
    """The grey picture ``(N, H, W)``: Rec. 601 luma."""
    weights = torch.tensor(LUMA, dtype=images.dtype, device=images.device)
    return torch.einsum("nchw,c->nhw", images, weights)


def mean_brightness(images: Tensor) -> Tensor:
    """Mean luma; 0 is black, 1 is white."""
    return luma(images).mean((1, 2))


def contrast(images: Tensor) -> Tensor:
    """Standard deviation of the luma over the picture (0 for a flat one, at most 1/2 in [0, 1])."""
    grey = luma(images)
    variance = grey.var((1, 2), unbiased=False)
    return (variance + torch.finfo(variance.dtype).tiny).sqrt()  # finite slope on a flat picture


def mean_saturation(images: Tensor, floor: float = 1 / 255) -> Tensor:
    """Mean saturation as in HSV, ``(max - min) / max`` over the channels of a pixel; 0 is black and white.

    ``floor`` is the least value ``max`` counts as, so that a black pixel has no colour rather than 0/0.
    """
    high, low = images.amax(1), images.amin(1)
    return ((high - low) / high.clamp_min(floor)).mean((1, 2))


def mean_chroma(images: Tensor) -> Tensor:
    """Mean of ``max - min`` over the channels of a pixel: saturation that dark pixels do not inflate."""
    return (images.amax(1) - images.amin(1)).mean((1, 2))


def high_frequency_energy(images: Tensor, sigma: float = 1.0) -> Tensor:
    """Mean square of what a Gaussian blur of ``sigma`` pixels removes from the luma: 0 for a flat picture.

    The blur is cut off at 4 sigma and mirrored at the border (edge pixel not repeated), hence a cosine
    that is even about both edges is an eigenfunction of it.

    Raises:
        InputError: When ``sigma`` is not positive, or the picture too small for it.
    """
    if not sigma > 0:
        raise InputError(f"sigma must be positive, got {sigma}.")
    radius = math.ceil(4 * sigma)
    if min(images.shape[-2:]) <= radius:
        raise InputError(
            f"A blur of sigma {sigma} needs pictures of more than {radius} pixels a side, "
            f"got {images.shape[-2]}x{images.shape[-1]}."
        )
    grey = luma(images)[:, None]
    kernel = gaussian(sigma, radius).to(grey)
    padded = torch.nn.functional.pad(grey, (radius,) * 4, mode="reflect")
    blurred = torch.nn.functional.conv2d(padded, kernel[None, None, :, None])
    blurred = torch.nn.functional.conv2d(blurred, kernel[None, None, None, :])
    return (grey - blurred).square().mean((1, 2, 3))


def gaussian(sigma: float, radius: int) -> Tensor:
    """A Gaussian sampled at ``-radius … radius``, normalised to sum to one; float64, ``(2 radius + 1,)``."""
    x = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = torch.exp(-(x**2) / (2 * sigma**2))
    return weights / weights.sum()
