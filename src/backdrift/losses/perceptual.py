"""Style and content of a reference picture by VGG-19, and how alike two pictures look to it.

With F the ``(channels, positions)`` features of a layer:

- style, Gatys et al. (2016, eqs. 3–5): the mean over layers of ``sum((G - A)^2) / (4 C^2 P^2)``, G and A the Gram
  matrices ``F F^T`` of picture and reference, C channels, P positions;
- content (eq. 1), as a mean in place of half the sum: the mean square of the difference of F;
- perceptual, Johnson et al. (2016, eq. 2): the content of several layers, averaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .base import Loss
from .classifier import split_model
from .reference import Picture, as_pictures, match, spec_of
from .registry import register
from .vgg import VGG19

Source = str | Path | nn.Module | None


class VGGLoss(Loss):
    """A comparison of VGG-19's features with a reference picture's, averaged over layers.

    Args:
        reference: A picture file, or a tensor ``(3, H, W)`` (or one for each sample, ``(N, 3, H, W)``) in [0, 1].
        model: VGG-19's weights (:class:`~.vgg.VGG19`); by default the published ones, from the hub.
        layers: As in :class:`~.vgg.VGG19`.
        size: Pictures and reference are compared as squares of this side, in pixels.

    Raises:
        InputError: When the reference or the weights cannot be read, or a layer is unknown.
    """

    bounded = True
    default: tuple[str, ...] = ()

    def __init__(
        self, reference: Picture, model: Source = None, layers: Sequence[str] | None = None, size: int = 224
    ) -> None:
        super().__init__()
        pictures = as_pictures(reference, self.name)
        self.network = VGG19(model, tuple(layers) if layers is not None else self.default, size)
        first = next(self.network.parameters())
        with torch.no_grad():
            known = self.network(pictures.to(first.device))
        for layer, features in known.items():
            self.register_buffer(f"known_{layer}", self.keep(features), persistent=False)
        self.spec = spec_of(self.name, reference, model)

    @classmethod
    def from_text(cls, text: str) -> VGGLoss:
        return cls(*split_model(text))

    def values(self, images: Tensor, prompts: Sequence[str] | None) -> Tensor:
        found: Mapping[str, Tensor] = self.network(images)
        each = [
            self.compare(features, match(getattr(self, f"known_{layer}"), images, self.name))
            for layer, features in found.items()
        ]
        return torch.stack(each).mean(0)

    def keep(self, features: Tensor) -> Tensor:
        """What of the reference's features ``(K, channels, positions)`` is compared with."""
        return features

    def compare(self, features: Tensor, known: Tensor) -> Tensor:
        """One layer's value of each sample, ``(N,)``."""
        return (features - known).square().flatten(1).mean(1)


@register("vgg-style", argument="a picture file [@VGG-19 weights]", example="vgg-style:target.png@vgg19.pth")
class VGGStyle(VGGLoss):
    """Style by VGG-19's Gram matrices; by default at the first layer of each of the five stages."""

    default = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")

    def keep(self, features: Tensor) -> Tensor:
        return features @ features.mT / features.shape[-1]

    def compare(self, features: Tensor, known: Tensor) -> Tensor:
        return (self.keep(features) - known).square().flatten(1).mean(1) / 4


@register(
    "vgg-content", argument="a picture file [@VGG-19 weights]", example="vgg-content:target.png@vgg19.pth"
)
class VGGContent(VGGLoss):
    """Content by VGG-19's features; by default at ``relu4_2``."""

    default = ("relu4_2",)


@register(
    "perceptual", argument="a picture file [@VGG-19 weights]", example="perceptual:target.png@vgg19.pth"
)
class Perceptual(VGGLoss):
    """How alike pictures look to VGG-19; by default at the second layer of each stage (Chen & Koltun, 2017)."""

    default = ("relu1_2", "relu2_2", "relu3_2", "relu4_2", "relu5_2")
