"""The shipped picture classifier: which digit, in which colour, on which background."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn


class SceneClassifier(nn.Module):
    """A small convolutional network with three heads.

    Args:
        digits, colours, backgrounds: names of the classes of each head, in the order of the logits.
        width: channels of the first layer.

    Call it with pictures (n, 3, 64, 64) in [0, 1] that hold one digit; it returns logits in a dictionary:
    ``digit`` (n, 10), ``colour`` (n, len(colours)), ``background`` (n, len(backgrounds)).
    """

    def __init__(
        self, digits: Sequence[str], colours: Sequence[str], backgrounds: Sequence[str], width: int = 24
    ) -> None:
        super().__init__()
        self.digits, self.colours, self.backgrounds = list(digits), list(colours), list(backgrounds)
        channels = [3, width, 2 * width, 4 * width, 4 * width]
        blocks: list[nn.Module] = []
        for i, (a, b) in enumerate(itertools.pairwise(channels)):
            first = (
                nn.Conv2d(a, b, 5, stride=2, padding=2) if i == 0 else nn.Conv2d(a, b, 3, stride=2, padding=1)
            )
            second = nn.Conv2d(b, b, 3, padding=1, groups=4 if i == 0 else 1)
            blocks += [first, nn.GroupNorm(4, b), nn.SiLU(), second, nn.GroupNorm(4, b), nn.SiLU()]
        self.features = nn.Sequential(*blocks)
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(channels[-1] * 16, 128), nn.SiLU())
        self.digit = nn.Linear(128, len(self.digits))
        self.colour = nn.Linear(128, len(self.colours))
        self.background = nn.Linear(128, len(self.backgrounds))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if images.ndim != 4 or images.shape[1:] != (3, 64, 64):
            raise ValueError(
                f"SceneClassifier takes pictures (n, 3, 64, 64) in [0, 1]; got {tuple(images.shape)}"
            )
        h = self.trunk(self.features(images * 2 - 1))
        return {"digit": self.digit(h), "colour": self.colour(h), "background": self.background(h)}

    def config(self) -> dict[str, list[str]]:
        """What is needed to build the same network again."""
        return {"digits": self.digits, "colours": self.colours, "backgrounds": self.backgrounds}
