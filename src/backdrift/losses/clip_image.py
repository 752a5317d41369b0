"""How alike two pictures are to CLIP: the angle between their embeddings (:mod:`.clip` has the formulas)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .base import Loss
from .classifier import split_model
from .clip import Distance, angle_loss
from .clip_images import as_encoder
from .options import split_option
from .reference import Picture, as_pictures, match, spec_of
from .registry import register


@register("clip-image", argument="a picture [@CLIP model] [(cosine)]", example="clip-image:target.png")
class CLIPImage(Loss):
    """Distance between the pictures and a reference picture in CLIP's space.

    With ``"spherical"`` and a ViT-H/14 it is the object guidance of DOODL (Wallace et al., 2023) and SAG.

    Args:
        reference: A picture file, a photograph's name (:func:`~.photographs.photograph`), or a tensor ``(3, H, W)`` (or
            one for each sample, ``(N, 3, H, W)``) in [0, 1].
        model: A CLIP (:class:`~.clip_images.ImageEncoder`); by default the built-in one.
        distance: ``"spherical"``, half the squared angle, or ``"cosine"``, one minus the cosine.

    Raises:
        InputError: When the reference cannot be read, or the distance is unknown.
    """

    bounded = True

    def __init__(self, reference: Picture, model: Any = None, distance: Distance = "spherical") -> None:
        super().__init__()
        if distance not in ("spherical", "cosine"):
            raise InputError(f"distance must be 'spherical' or 'cosine', got {distance!r}.")
        pictures = as_pictures(reference, "clip-image")
        self.encoder = as_encoder(model)
        self.distance: Distance = distance
        self.spec = spec_of("clip-image", reference, model) + ("" if distance == "spherical" else " (cosine)")
        with torch.no_grad():
            known = self.encoder.embed(pictures.to(self.encoder.mean.device))
        self.register_buffer("known", known, persistent=False)
        self.known: Tensor

    @classmethod
    def from_text(cls, text: str) -> CLIPImage:
        given, distance = split_option(text, ("spherical", "cosine"))
        return cls(*split_model(given), distance="cosine" if distance == "cosine" else "spherical")

    def values(self, images: Tensor, prompts: Sequence[str] | None) -> Tensor:
        embedded = self.encoder.embed(images)
        return angle_loss(
            embedded, match(self.known, images, "clip-image").expand_as(embedded), self.distance
        )
