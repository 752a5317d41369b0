"""What a differentiable run gives back: the pictures as one tensor, PIL copies and safety flags beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import InputError
from .modular import RESULTS
from .refusals import image_processors


def unclamped(processor: Any) -> Any:
    """A copy of an image processor that maps [-1, 1] to [0, 1] without cutting off what lies outside.

    diffusers' own ``denormalize`` ends in ``clamp(0, 1)``, whose gradient is zero wherever a picture is
    saturated.
    """
    processor = copy.copy(processor)
    processor.denormalize = _denormalize
    return processor


def _denormalize(images: torch.Tensor) -> torch.Tensor:
    return images * 0.5 + 0.5


def to_pil(pipe: Any, pictures: torch.Tensor) -> list[Any]:
    """PIL copies of pictures (N, C, H, W) or of videos (N, frames, C, H, W: a list of frames each).

    Raises:
        InputError: the tensor holds no pictures (sound).
    """
    from diffusers.image_processor import VaeImageProcessor

    if pictures.ndim == 5:
        return [to_pil(pipe, video) for video in pictures]
    if pictures.ndim != 4 or pictures.shape[1] not in (1, 3, 4):
        raise InputError(f"{tuple(pictures.shape)} are no pictures: they cannot be shown as PIL copies")
    processor = next(iter(image_processors(pipe).values()), VaeImageProcessor)
    return processor.numpy_to_pil(processor.pt_to_numpy(pictures.detach().clamp(0, 1)))


class SafetyBeside:
    """Stands in for ``pipe.run_safety_checker``: flags a copy of the pictures, and leaves the pictures alone.

    diffusers' own blackens flagged pictures, and goes through PIL, where gradients end.

    Attributes:
        flags: one bool per picture, after a run; None where the pipeline has no checker.
    """

    def __init__(self, run_checker: Callable[..., Any]) -> None:
        self._run_checker = run_checker
        self.flags: list[bool] | None = None

    def __call__(self, image: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        pictures = image.detach().clone() if isinstance(image, torch.Tensor) else copy.copy(image)
        with torch.no_grad():
            result = self._run_checker(pictures, *args, **kwargs)
        self.flags = None if result[1] is None else [bool(flag) for flag in result[1]]
        # No flags for the pipeline: it would leave flagged pictures unscaled.
        return (image, *([None] * (len(result) - 1)))


def with_flags(out: Any, flags: list[bool] | None) -> Any:
    """The pipeline's output with the flags where the pipeline itself puts them."""
    if flags is None:
        return out
    if isinstance(out, tuple) and not hasattr(out, "to_tuple"):
        return (out[0], flags, *out[2:])
    if hasattr(out, "nsfw_content_detected"):
        out.nsfw_content_detected = flags
        out["nsfw_content_detected"] = flags
    return out


def first_tensor(out: Any) -> torch.Tensor | None:
    """The pictures (or latents, frames, waveforms) of a pipeline's output: its first entry, if that is a tensor.

    Of a modular pipeline's output (a state or a part of one), what the last block left.
    """
    if isinstance(out, torch.Tensor):
        return out
    values = out.values if hasattr(out, "kwargs_mapping") else out
    if isinstance(values, Mapping):
        left = [values[name] for name in RESULTS if isinstance(values.get(name), torch.Tensor)]
        first = left[0] if left else next(iter(values.values()), None)
    else:
        first = values[0] if isinstance(values, list | tuple) and values else None
    return first if isinstance(first, torch.Tensor) else None
