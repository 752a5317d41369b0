"""The style of a reference picture, by the Gram matrix of early CLIP features.

The loss of SAG's stylisation ("Towards accurate guided diffusion sampling through symplectic adjoint method", Pan et
al., 2023), which follows FreeDoM (Yu et al., 2023): with F the ``(patches, width)`` tokens of CLIP's third block,
``|| F(image)^T F(image) - F(reference)^T F(reference) ||_F``, not squared. Here pictures are normalised with the
model's own statistics for [0, 1].

Another block or network than the one guided with makes a judge of the result: ``style:ref.png (block 1)``,
``style:ref.png@built-in:classifier``.
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

BLOCK = 3


@register("style", argument="a picture [@model] [(block N)]", example="style:target.png")
class GramStyle(Loss):
    """Frobenius norm of the difference of Gram matrices, of CLIP's patch tokens (or of a classifier's feature maps).

    Its slope is 0 where the Gram matrices are equal and about 1 in their difference elsewhere: the norm is not squared.

    Args:
        reference: A picture file, a photograph's name (:func:`~.photographs.photograph`), or a tensor ``(3, H, W)`` (or
            one for each sample, ``(N, 3, H, W)``) in [0, 1].
        model: A CLIP (:class:`~.clip_images.ImageEncoder`), by default the built-in one; or ``"built-in:classifier"``
            for that network's feature maps (:class:`~.feature_maps.FeatureMaps`).
        block: Whose output, counted from one. The network runs no further.

    Raises:
        InputError: When the reference cannot be read, or the network has no such block.
    """

    bounded = True

    def __init__(self, reference: Picture, model: Any = None, block: int = BLOCK) -> None:
        super().__init__()
        pictures = as_pictures(reference, "style")
        self.encoder = as_features(model).up_to(block)
        self.spec = spec_of("style", reference, model) + ("" if block == BLOCK else f" (block {block})")
        with torch.no_grad():
            known = gram(self.encoder.tokens(pictures.to(self.encoder.mean.device)))
        self.register_buffer("known", known, persistent=False)
        self.known: Tensor

    @classmethod
    def from_text(cls, text: str) -> GramStyle:
        given, block = split_block(text)
        return cls(*split_model(given), block=BLOCK if block is None else block)

    def values(self, images: Tensor, prompts: Sequence[str] | None) -> Tensor:
        apart = gram(self.encoder.tokens(images)) - match(self.known, images, "style")
        return torch.linalg.vector_norm(apart.flatten(1), dim=1)


def gram(tokens: Tensor) -> Tensor:
    """``F^T F``, ``(N, width, width)``, of tokens ``(N, positions, width)``."""
    return tokens.mT @ tokens
