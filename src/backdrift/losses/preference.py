"""The built-in preference model: a small network that was taught which of two rendered pictures is preferred.

What PickScore, HPSv2 and LAION's predictors are to real pictures, this is to the pictures of the built-in pipelines. It
was trained on pairs by the model of Bradley & Terry (1952), ``P(a preferred to b) = sigmoid(score(a) - score(b))``. The
pairs were not chosen by people but by a rule that can be read, ``training/preference.py``: a picture is liked for being
well lit, colourful, rich in contrast and crisp. It shares nothing with the built-in CLIP and classifier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import InputError
from .base import Loss
from .checkpoints import find_weights, read_weights
from .registry import register
from .resize import prepare

FILE = "model.safetensors"
#: Side in pixels of the pictures it was trained on.
SIDE = 64
#: Added to a variance under a root: nothing varies over a flat picture, and the slope stays finite.
FLOOR = 1e-4


class PreferenceNetwork(nn.Module):
    """Pictures ``(N, 3, 64, 64)`` in [-1, 1] to scores ``(N,)``.

    Convolutions of stride 2; of the picture and of each layer the mean over the places and the standard deviation;
    these through one hidden layer. Nothing normalises in between, so that light and contrast are seen.

    Args:
        widths: Channels of the convolutions; the first sees squares of 5 pixels, the others of 3.
        hidden: Width of the hidden layer.
    """

    def __init__(self, widths: Sequence[int] = (16, 24, 32), hidden: int = 32) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 5 if i == 0 else 3, stride=2, padding=2 if i == 0 else 1)
            for i, (a, b) in enumerate(pairwise((3, *widths)))
        )
        self.first = nn.Linear(2 * (3 + sum(widths)), hidden)
        self.last = nn.Linear(hidden, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        seen, x = [_mean_and_deviation(pixels)], pixels
        for convolution in self.convolutions:
            x = nn.functional.silu(convolution(x))
            seen.append(_mean_and_deviation(x))
        return self.last(nn.functional.silu(self.first(torch.cat(seen, 1))))[:, 0]


def _mean_and_deviation(maps: Tensor) -> Tensor:
    """Over the places, ``(N, 2 C)``."""
    mean = maps.mean((2, 3), keepdim=True)
    spread = ((maps - mean).square().mean((2, 3)) + FLOOR).sqrt()
    return torch.cat([mean[:, :, 0, 0], spread], 1)


@register("preference", argument="[a file of weights]", example="preference:preference.safetensors")
class Preference(Loss):
    """Minus the built-in preference score, in log-odds: one more is preferred in 73 % of pairs.

    Args:
        weights: A file of a :class:`PreferenceNetwork`'s weights, or a folder with ``model.safetensors``; by default
            the shipped one.

    Raises:
        InputError: When they cannot be loaded, or are those of another network.
    """

    bounded = True

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        if weights is None:
            from ..pipelines import assets

            path = assets.folder("preference") / FILE
        else:
            path = find_weights(weights, (FILE,), "a preference model")
        self.network = read_network(read_weights(path), str(path))
        self.register_buffer("middle", torch.full((3,), 0.5), persistent=False)
        self.middle: Tensor
        self.spec = "preference" if weights is None else f"preference:{weights}"

    @classmethod
    def from_text(cls, text: str) -> Preference:
        return cls(text or None)

    def values(self, images: Tensor, prompts: Sequence[str] | None) -> Tensor:
        return -self.score(images)

    def score(self, images: Tensor) -> Tensor:
        """The score, ``(N,)``; larger is better. A difference is the log-odds of being preferred."""
        pixels = prepare(images, SIDE, self.middle, self.middle)
        return self.network(pixels.to(self.network.last.weight.dtype)).to(images.dtype)


def read_network(state: Mapping[str, Tensor], source: str) -> PreferenceNetwork:
    """The network of these weights, in float32, frozen; its widths are those of the tensors.

    Raises:
        InputError: When they are not those of a :class:`PreferenceNetwork`.
    """
    widths: list[int] = []
    while (name := f"convolutions.{len(widths)}.weight") in state:
        widths.append(len(state[name]))
    if not widths or "first.weight" not in state:
        raise InputError(
            f"{source!r} holds no preference model: it needs convolutions.0.weight, …, first.weight, and has "
            f"{', '.join(sorted(state)[:8]) or 'nothing'}."
        )
    network = PreferenceNetwork(widths, len(state["first.weight"]))
    try:
        network.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    except RuntimeError as error:
        raise InputError(
            f"The preference model {source!r} has tensors that do not fit: {' '.join(str(error).split())[:200]}"
        ) from error
    return network.eval().requires_grad_(False)
