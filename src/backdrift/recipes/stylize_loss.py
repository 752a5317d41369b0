"""The objective of stylisation (AdjointDPM, Pan et al. 2024, section 4.2, eq. 30).

With F the features (positions, channels) of a layer, ``G = F^T F / positions`` their Gram matrix, x a picture that was
made, x* the reference and x° what the untouched weights made of the same noise and prompt:

    style(x)   = mean over the style layers of    || G(x) - G(x*) ||^2 / || G(x*) ||^2
    content(x) = mean over the content layers of  || F(x) - F(x°) ||^2 / || F(x*) ||^2
    loss(x)    = w_s style(x) + w_c content(x)

Both are the paper's mean squared errors, each divided by a constant of its layer, so that weights mean the same for any
network: a picture without features has style 1, one in the reference's own style 0, an unchanged one content 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..descent import Example
from ..errors import InputError
from ..losses import FeatureMaps, ImageEncoder
from ..losses.feature_maps import as_features
from ..losses.style import gram
from ..losses.vgg import VGG19

BUILT_IN, VGG = "built-in:clip", "vgg19"
#: Gatys et al. (2016): the first layer of each stage for the style, relu4_2 for the content.
VGG_STYLE, VGG_CONTENT = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1"), ("relu4_2",)

Network = str | Path | nn.Module
Layers = Sequence[int] | Sequence[str] | None


class Features(nn.Module):
    """A network's features at some layers, for style and for content.

    Args:
        network: ``"built-in:clip"``, ``"built-in:classifier"``; ``"vgg19"`` for the published weights of VGG-19
            or ``"vgg19:<file>"`` for others, torchvision's module; or a CLIP: its module, folder or hub id.
        style, content: names of VGG-19's layers, or numbers of blocks, counted from one. By default those of Gatys et
            al. for VGG-19, else blocks 1 to 3 for the style and the one at three quarters of the depth for the content.

    Attributes:
        style, content: the layers.

    Raises:
        InputError: the network cannot be loaded or has no such layer.
    """

    def __init__(self, network: Network = BUILT_IN, style: Layers = None, content: Layers = None) -> None:
        super().__init__()
        self.vgg: VGG19 | None = None
        self.blocks = nn.ModuleDict()
        self.style: tuple[str, ...]
        self.content: tuple[str, ...]
        if _is_vgg(network):
            self.style, self.content = _texts(style, VGG_STYLE), _texts(content, VGG_CONTENT)
            source = network if isinstance(network, nn.Module) else str(network).partition(":")[2] or None
            self.vgg = VGG19(source, [*dict.fromkeys(self.style + self.content)])
        else:
            whole = as_features(network)
            deep = -(-3 * whole.blocks // 4)
            self.style = _texts(style, range(1, min(deep, 3) + 1))
            self.content = _texts(content, (deep,))
            for block in dict.fromkeys(self.style + self.content):
                if not block.isdigit():
                    raise InputError(
                        f"Layers of this network are numbers of blocks, 1 to {whole.blocks}, got {block!r}."
                    )
                self.blocks[block] = whole.up_to(int(block))

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The features (N, positions, channels) of the style and of the content layers, of pictures (N, 3, H, W)."""
        if self.vgg is not None:
            found = {name: features.mT for name, features in self.vgg(images).items()}
        else:
            found = {name: block.tokens(images) for name, block in self.blocks.items()}  # type: ignore[operator]
        return [found[name] for name in self.style], [found[name] for name in self.content]


class StyleAndContent(nn.Module):
    """The loss above, of pictures and their originals.

    Args:
        reference: (3, H, W) in [0, 1].
        features: where it is looked at.
        style_weight, content_weight: w_s and w_c, 0 or more.

    Raises:
        InputError: a weight is negative or not finite, or w_s is 0; or the reference has no features.
    """

    def __init__(
        self, reference: Tensor, features: Features, style_weight: float = 1.0, content_weight: float = 1.0
    ) -> None:
        super().__init__()
        for name, weight in (("style_weight", style_weight), ("content_weight", content_weight)):
            if not math.isfinite(weight) or weight < 0:
                raise InputError(f"{name}={weight!r} must be a finite number, 0 or more.")
        if not style_weight:
            raise InputError("style_weight=0 leaves nothing to learn: the pictures are their own content.")
        self.features, self.weights = features, (float(style_weight), float(content_weight))
        with torch.no_grad():
            style, content = features(reference[None].float())
        for i, layer in enumerate(style):
            known = _gram(layer)
            _check(known, features.style[i])
            self.register_buffer(f"known_{i}", known, persistent=False)
        for i, layer in enumerate(content):
            _check(layer, features.content[i])
            self.register_buffer(f"size_{i}", layer.square().mean(), persistent=False)

    def terms(self, images: Tensor, originals: Tensor) -> tuple[Tensor, Tensor]:
        """``style`` and ``content``, unweighted, each (n,).

        Args:
            images, originals: (n, 3, H, W) in [0, 1], not clamped; the originals get no gradient.
        """
        if any(b.device != images.device for b in self.buffers()):
            self.to(images.device)
        style, content = self.features(images)
        with torch.no_grad():
            _, wanted = self.features(originals.to(images))
        styles, contents = [], []
        for i, layer in enumerate(style):
            known = getattr(self, f"known_{i}").to(layer)
            styles.append((_gram(layer) - known).square().flatten(1).sum(1) / known.square().sum())
        for i, (layer, goal) in enumerate(zip(content, wanted, strict=True)):
            size = getattr(self, f"size_{i}").to(layer)
            contents.append((layer - goal).square().flatten(1).mean(1) / size)
        return torch.stack(styles).mean(0), torch.stack(contents).mean(0)

    def of(self, images: Tensor, originals: Tensor) -> Tensor:
        """w_s style + w_c content: (n,)."""
        style, content = self.terms(images, originals)
        return self.weights[0] * style + self.weights[1] * content

    def forward(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """The loss (n,) of pictures (n, 3, H, W), whose examples' targets are the originals."""
        return self.of(images, originals_of(examples))


class OnThemselves(nn.Module):
    """The loss as one of pictures alone, as large as the real one: for a memory budget that leaves room for it."""

    def __init__(self, loss: StyleAndContent) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, images: Tensor) -> Tensor:
        return self.loss.of(images, images.detach())


def originals_of(examples: Sequence[Example]) -> Tensor:
    """The examples' targets, (n, 3, H, W)."""
    return torch.stack([e.target for e in examples if e.target is not None])


def _gram(layer: Tensor) -> Tensor:
    return gram(layer) / layer.shape[1]


def _check(known: Tensor, layer: str) -> None:
    if not bool(known.square().sum() > 0):  # also refuses NaN
        raise InputError(f"The reference has no features at layer {layer}; give another picture or layer.")


def _is_vgg(network: Any) -> bool:
    if isinstance(network, nn.Module):
        from ..pipelines.classifier import SceneClassifier

        known = isinstance(network, FeatureMaps | ImageEncoder | SceneClassifier)
        return not known and not hasattr(network, "vision_model")
    return isinstance(network, str) and (network == VGG or network.startswith(f"{VGG}:"))


def _texts(given: Layers, default: Sequence[int | str]) -> tuple[str, ...]:
    if given is not None and (isinstance(given, str) or not len(given)):
        raise InputError(
            f"Layers are a list with at least one entry, such as {list(default)}; got {given!r}."
        )
    return tuple(str(layer) for layer in (default if given is None else given))
