"""LAION's aesthetic predictors: how much people like a picture, 1 to 10, told from its CLIP embedding.

Version 1 (LAION-AI/aesthetic-predictor, Schuhmann 2022) is one linear layer, version 2
(christophschuhmann/improved-aesthetic-predictor, the ``sac+logos+ava1-l14-linearMSE`` weights) five of them, without
nonlinearities. Both see the unit embedding of CLIP ViT-L/14.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InputError
from .base import Loss
from .checkpoints import find_weights, read_weights
from .classifier import split_model
from .clip_images import as_encoder
from .linear_stack import linear_stack
from .registry import register

CLIP = "openai/clip-vit-large-patch14"
#: Where the published heads are.
HEADS = {
    "v1": "shunk031/aesthetics-predictor-v1-vit-large-patch14",
    "v2": "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth",
}
FILES = ("model.safetensors", "aesthetic-model.pth", "pytorch_model.bin")


@register("aesthetic", argument="[v1, v2 or a head] [@CLIP model]", example="aesthetic:head.pth@clip")
class Aesthetic(Loss):
    """Minus LAION's aesthetic score.

    Args:
        head: ``"v2"``, ``"v1"``; a file of its weights (also the original ``sa_0_4_vit_l_14_linear.pth`` and
            ``sac+logos+ava1-l14-linearMSE.pth``), a folder or a hub id. See :func:`~.linear_stack.linear_stack`.
        model: The CLIP it was trained on (:class:`~.clip_images.ImageEncoder`); by default OpenAI's ViT-L/14.

    Raises:
        InputError: When one of them cannot be loaded, or their sizes do not fit.
    """

    bounded = True

    def __init__(self, head: str | Path = "v2", model: Any = None) -> None:
        super().__init__()
        path = find_weights(HEADS.get(str(head), head), FILES, "an aesthetic predictor")
        self.head = linear_stack(read_weights(path), "an aesthetic predictor")
        self.encoder = as_encoder(CLIP if model is None else model)
        width, wanted = self.encoder.projection.out_features, self.head[0].in_features
        if width != wanted:
            raise InputError(
                f"The aesthetic predictor {str(head)!r} takes embeddings of {wanted} values, this CLIP's have {width}; "
                "give the CLIP it was trained on (LAION's: ViT-L/14, 768)."
            )
        self.spec = f"aesthetic:{head}" + (f"@{model}" if isinstance(model, str) else "")

    @classmethod
    def from_text(cls, text: str) -> Aesthetic:
        head, model = split_model(text)
        return cls(head or "v2", model)

    def values(self, images: Tensor, prompts: Sequence[str] | None) -> Tensor:
        return -self.score(images)

    def score(self, images: Tensor) -> Tensor:
        """The predictor's own score, ``(N,)``; larger is better."""
        embedded = self.encoder.embed(images)
        dtype = next(self.head.parameters()).dtype
        return self.head(embedded.to(dtype))[:, 0].to(images.dtype)
