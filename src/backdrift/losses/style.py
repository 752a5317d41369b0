"""The style of a reference picture, by the Gram matrix of early CLIP features.

The loss of SAG's stylisation ("Towards accurate guided diffusion sampling through symplectic adjoint method", Pan et
al., 2023), which follows FreeDoM (Yu et al., 2023): with F the ``(patches, width)`` tokens of CLIP's third block,
``|| F(image)^T F(image) - F(reference)^T F(reference) ||_F``, not squared. Here pictures are normalised with the
model's own statistics for [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Loss
from .classifier import split_model
from .clip_images import as_encoder
from .reference import Picture, as_pictures, match, spec_of
from .registry import register


@register("style", argument="a picture file [@CLIP model]", example="style:target.png")
class GramStyle(Loss):
    """Frobenius norm of the difference of Gram matrices, of CLIP's patch tokens.

    Its slope is 0 where the Gram matrices are equal and about 1 in their difference elsewhere: the norm is not squared.

    Args:
        reference: A picture file, or a tensor ``(3, H, W)`` (or one for each sample, ``(N, 3, H, W)``) in [0, 1].
        model: A CLIP (:class:`~.clip_images.ImageEncoder`); by default the built-in one.
        block: Whose output, counted from one. The network runs no further.

    Raises:
        InputError: When the reference cannot be read, or the CLIP has no such block.
    """

    bounded = True

    def __init__(self, reference: Picture, model: Any = None, block: int = 3) -> None:
        super().__init__()
        pictures = as_pictures(reference, "style")
        self.encoder = as_encoder(model).up_to(block)
        self.spec = spec_of("style", reference, model)
        with torch.no_grad():
            known = gram(self.encoder.tokens(pictures.to(self.encoder.mean.device)))
        self.register_buffer("known", known, persistent=False)
        self.known: Tensor

    @classmethod
    def from_text(cls, text: str) -> GramStyle:
        return cls(*split_model(text))

    def values(self, images: Tensor, prompts: Sequence[str] | None) -> Tensor:
        apart = gram(self.encoder.tokens(images)) - match(self.known, images, "style")
        return torch.linalg.vector_norm(apart.flatten(1), dim=1)


def gram(tokens: Tensor) -> Tensor:
    """``F^T F``, ``(N, width, width)``, of tokens ``(N, positions, width)``."""
    return tokens.mT @ tokens
