"""Reference pictures of guided applications: from a file, a photograph's name, a tensor, or made by the pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..descent.subject import check_prompts, picture_size, sampler_call
from ..errors import InputError
from ..losses import load_picture, resize
from ..losses.reference import Picture

MADE = "made:"


def open_reference(given: Picture) -> tuple[Tensor, str]:
    """The picture (3, H, W) in [0, 1], and what to call it.

    Args:
        given: a picture file, a photograph's name (:func:`backdrift.losses.photograph`, such as ``"skimage/coffee"``),
            a PIL picture, or a tensor (3, H, W) in [0, 1].

    Raises:
        InputError: it is none of these.
    """
    if not isinstance(given, Tensor):
        return load_picture(given), str(given) if isinstance(given, str | Path) else "a picture"
    if given.ndim != 3 or len(given) != 3 or not given.is_floating_point():
        raise InputError(
            f"A reference is a floating-point picture (3, H, W) in [0, 1], got {given.dtype} {tuple(given.shape)}."
        )
    if not bool(((given >= -1e-3) & (given <= 1 + 1e-3)).all()):  # also refuses NaN
        raise InputError(
            f"A reference's values are in [0, 1], got {float(given.min()):.3g} to {float(given.max()):.3g}."
        )
    return given.detach().float(), "a tensor"


@torch.no_grad()
def made(
    pipe: Any,
    prompt: str,
    *,
    seed: int,
    num_inference_steps: int = 31,
    guidance_scale: float = 3.0,
    height: int | None = None,
    width: int | None = None,
) -> Tensor:
    """A picture (3, H, W) in [0, 1] that the pipeline makes of a prompt: a subject that it can draw.

    Raises:
        InputError: the prompt is too long, or the safety checker flagged the picture.
    """
    from ..pipelines.load import noise

    height, width = picture_size(pipe, height, width)
    check_prompts(pipe, [prompt])
    call = sampler_call(pipe, height, width, num_inference_steps, guidance_scale, None)
    start = noise(pipe, seed=seed, height=height, width=width)
    generator = torch.Generator().manual_seed(seed)
    found = pipe(prompt=prompt, latents=start, generator=generator, output_type="pt", **call)
    if any(getattr(found, "nsfw_content_detected", None) or ()):
        raise InputError(
            f"The pipeline's safety checker flagged the reference made of {prompt!r}; give another."
        )
    return found.images[0].float().cpu().clamp(0, 1)


def centre(picture: Tensor, most: int = 256) -> Tensor:
    """The centre square (3, S, S) that vision networks see of a picture, at most ``most`` pixels wide; to be shown."""
    side = min(picture.shape[-2:])
    top, left = (picture.shape[-2] - side) // 2, (picture.shape[-1] - side) // 2
    size = min(side, most)
    return resize(picture[:, top : top + side, left : left + side], (size, size)).clamp(0, 1)
