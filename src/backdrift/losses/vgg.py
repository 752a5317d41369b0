"""The convolutional part of VGG-19 (Simonyan & Zisserman, 2015), by the weights of its published checkpoints.

Layers are called as in Gatys et al. (2016): ``relu4_2`` is what the second convolution of the fourth stage puts out,
rectified. In torchvision's numbering the convolutions are ``features.0, 2, 5, 7, 10, …, 34``, each with its rectifier
after it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import InputError
from .checkpoints import find_weights, read_weights
from .resize import prepare

#: torchvision's weights, as a file that needs no torchvision.
CHECKPOINT = "timm/vgg19.tv_in1k"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: Convolutions in each stage; a pooling ends it.
STAGES = (2, 2, 4, 4, 4)


def layer_indices() -> dict[str, int]:
    """``{"conv1_1": 0, "relu1_1": 1, …}``: each layer's number in torchvision's ``features``."""
    indices, position = {}, 0
    for stage, convolutions in enumerate(STAGES, 1):
        for place in range(1, convolutions + 1):
            indices[f"conv{stage}_{place}"], indices[f"relu{stage}_{place}"] = position, position + 1
            position += 2
        position += 1
    return indices


class VGG19(nn.Module):
    """Features of pictures in [0, 1], resized so that a centre square of ``size`` pixels remains.

    Args:
        source: None for the published weights (:data:`CHECKPOINT`); a file with torchvision's or timm's names
            (``features.0.weight`` or ``0.weight``), ``.safetensors`` or ``.pth``; a folder or hub id; or torchvision's
            ``vgg19(...)`` or its ``.features``, whose weights are shared. Widths are read from the weights.
        layers: Whose features are wanted; nothing after the last of them is kept.
        size: Side in pixels.

    Raises:
        InputError: When a layer is unknown, or the weights are not those of a VGG-19 without batch norm.
    """

    def __init__(self, source: str | Path | nn.Module | None, layers: Sequence[str], size: int = 224) -> None:
        super().__init__()
        known = layer_indices()
        for layer in layers:
            if layer not in known:
                raise InputError(f"VGG-19 has no layer {layer!r}; it has {', '.join(known)}.")
        if not layers:
            raise InputError("A loss on VGG-19's features needs at least one layer, such as 'relu4_2'.")
        self.size = size
        self.wanted = {known[layer]: layer for layer in layers}
        self.convolutions = nn.ModuleDict(
            {str(i): c for i, c in _convolutions(source).items() if i <= max(self.wanted)}
        )
        self.register_buffer("mean", torch.tensor(MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(STD), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """``{layer: (N, channels, positions)}`` in the pictures' dtype."""
        found: dict[str, Tensor] = {}
        x = prepare(images, self.size, self.mean, self.std, "bilinear")
        x = x.to(next(self.convolutions.parameters()).dtype)
        for index in range(max(self.wanted) + 1):
            if str(index) in self.convolutions:
                x = self.convolutions[str(index)](x)
            elif str(index - 1) in self.convolutions:
                x = nn.functional.relu(x)
            else:
                x = nn.functional.max_pool2d(x, 2, 2)
            if index in self.wanted:
                found[self.wanted[index]] = x.flatten(2).to(images.dtype)
        return found


def _convolutions(source: str | Path | nn.Module | None) -> dict[int, nn.Conv2d]:
    if isinstance(source, nn.Module):
        state: dict[str, Tensor] = source.state_dict(keep_vars=True)
        where = type(source).__name__
    else:
        names = ("model.safetensors", "pytorch_model.bin", "vgg19.safetensors", "vgg19-dcbb9e9d.pth")
        path = find_weights(CHECKPOINT if source is None else source, names, "VGG-19")
        state, where = read_weights(path), repr(str(path))
    pattern = re.compile(r"(?:features\.)?(\d+)\.(weight|bias)$")
    named = {(int(m[1]), m[2]): tensor for name, tensor in state.items() if (m := pattern.match(name))}
    wanted = {i for name, i in layer_indices().items() if name.startswith("conv")}
    there = {i for (i, kind), tensor in named.items() if kind == "weight" and tensor.ndim == 4}
    if there != wanted or {i for i, _ in named} != wanted:
        raise InputError(
            f"{where} has not the layers of VGG-19 without batch norm: convolutions features.N for N in "
            f"{sorted(wanted)} are needed, found {sorted({i for i, _ in named}) or 'none'}."
        )
    made = {}
    for index in sorted(wanted):
        weight, bias = named[index, "weight"], named[index, "bias"]
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1, device="meta")
        layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        made[index] = layer
    return made
