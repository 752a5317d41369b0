"""Features by which pictures are compared: a CLIP's patch tokens, or the built-in classifier's feature maps.

The second are a judge for what was guided with the first: another architecture, trained for another purpose.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .clip_images import ImageEncoder, as_encoder
from .resize import prepare

#: Networks that ship with the package, as text.
BUILT_IN = ("built-in:clip", "built-in:classifier")


class FeatureMaps(nn.Module):
    """The built-in classifier's feature maps as tokens: a place is a position, a channel a feature.

    Blocks are counted from one; each halves the sides: 32, 16, 8 and 4 positions a side.

    Args:
        network: A ``SceneClassifier``; by default the shipped one.
    """

    PER_BLOCK = 6
    SIDE = 64

    def __init__(self, network: Any = None) -> None:
        super().__init__()
        if network is None:
            from ..pipelines import assets

            network = assets.load_classifier()
        self.features = network.features
        self.blocks = len(self.features) // self.PER_BLOCK
        # The classifier takes [0, 1] to [-1, 1] itself, before these layers.
        self.register_buffer("mean", torch.full((3,), 0.5), persistent=False)
        self.register_buffer("std", torch.full((3,), 0.5), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def tokens(self, images: Tensor) -> Tensor:
        """``(N, positions, channels)`` of the last block there is, of ``(N, 3, H, W)`` pictures in [0, 1]."""
        pixels = prepare(images, self.SIDE, self.mean, self.std)
        maps = self.features(pixels.to(self.features[0].weight.dtype))
        return maps.flatten(2).mT.to(images.dtype)

    def up_to(self, block: int) -> FeatureMaps:
        """The same weights without the blocks after ``block``.

        Raises:
            InputError: When there is no such block.
        """
        if not 1 <= block <= self.blocks:
            raise InputError(f"This classifier's blocks are 1 to {self.blocks}, got block={block}.")
        cut = FeatureMaps.__new__(FeatureMaps)
        nn.Module.__init__(cut)
        cut.features = self.features[: block * self.PER_BLOCK]
        cut.blocks = block
        cut.register_buffer("mean", self.mean, persistent=False)
        cut.register_buffer("std", self.std, persistent=False)
        return cut


def as_features(given: Any) -> ImageEncoder | FeatureMaps:
    """``given`` as something with ``tokens``, ``up_to`` and ``blocks``.

    Args:
        given: ``"built-in:classifier"`` or a ``SceneClassifier``; ``"built-in:clip"`` or None for the shipped CLIP;
            or what :func:`~.clip_images.as_encoder` takes.

    Raises:
        InputError: When it cannot be loaded, or nothing built in is called so.
    """
    from ..pipelines.classifier import SceneClassifier

    if isinstance(given, FeatureMaps):
        return given
    if isinstance(given, SceneClassifier):
        return FeatureMaps(given)
    if isinstance(given, str) and given.startswith("built-in:"):
        if given not in BUILT_IN:
            raise InputError(f"No network called {given!r} is built in; there are: {', '.join(BUILT_IN)}.")
        return FeatureMaps() if given == "built-in:classifier" else as_encoder(None)
    return as_encoder(given)
