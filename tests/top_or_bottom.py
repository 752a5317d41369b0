"""A reader of pictures that are bright at the top or at the bottom, and the ambigram that it asks for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backdrift.losses import Ambigram


class TopOrBottom(nn.Module):
    """Class 0 ("top") where the upper half is brighter, class 1 ("bottom") where the lower is."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        half = images.shape[-2] // 2
        difference = images[..., :half, :].flatten(1).mean(1) - images[..., half:, :].flatten(1).mean(1)
        return {"digit": torch.stack([difference, -difference], 1) * self.scale}


def reader(upright: str = "top", turned: str = "bottom") -> Ambigram:
    from backdrift.losses import Classifier

    return Ambigram(upright, turned, Classifier(TopOrBottom(), {"digit": ["top", "bottom"]}))
