"""A classifier with random weights, and losses on it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LABELS = {
    "digit": ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
    "colour": ["red", "green", "blue", "white"],
    "background": ["white", "grey", "grass"],
}


class TinyHeads(nn.Module):
    """A small random classifier with the built-in one's three answers."""

    def __init__(self) -> None:
        super().__init__()
        self.digits, self.colours, self.backgrounds = LABELS.values()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=8), nn.Tanh(), nn.Flatten())
        self.heads = nn.ModuleDict({head: nn.Linear(256, len(names)) for head, names in LABELS.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.body(images)
        return {head: layer(features) for head, layer in self.heads.items()}


def tiny_heads() -> TinyHeads:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TinyHeads().eval().requires_grad_(False)
