"""Stable Diffusion's safety checker (Rando et al. 2022), with a gradient.

diffusers' ``StableDiffusionSafetyChecker`` embeds the picture with CLIP, u, and compares it with concepts v_k: it flags
the picture if ``round(cos(u, v_k) - w_k + a, 3) > 0`` for any k, where the adjustment a is 0.01 if
``round(cos(u, s_j) - w'_j, 3) > 0`` for any "special care" concept s_j, else 0. A number rounded to three decimals is
positive above 0.0005, so with m = max_k cos(u, v_k) - w_k + a the picture is flagged where ``m - 0.0005 > 0``: the
margin here. Its gradient is the nearest concept's; the adjustment is a step and pulls none.

The checker itself cannot be asked for a gradient: it runs under ``no_grad`` on pictures that went through PIL.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..descent.subject import describe_tensors
from ..errors import InputError, UnsupportedError
from ..losses.resize import Kernel, resize
from .audit_filters import Filter, Verdict
from .audit_pictures import as_pil

ROUNDED = 0.0005
"""What a number with three decimals must pass to be positive."""
CARE = 0.01
_KERNELS: dict[int, Kernel] = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


class SafetyFilter(Filter):
    """A ``StableDiffusionSafetyChecker`` with its feature extractor.

    Args:
        checker: diffusers' checker, from whose weights the margin is computed.
        extractor: the image processor that prepares its pictures.

    Raises:
        UnsupportedError: the checker is of another class, or the extractor does what has no differentiable twin here.
    """

    def __init__(self, checker: Any, extractor: Any) -> None:
        super().__init__()
        needed = ("vision_model", "visual_projection", "concept_embeds", "concept_embeds_weights")
        if missing := [name for name in needed if not hasattr(checker, name)]:
            raise UnsupportedError(
                f"{type(checker).__name__} has no {', '.join(missing)}: it is not diffusers' "
                "StableDiffusionSafetyChecker. Give a score with a threshold, or a classifier."
            )
        if extractor is None:
            raise InputError("The safety checker has no feature extractor; give the pipeline's or its own.")
        self.checker, self.extractor = checker, extractor
        _kernel(extractor)
        self.spec = f"safety checker ({type(checker).__name__})"

    @classmethod
    def of(cls, pipe: Any) -> SafetyFilter:
        """The pipeline's own.

        Raises:
            InputError: it has none.
        """
        checker = getattr(pipe, "safety_checker", None)
        if checker is None:
            raise InputError(
                f"{type(pipe).__name__} has no safety checker: load one with it, or name another filter "
                "(a classifier, a score with a threshold; for the built-in pipelines stand-in:four)."
            )
        return cls(checker, getattr(pipe, "feature_extractor", None))

    def follow(self, images: Tensor) -> Tensor:
        return images.to(self.checker.visual_projection.weight.device)  # the checker is the user's: it stays

    def margin(self, images: Tensor) -> Tensor:
        checker = self.checker
        pixels = prepared(self.follow(images), self.extractor).to(checker.visual_projection.weight.dtype)
        unit = F.normalize(checker.visual_projection(checker.vision_model(pixels)[1]).float())

        def beyond(concepts: Tensor, thresholds: Tensor) -> Tensor:
            return unit @ F.normalize(concepts.float()).T - thresholds.float()

        care = beyond(checker.special_care_embeds, checker.special_care_embeds_weights).detach()
        above = beyond(checker.concept_embeds, checker.concept_embeds_weights).amax(1)
        return (above + CARE * (care > ROUNDED).any(1) - ROUNDED).to(images.device)

    @torch.no_grad()
    def decide(self, pictures: Tensor) -> Verdict:
        weight = self.checker.visual_projection.weight
        pil = [as_pil(picture) for picture in pictures]
        pixels = self.extractor(pil, return_tensors="pt").pixel_values.to(weight.device, weight.dtype)
        with quiet():
            _, found = self.checker(images=pictures.float().clone(), clip_input=pixels)  # it blackens these
        flagged = torch.tensor([bool(f) for f in found], device=pictures.device)
        margin = self.margin(pictures.float() / 255)
        return Verdict(margin, margin, flagged, ~flagged)

    def describe(self) -> dict[str, Any]:
        how = {
            k: v
            for k, v in self.extractor.to_dict().items()
            if isinstance(v, str | int | float | list | dict | bool)
        }
        return {"spec": self.spec, "weights": describe_tensors(self.checker), "extractor": how}


def prepared(images: Tensor, extractor: Any) -> Tensor:
    """What a CLIP image processor makes of pictures (n, 3, H, W) in [0, 1], without its rounding to 8 bits.

    Raises:
        UnsupportedError: the crop is larger than the resized picture, which would be padded.
    """
    height, width = images.shape[-2:]
    if extractor.do_resize:
        size = extractor.size
        if "shortest_edge" in size:
            short, long = sorted((height, width))
            edge = int(size["shortest_edge"])
            other = int(edge * long / short)  # transformers' own rounding
            height, width = (edge, other) if height <= width else (other, edge)
        else:
            height, width = int(size["height"]), int(size["width"])
        images = resize(images, (height, width), _kernel(extractor))
    if extractor.do_center_crop:
        crop = extractor.crop_size["height"], extractor.crop_size["width"]
        if crop[0] > height or crop[1] > width:
            raise UnsupportedError(
                f"The feature extractor crops {height}x{width} to a larger {crop[0]}x{crop[1]}."
            )
        top, left = (height - crop[0]) // 2, (width - crop[1]) // 2
        images = images[..., top : top + crop[0], left : left + crop[1]]
    if extractor.do_rescale:
        images = images * (255 * extractor.rescale_factor)
    if extractor.do_normalize:
        mean, std = (images.new_tensor(v)[:, None, None] for v in (extractor.image_mean, extractor.image_std))
        images = (images - mean) / std
    return images


def _kernel(extractor: Any) -> Kernel:
    number = int(extractor.resample) if extractor.do_resize else 3
    if number not in _KERNELS:
        raise UnsupportedError(
            f"The feature extractor resizes with Pillow's filter {number}; bilinear (2) and bicubic (3) are known."
        )
    return _KERNELS[number]


@contextmanager
def quiet() -> Iterator[None]:
    """Without the checker's warning about each flagged picture, of which an audit has thousands."""
    logger = logging.getLogger("diffusers.pipelines.stable_diffusion.safety_checker")
    was, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was
