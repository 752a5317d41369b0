"""What a reference picture shows and where, by CLIP's patch tokens.

The feature reconstruction of Gatys et al. (2016, eq. 1) and Johnson et al. (2016, eq. 2), on the features of a CLIP,
where a token stands for a place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Loss
from .classifier import split_model
from .feature_maps import as_features
from .options import split_block
from .reference import Picture, as_pictures, match, spec_of
from .registry import register


@register("content", argument="a picture [@model] [(block N)]", example="content:target.png")
class Content(Loss):
    """Mean square of the difference of CLIP's patch tokens, over places and channels.

    Args:
        reference: A picture file, a photograph's name (:func:`~.photographs.photograph`), or a tensor ``(3, H, W)`` (or
            one for each sample, ``(N, 3, H, W)``) in [0, 1].
        model: A CLIP (:class:`~.clip_images.ImageEncoder`), by default the built-in one; or ``"built-in:classifier"``
            for that network's feature maps (:class:`~.feature_maps.FeatureMaps`).
        block: Whose output, counted from one; by default the one in the middle.

    Raises:
        InputError: When the reference cannot be read, or the network has no such block.
    """

    bounded = True

    def __init__(self, reference: Picture, model: Any = None, block: int | None = None) -> None:
        super().__init__()
        pictures = as_pictures(reference, "content")
        whole = as_features(model)
        self.encoder = whole.up_to((whole.blocks + 1) // 2 if block is None else block)
        self.spec = spec_of("content", reference, model) + ("" if block is None else f" (block {block})")
        with torch.no_grad():
            known = self.encoder.tokens(pictures.to(self.encoder.mean.device))
        self.register_buffer("known", known, persistent=False)
        self.known: Tensor

    @classmethod
    def from_text(cls, text: str) -> Content:
        given, block = split_block(text)
        return cls(*split_model(given), block=block)

    def values(self, images: Tensor, prompts: Sequence[str] | None) -> Tensor:
        apart = self.encoder.tokens(images) - match(self.known, images, "content")
        return apart.square().flatten(1).mean(1)
